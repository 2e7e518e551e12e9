"""Initialization of new models as in the original and as in transformers. Backbones are initialized by timm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from detr.model.attention import MultiheadAttention
from detr.model.mask_head import BoxAttention, MaskHead

# Initial width of the attention of a query and of an encoder token, as a fraction of the image's side.
_DECODER_REACH, _ENCODER_REACH = 0.08, 0.12
# Scale of the content in the channels that the local heads read, so that the position dominates their scores.
_CONTENT_SCALE = 0.2


@torch.no_grad()
def init_as_original(module: nn.Module) -> None:
    """Initialize like facebookresearch/detr: Xavier for every matrix, zero for the biases of attention.

    There, q, k and v are one matrix [3 D, D]. Its Xavier bound sqrt(6 / (D + 3 D)) is sqrt(0.5) times that of a matrix
    [D, D], hence the gain.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
        if isinstance(child, MultiheadAttention):
            for projection in (child.q_proj, child.k_proj, child.v_proj, child.out_proj):
                nn.init.zeros_(projection.bias)
    for child in module.modules():
        if isinstance(child, MultiheadAttention):
            for projection in (child.q_proj, child.k_proj, child.v_proj):
                nn.init.xavier_uniform_(projection.weight, gain=math.sqrt(0.5))


@torch.no_grad()
def init_as_transformers(modules: Sequence[nn.Module], std: float) -> None:
    """Initialize like transformers, in place: matrices from normal(0, std), biases 0; norms keep 1 and 0."""
    for module in modules:
        for child in module.modules():
            if isinstance(child, nn.Linear | nn.Conv2d | nn.Embedding):
                nn.init.normal_(child.weight, std=std)
            bias = getattr(child, "bias", None)
            if isinstance(child, nn.Linear | nn.Conv2d) and bias is not None:
                nn.init.zeros_(bias)


@torch.no_grad()
def init_mask_head(mask_head: MaskHead, attention: BoxAttention, gain: float = 1.0) -> None:
    """Initialize like the original and transformers: Kaiming for convolutions, Xavier times ``gain`` for attention."""
    for child in mask_head.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_uniform_(child.weight, a=1)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
    for projection in (attention.q_linear, attention.k_linear):
        nn.init.xavier_uniform_(projection.weight, gain=gain)
        nn.init.zeros_(projection.bias)


