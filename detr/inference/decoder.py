"""A faster decoder, for `detr.inference.optimize`: a precomputed first self-attention, and joint keys and values.

Queries start as zeros, so all values of the first self-attention equal the bias of the value projection. Attention
weights sum to 1, so the result is the same constant vector for every query, whatever the weights are.

The cross-attentions of all layers read the same memory. So one matrix product computes the keys of all layers, and one
computes their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detr.model.transformer import Decoder, DecoderLayer


class FastDecoder(Decoder):
    """A decoder in evaluation mode whose L layers share one projection for keys and one for values.

    Args:
        decoder: a plain decoder with at least one layer. Its modules become parts of the new decoder; the projections
            for keys and values of its cross-attentions are removed from them.

    Attributes:
        keys: linear layer from D to L * D, the keys of layer after layer.
        values: linear layer from D to L * D, the values of layer after layer.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder) -> None:
        nn.Module.__init__(self)
        layers: Any = decoder.layers
        self.layers = layers
        self.layerdrop, self.checkpointing = 0.0, decoder.checkpointing
        self.layernorm = decoder.layernorm
        self.auxiliary_loss = decoder.auxiliary_loss
        self.norm_feeds_next_layer = decoder.norm_feeds_next_layer
        attentions = [layer.encoder_attn for layer in layers]
        self.keys = _join([attention.k_proj for attention in attentions])
        self.values = _join([attention.v_proj for attention in attentions])
        for attention in attentions:
            attention.k_proj, attention.v_proj = nn.Identity(), nn.Identity()
        layers[0] = _FirstLayer(layers[0])
        self.eval()

    def _layer_calls(
        self, queries: Tensor | None, memory: Tensor, position: Tensor
    ) -> Iterable[tuple[Callable[..., Any], Tensor, Tensor]]:
        first, *others = self.layers
        layers = [partial(first, from_zeros=True) if queries is None else first, *others]
        keys, values = self.keys(memory + position), self.values(memory)
        return zip(layers, values.chunk(len(layers), -1), keys.chunk(len(layers), -1), strict=True)


class _FirstLayer(DecoderLayer):
    """The first decoder layer, with a precomputed self-attention for queries of zeros.

    Args:
        layer: a plain layer, whose modules become those of the new one.

    Attributes:
        attended_zeros: float [D], the output of self-attention and norm for queries of zeros.
    """

    attended_zeros: Tensor

    def __init__(self, layer: DecoderLayer) -> None:
        nn.Module.__init__(self)
        self.dropout, self.activation_dropout = layer.dropout, layer.activation_dropout
        self.activation = layer.activation
        for name, module in layer.named_children():
            self.add_module(name, module)
        attended = self.self_attn.out_proj(self.self_attn.v_proj.bias)
        self.register_buffer("attended_zeros", self.self_attn_layer_norm(attended))

    def forward(
        self,
        x: Tensor,
        query_position: Tensor,
        query_mask: Tensor | None,
        memory: Tensor,
        memory_key: Tensor,
        memory_mask: Tensor | None,
        output_attentions: bool,
        groups: int = 1,
        from_zeros: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See `DecoderLayer.forward`.

        Args:
            from_zeros: whether x is zeros.
        """
        given = (memory, memory_key, memory_mask, output_attentions)
        if not from_zeros or output_attentions:
            return super().forward(x, query_position, query_mask, *given, groups)
        x, weights = self.attend_to_memory(self.attended_zeros.expand_as(x), query_position, *given)
        return x, None, weights


def _join(layers: list[nn.Linear]) -> nn.Linear:
    weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    joined: nn.Linear = nn.utils.skip_init(nn.Linear, *reversed(weight.shape))
    joined.weight, joined.bias = (
        nn.Parameter(weight, requires_grad=False),
        nn.Parameter(bias, requires_grad=False),
    )
    return joined
