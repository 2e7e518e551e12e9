"""The mask head: attention of every query over the image, then an FPN-style CNN (DETR, section 4.4).

Parameter names are those of the published checkpoints. Results equal those of the original and of transformers, which
repeat the feature maps of the image for every query first. Here, what all queries share is computed once: the adapters,
and the first convolution on the image features. The input of that convolution is the concatenation of image features f
and attention a, and it is linear: W [f; a] + b = (W_f f + b) + W_a a. The first term does not depend on the query.

B batch, Q queries, M computed masks, D ``d_model``, H heads, h x w size of the deepest feature map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detr.config import DetrConfig
from detr.model.attention import activation_function
from detr.model.capture import may_branch_on_values
from detr.model.outputs import MaskContext
from detr.model.plain_layers import is_plain_tree

# Size of the largest activation of one chunk of masks; a few of this size exist at a time. On a CPU they should fit
# into the cache. A GPU needs larger chunks to be fully used.
_CHUNK_BYTES, _CHUNK_BYTES_ON_GPU = 8 * 1024**2, 64 * 1024**2


class BoxAttention(nn.Module):
    """Attention weights of queries over the image, with one softmax over all heads and cells together.

    Args:
        config: for D and H (the heads of the encoder).
    """

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.num_heads = config.encoder_attention_heads
        self.head_dim = config.d_model // self.num_heads
        self.q_linear = nn.Linear(config.d_model, config.d_model)
        self.k_linear = nn.Linear(config.d_model, config.d_model)

    def forward(self, queries: Tensor, memory: Tensor, attend_mask: Tensor | None) -> Tensor:
        """Compute attention weights.

        Args:
            queries: float [B, Q, D], the output of the decoder.
            memory: float [B, h * w, D], the output of the encoder.
            attend_mask: bool [B, h * w], True on cells that are not padding; None means no padding.

        Returns:
            float [B, Q, H, h * w] in 0..1; the weights of a query sum to 1.
        """
        q = self.q_linear(queries).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_linear(memory).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        scores = (q * self.head_dim**-0.5) @ k.transpose(-1, -2)
        if attend_mask is not None:
            minimum = torch.finfo(scores.dtype).min
            bias = torch.zeros_like(attend_mask, dtype=scores.dtype).masked_fill(~attend_mask, minimum)
            scores = scores + bias[:, None, None]
        scores = scores.transpose(1, 2)
        return scores.flatten(2).softmax(-1).view_as(scores)


class MaskHead(nn.Module):
    """Compute masks at the size of the shallowest feature map from attention weights, in three upsampling stages.

    Args:
        config: for D, H and the activation.
        channels: of the backbone's feature maps, shallow to deep; the first three are fused.

    Raises:
        ValueError: the widths are not divisible into the groups of the norms, or there are fewer than three feature
            maps.
    """

    _chunk_bytes_on_gpu = _CHUNK_BYTES_ON_GPU

    def __init__(self, config: DetrConfig, channels: Sequence[int]) -> None:
        super().__init__()
        dim, width = config.d_model, config.d_model + config.encoder_attention_heads
        widths = [width, dim // 2, dim // 4, dim // 8, dim // 16]
        uneven = [w for w in widths if w < 1 or w % min(8, w)]
        if uneven or width % 8 or dim % 16:
            raise ValueError(
                f"the mask head has layers of {widths} channels for d_model {dim} and "
                f"{config.encoder_attention_heads} encoder_attention_heads: their sum and d_model / 2, / 4 and / 8 "
                "must be multiples of 8 (or at most 8)"
            )
        if len(channels) < 3:
            raise ValueError(
                f"the backbone returns {len(channels)} feature maps, but segmentation needs the deepest and the three "
                "before it: set out_indices of the backbone_config to [1, 2, 3, 4]"
            )
        self.dim = dim
        self.activation = activation_function(config.activation_function)
        self.lay1 = nn.Conv2d(width, width, 3, padding=1)
        self.gn1 = nn.GroupNorm(8, width)
        self.lay2 = nn.Conv2d(width, widths[1], 3, padding=1)
        self.gn2 = _norm(widths[1])
        self.lay3 = nn.Conv2d(widths[1], widths[2], 3, padding=1)
        self.gn3 = _norm(widths[2])
        self.lay4 = nn.Conv2d(widths[2], widths[3], 3, padding=1)
        self.gn4 = _norm(widths[3])
        self.lay5 = nn.Conv2d(widths[3], widths[4], 3, padding=1)
        self.gn5 = _norm(widths[4])
        self.out_lay = nn.Conv2d(widths[4], 1, 3, padding=1)
        self.adapter1 = nn.Conv2d(channels[2], widths[1], 1)
        self.adapter2 = nn.Conv2d(channels[1], widths[2], 1)
        self.adapter3 = nn.Conv2d(channels[0], widths[3], 1)

    def context(self, projected: Tensor, maps: Sequence[Tensor], attention: Tensor) -> MaskContext:
        """Compute what all queries share.

        Args:
            projected: float [B, D, h, w], the projected deepest feature map.
            maps: feature maps of the backbone, shallow to deep.
            attention: float [B, Q, H, h * w], from `BoxAttention`.
        """
        base = projected
        if self._splits_first():
            base = F.conv2d(projected, self.lay1.weight[:, : self.dim], self.lay1.bias, padding=1)
        adapted = (self.adapter1(maps[2]), self.adapter2(maps[1]), self.adapter3(maps[0]))
        return MaskContext(base, adapted, attention.reshape(*attention.shape[:-1], *projected.shape[-2:]))

    def forward(self, context: MaskContext, image: Tensor, query: Tensor) -> Tensor:
        """Compute masks, in chunks if there are many; activations of chunks are recomputed in the backward pass.

        Args:
            context: the result of the method `context`.
            image: int64 [M], the index of the image.
            query: int64 [M], the index of the query.

        Returns:
            Logits float [M, h_0, w_0], at the size of the shallowest feature map.
        """
        shallow = context.maps[-1]
        if not may_branch_on_values():
            return self._masks(context, image, query)
        per_mask = shallow[0].numel() * shallow.element_size()
        max_masks = max(1, (self._chunk_bytes_on_gpu if shallow.is_cuda else _CHUNK_BYTES) // per_mask)
        if len(image) <= max_masks:
            return self._masks(context, image, query)
        size = -(-len(image) // -(-len(image) // max_masks))  # chunks of nearly equal size
        parts = []
        for images, queries in zip(image.split(size), query.split(size), strict=True):
            if torch.is_grad_enabled():
                parts.append(checkpoint(self._masks, context, images, queries, use_reentrant=False))
            else:
                parts.append(self._masks(context, images, queries))
        return torch.cat(parts)

    def _splits_first(self) -> bool:
        """Return whether the first convolution may be split: a replaced layer or one with hooks must be called."""
        return is_plain_tree(self.lay1, {nn.Conv2d})

    def _masks(self, context: MaskContext, image: Tensor, query: Tensor) -> Tensor:
        attention = context.attention[image, query]
        if self._splits_first():
            x = F.conv2d(attention, self.lay1.weight[:, self.dim :], padding=1) + context.base[image]
        else:
            x = self.lay1(torch.cat((context.base[image], attention), 1))
        x = self.activation(self.gn1(x))
        x = self.activation(self.gn2(self.lay2(x)))
        stages = ((self.lay3, self.gn3), (self.lay4, self.gn4), (self.lay5, self.gn5))
        for adapted, (layer, norm) in zip(context.maps, stages, strict=True):
            x = F.interpolate(x, size=adapted.shape[-2:], mode="nearest") + adapted[image]
            x = self.activation(norm(layer(x)))
        return self.out_lay(x)[:, 0]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(8, channels), channels)