@torch.no_grad()
def init_local_attention(model: Any, extra_queries: torch.Tensor | None = None) -> None:
    """Initialize the attention of a new `DetrModel` locally: each query attends to the surroundings of its own point.

    DETR's queries learn from scratch where to look, which takes most of a short training. This initialization replaces
    that phase:

    - The query position embeddings are set to sine embeddings of the points of a low-discrepancy sequence.
    - In half of the heads of the cross-attention and of the encoder's self-attention, queries and keys are set to the
      few channels of the position embedding with the shortest wavelengths. Their product is then a bell-shaped function
      of the distance (a von Mises kernel), plus a contribution of the content. The other heads are unchanged.
    - The cross-attention returns values unchanged, and the other blocks of the decoder have small weights. Each query
      thus starts as the mean of the tokens around its point. With `detr.training.dense_supervision`, which trains the
      heads on encoder tokens, the heads can predict from it immediately.

    Args:
        model: a `DetrModel` with sine position embeddings; changed in place.
        extra_queries: float [K - 1, Q, D] of `detr.training.query_groups.QueryGroups`; set to further points, in place.
    """
    config = model.config
    own = model.query_position_embeddings.weight
    own.copy_(sine_embedding(query_points(len(own)), config.d_model))
    if extra_queries is not None:
        points = query_points(extra_queries.shape[:2].numel(), offset=len(own))
        extra_queries.copy_(sine_embedding(points, config.d_model).view_as(extra_queries))
    for layer in model.encoder.layers:
        _make_local(layer.self_attn, _ENCODER_REACH)
    for layer in model.decoder.layers:
        _make_local(layer.encoder_attn, _DECODER_REACH)
        for projection in (layer.encoder_attn.v_proj, layer.encoder_attn.out_proj):
            nn.init.eye_(projection.weight)
            nn.init.zeros_(projection.bias)
        layer.self_attn.out_proj.weight.mul_(0.3)
        layer.fc2.weight.mul_(0.1)
    channels = _position_channels(config.d_model, config.d_model // config.decoder_attention_heads)
    norms = [layer.final_layer_norm for layer in model.encoder.layers]
    norms += [
        norm
        for layer in model.decoder.layers
        for norm in (layer.self_attn_layer_norm, layer.final_layer_norm)
    ]
    for norm in norms:
        norm.weight[channels] = _CONTENT_SCALE


@torch.no_grad()
def init_mask_scales(model: Any) -> None:
    """Rescale the mask head of a new `DetrForSegmentation`, so that its masks depend on their queries from the start.

    The outputs of a backbone can be ten times as large as those of a norm (7 to 11 times for linear bottlenecks), while
    attention weights over a thousand cells are about 0.001. All queries then get the same mask, and most of a short
    training passes until they differ. This function scales the weights of the mask head on these inputs: the
    contributions of attention and image to the first layer get the same standard deviation, and the fused feature maps
    get half of that of the activations to which they are added. The statistics are measured on smooth noise.

    Args:
        model: a `DetrForSegmentation`; changed in place.
    """
    training, head = model.training, model.mask_head
    model.eval()
    weight = next(model.parameters())
    noise = torch.randn(2, model.config.num_channels, 16, 16, generator=torch.Generator().manual_seed(0)).to(
        weight
    )
    pixels = nn.functional.interpolate(noise, scale_factor=16, mode="bicubic")
    features = model.detr.model.features(pixels, None)
    context = model.mask_context(features, model.detr.model.transform(features))
    attention = nn.functional.conv2d(
        context.attention.flatten(0, 1), head.lay1.weight[:, head.dim :], padding=1
    )
    head.lay1.weight[:, head.dim :] /= attention.std()
    head.lay1.weight[:, : head.dim] /= context.base.std()
    for adapter, adapted in zip((head.adapter1, head.adapter2, head.adapter3), context.maps, strict=True):
        # The ReLU of a standard normal variable has the standard deviation 0.58.
        adapter.weight.mul_(0.3 / adapted.std())
    model.train(training)


def query_points(count: int, offset: int = 0) -> torch.Tensor:
    """Return ``count`` points (x, y), float [count, 2], of the R2 low-discrepancy sequence in the unit square."""
    index = torch.arange(offset + 1, offset + count + 1, dtype=torch.float64)
    plastic = 1.32471795724474602596  # the plastic number, the real solution of x^3 = x + 1
    return torch.stack((index / plastic, index / plastic**2), dim=1).frac().float()


def sine_embedding(points: torch.Tensor, dim: int) -> torch.Tensor:
    """Compute the sine position embedding, float [n, dim], of points (x, y) float [n, 2] in 0..1."""
    wavelengths = 10000.0 ** (torch.arange(0, dim // 2, 2, dtype=torch.float32) / (dim // 2))
    angle = points.flip(1)[:, :, None] * 2 * math.pi / wavelengths  # row, then column
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def _position_channels(dim: int, head_dim: int) -> list[int]:
    """Return the channels of the sine embedding with the shortest wavelengths, half for rows, half for columns."""
    per_axis = head_dim // 4 * 2
    return [*range(per_axis), *range(dim // 2, dim // 2 + per_axis)]


def _make_local(attention: MultiheadAttention, reach: float) -> None:
    """Make every second head attend to positions within about ``reach``, a fraction of the image's side."""
    dim, head_dim = attention.q_proj.in_features, attention.head_dim
    channels = _position_channels(dim, head_dim)
    rates = 2 * math.pi / 10000.0 ** (torch.arange(0, len(channels) // 2, 2) / (dim // 2))
    # The weight of a key at offset delta along an axis is exp(scale^2 sum_i cos(rate_i delta) / sqrt(head_dim)). Near
    # its maximum this is a Gaussian in delta with variance sqrt(head_dim) / (scale^2 sum_i rate_i^2), which is set to
    # reach^2.
    scale = math.sqrt(math.sqrt(head_dim) / float(rates.square().sum())) / reach
    for head in range(0, attention.num_heads, 2):
        for projection in (attention.q_proj, attention.k_proj):
            rows = projection.weight[head * head_dim : head * head_dim + len(channels)]
            rows.zero_()
            rows[torch.arange(len(channels)), channels] = scale
