"""How a new model's parameters start, in the original and in transformers; backbones are timm's business."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from detr.model.attention import MultiheadAttention
from detr.model.mask_head import BoxAttention, MaskHead

# how far a query or a cell sees at the start, as a share of the image's side
_DECODER_REACH, _ENCODER_REACH = 0.08, 0.12
# scale of the content in the channels that the local heads read: the position is to be heard over it
_CONTENT = 0.2


@torch.no_grad()
def init_as_original(module: nn.Module) -> None:
    """Initialise as facebookresearch/detr: Xavier for every matrix, zero for the attentions' biases.

    There q, k and v are one matrix [3 D, D], whose Xavier bound is smaller than that of three [D, D].
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
    """Initialise as transformers: matrices normal(0, std), biases 0, norms 1 and 0, in place."""
    for module in modules:
        for child in module.modules():
            if isinstance(child, nn.Linear | nn.Conv2d | nn.Embedding):
                nn.init.normal_(child.weight, std=std)
            bias = getattr(child, "bias", None)
            if isinstance(child, nn.Linear | nn.Conv2d) and bias is not None:
                nn.init.zeros_(bias)


@torch.no_grad()
def init_mask_head(mask_head: MaskHead, attention: BoxAttention, gain: float = 1.0) -> None:
    """Initialise as both references: Kaiming for the convolutions, Xavier times ``gain`` for the attention."""
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
    """Let a new `DetrModel` start with queries spread over the image that pass on what is around their place.

    DETR's queries have to learn where to look from nothing, which takes most of a short training. Nothing in the
    architecture hinders them from knowing it at the start:

    - the query position embeddings become sine embeddings of the points of a low-discrepancy sequence;
    - in half of the heads of the cross-attention and of the encoder's self-attention, queries and keys read the
      same few channels of the embedding with the shortest waves, so that their product is a bell around the own place
      (a von Mises kernel) plus what the content adds; the other heads stay as they are;
    - the cross-attention passes values on unchanged, and the decoder's other blocks start small, so that a query
      begins as the mean of the cells around it: with `detr.training.dense_supervision` the heads understand it at once.

    Args:
        model: a `DetrModel` with sine position embeddings; changed in place.
        extra_queries: float [K - 1, Q, D] of `detr.training.query_groups.QueryGroups`: placed at further points.
    """
    config = model.config
    own = model.query_position_embeddings.weight
    own.copy_(sine_embedding(query_points(len(own)), config.d_model))
    if extra_queries is not None:
        points = query_points(extra_queries.shape[:2].numel(), offset=len(own))
        extra_queries.copy_(sine_embedding(points, config.d_model).view_as(extra_queries))
    for layer in model.encoder.layers:
        _look_around(layer.self_attn, _ENCODER_REACH)
    for layer in model.decoder.layers:
        _look_around(layer.encoder_attn, _DECODER_REACH)
        for projection in (layer.encoder_attn.v_proj, layer.encoder_attn.out_proj):
            nn.init.eye_(projection.weight)
            nn.init.zeros_(projection.bias)
        layer.self_attn.out_proj.weight.mul_(0.3)
        layer.fc2.weight.mul_(0.1)
    quiet = _position_channels(config.d_model, config.d_model // config.decoder_attention_heads)
    norms = [layer.final_layer_norm for layer in model.encoder.layers]
    norms += [
        norm
        for layer in model.decoder.layers
        for norm in (layer.self_attn_layer_norm, layer.final_layer_norm)
    ]
    for norm in norms:
        norm.weight[quiet] = _CONTENT


@torch.no_grad()
def init_mask_scales(model: Any) -> None:
    """Let the masks of a new `DetrForSegmentation` depend on their queries from the start.

    What a backbone returns may be ten times as large as what a norm returns (linear bottlenecks: 7 to 11), and
    attention weights over a thousand cells are a thousandth: then all queries get the same mask, and it takes most of
    a short training until they do not. The weights of the mask head that read them are scaled so that at its first
    layer the attention is as large as the image, and at each later one what is fused is half as large as what comes
    from below. Measured on smooth noise.

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
        adapter.weight.mul_(0.3 / adapted.std())
    model.train(training)


def query_points(count: int, offset: int = 0) -> torch.Tensor:
    """``count`` points spread evenly over the unit square, float [count, 2] as (x, y): the R2 sequence."""
    index = torch.arange(offset + 1, offset + count + 1, dtype=torch.float64)
    golden = 1.32471795724474602596
    return torch.stack((index / golden, index / golden**2), dim=1).frac().float()


def sine_embedding(points: torch.Tensor, dim: int) -> torch.Tensor:
    """The sine position embedding of points float [n, 2] (x, y) in 0..1: float [n, dim]."""
    wavelengths = 10000.0 ** (torch.arange(0, dim // 2, 2, dtype=torch.float32) / (dim // 2))
    angle = points.flip(1)[:, :, None] * 2 * math.pi / wavelengths  # row, then column
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def _position_channels(dim: int, head_dim: int) -> list[int]:
    """The channels of the sine embedding with the shortest waves, half of them of the row, half of the column."""
    per_axis = head_dim // 4 * 2
    return [*range(per_axis), *range(dim // 2, dim // 2 + per_axis)]


def _look_around(attention: MultiheadAttention, reach: float) -> None:
    dim, head_dim = attention.q_proj.in_features, attention.head_dim
    channels = _position_channels(dim, head_dim)
    rates = 2 * math.pi / 10000.0 ** (torch.arange(0, len(channels) // 2, 2) / (dim // 2))
    # exp(scale^2 sum cos(rate delta) / sqrt(head_dim)) has this curvature at its peak
    scale = math.sqrt(math.sqrt(head_dim) / float(rates.square().sum())) / reach
    for head in range(0, attention.num_heads, 2):
        for projection in (attention.q_proj, attention.k_proj):
            rows = projection.weight[head * head_dim : head * head_dim + len(channels)]
            rows.zero_()
            rows[torch.arange(len(channels)), channels] = scale
