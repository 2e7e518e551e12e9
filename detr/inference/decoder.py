"""A decoder that computes once what depends on its weights alone, and the keys and values of all layers together.

For `detr.inference.optimize`. Queries begin as zeros, so the first layer's self-attention sees values that are all the bias of their
projection: whatever the weights of attention are, the result is one vector. The cross-attentions of all layers read
the same memory: one product makes all their keys, and one all their values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from detr.model.transformer import Decoder


class FastDecoder(Decoder):
    """A decoder in evaluation mode whose layers have one projection for their keys and one for their values.

    Attributes:
        keys: from D to L x D, layer after layer.
        values: the same.
    """

    keys: nn.Module
    values: nn.Module

    def _seen_by_layers(self, memory: Tensor, position: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        number = len(self.layers)
        keys, values = self.keys(memory + position), self.values(memory)
        return zip(values.chunk(number, -1), keys.chunk(number, -1), strict=True)


@torch.no_grad()
def use_fast_decoder(decoder: Any) -> None:
    """Make a stack of plain layers such a decoder, in place, where it is a decoder with layers."""
    if type(decoder) is not Decoder or not len(decoder.layers):
        return
    fast: Any = decoder
    attentions = [layer.encoder_attn for layer in fast.layers]
    fast.keys = _joined([attention.k_proj for attention in attentions])
    fast.values = _joined([attention.v_proj for attention in attentions])
    for attention in attentions:
        attention.k_proj, attention.v_proj = nn.Identity(), nn.Identity()
    fast.__class__ = FastDecoder
    first = fast.layers[0]
    attended = first.self_attn.out_proj(first.self_attn.v_proj.bias)
    first.attended_zeros = first.self_attn_layer_norm(attended)


def _joined(layers: list[nn.Linear]) -> nn.Linear:
    weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    joined: nn.Linear = nn.utils.skip_init(nn.Linear, *reversed(weight.shape))
    joined.weight, joined.bias = (
        nn.Parameter(weight, requires_grad=False),
        nn.Parameter(bias, requires_grad=False),
    )
    return joined
