"""A faster decoder, for `detr.inference.optimize`: a precomputed first self-attention, and joint keys and values.

Queries start as zeros, so all values of the first self-attention equal the bias of the value projection. Attention
weights sum to 1, so the result is the same constant vector for every query, whatever the weights are.

The cross-attentions of all layers read the same memory. So one matrix product computes the keys of all layers, and one
computes their values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from detr.model.transformer import Decoder


class FastDecoder(Decoder):
    """A decoder in evaluation mode whose L layers share one projection for keys and one for values.

    Attributes:
        keys: linear layer from D to L * D, the keys of layer after layer.
        values: linear layer from D to L * D, the values of layer after layer.
    """

    keys: nn.Module
    values: nn.Module

    def _seen_by_layers(self, memory: Tensor, position: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        number = len(self.layers)
        keys, values = self.keys(memory + position), self.values(memory)
        return zip(values.chunk(number, -1), keys.chunk(number, -1), strict=True)


@torch.no_grad()
def use_fast_decoder(decoder: Any) -> None:
    """Convert a plain decoder to a `FastDecoder`, in place; do nothing for another module or without layers."""
    if type(decoder) is not Decoder or not len(decoder.layers):
        return
    fast: Any = decoder
    attentions = [layer.encoder_attn for layer in fast.layers]
    fast.keys = _join([attention.k_proj for attention in attentions])
    fast.values = _join([attention.v_proj for attention in attentions])
    for attention in attentions:
        attention.k_proj, attention.v_proj = nn.Identity(), nn.Identity()
    fast.__class__ = FastDecoder
    first = fast.layers[0]
    attended = first.self_attn.out_proj(first.self_attn.v_proj.bias)
    first.attended_zeros = first.self_attn_layer_norm(attended)


def _join(layers: list[nn.Linear]) -> nn.Linear:
    weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    joined: nn.Linear = nn.utils.skip_init(nn.Linear, *reversed(weight.shape))
    joined.weight, joined.bias = (
        nn.Parameter(weight, requires_grad=False),
        nn.Parameter(bias, requires_grad=False),
    )
    return joined
