"""The transformer of DETR: encoder and decoder.

B batch, S tokens (one for each cell of the feature map), Q queries, D ``d_model``.
Parameter names are those of the published checkpoints, so a state dict needs no renaming.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detr.config import DetrConfig
from detr.model.attention import MultiheadAttention, activation_function, additive_mask
from detr.model.outputs import DetrDecoderOutput, DetrEncoderOutput


class _FeedForwardLayer(nn.Module):
    """Feed-forward block of a transformer layer, with residual connection and norm.

    A base class and not a submodule, so that its parameters have the names of the published checkpoints.
    """

    def __init__(self, config: DetrConfig, ffn_dim: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self.activation = activation_function(config.activation_function)
        self.fc1 = nn.Linear(config.d_model, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, p=self.dropout, training=self.training)

    def _feed_forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(self.activation(self.fc1(x)), p=self.activation_dropout, training=self.training)
        return self.final_layer_norm(x + self._drop(self.fc2(hidden)))


def _attention(config: DetrConfig, heads: int) -> MultiheadAttention:
    eager = config.attn_implementation == "eager"
    return MultiheadAttention(config.d_model, heads, config.attention_dropout, eager)


class EncoderLayer(_FeedForwardLayer):
    """Self-attention over the tokens of the feature map, then the feed-forward block (post-norm)."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config, config.encoder_ffn_dim)
        self.self_attn = _attention(config, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self, x: Tensor, mask: Tensor | None, position: Tensor, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Map float [B, S, D] to float [B, S, D], and return the attention weights if requested, else None."""
        positioned = x + position
        attended, weights = self.self_attn(positioned, positioned, x, mask, output_attentions)
        x = self._feed_forward(self.self_attn_layer_norm(x + self._drop(attended)))
        if self.training and x.dtype == torch.float16:  # other dtypes do not overflow here
            limit = torch.finfo(x.dtype).max - 1000
            x = x.clamp(min=-limit, max=limit)
        return x, weights


class DecoderLayer(_FeedForwardLayer):
    """Self-attention over the queries, cross-attention to the image, then the feed-forward block."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config, config.decoder_ffn_dim)
        heads = config.decoder_attention_heads
        self.self_attn = _attention(config, heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = _attention(config, heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)

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
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Map float [B, Q, D] to float [B, Q, D], and return self- and cross-attention weights if requested, else None.

        Args:
            x: float [B, Q, D].
            query_position: float [B, Q, D], added to queries and keys.
            query_mask: additive mask of the self-attention; None masks nothing.
            memory: float [B, S, D], the output of the encoder.
            memory_key: float [B, S, D], the same with the position embedding added.
            memory_mask: additive mask of the cross-attention; None masks nothing.
            output_attentions: also return attention weights.
            groups: K groups of Q / K consecutive queries; self-attention stays within a group.
        """
        batch = x.shape[0]
        # Groups are treated as images of a larger batch. This needs no mask between groups, and computes K (Q / K)^2
        # attention scores in place of Q^2.
        grouped = x.unflatten(1, (groups, -1)).flatten(0, 1) if groups > 1 else x
        positioned = x + query_position
        positioned = positioned.view_as(grouped) if groups > 1 else positioned
        attended, self_weights = self.self_attn(
            positioned, positioned, grouped, query_mask, output_attentions
        )
        attended = attended.unflatten(0, (batch, groups)).flatten(1, 2) if groups > 1 else attended
        x = self.self_attn_layer_norm(x + self._drop(attended))
        x, cross_weights = self.attend_to_memory(
            x, query_position, memory, memory_key, memory_mask, output_attentions
        )
        return x, self_weights, cross_weights

    def attend_to_memory(
        self,
        x: Tensor,
        query_position: Tensor,
        memory: Tensor,
        memory_key: Tensor,
        memory_mask: Tensor | None,
        output_attentions: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the layer after its self-attention; for the arguments, see `forward`."""
        attended, weights = self.encoder_attn(
            x + query_position, memory_key, memory, memory_mask, output_attentions
        )
        return self._feed_forward(self.encoder_attn_layer_norm(x + self._drop(attended))), weights


def run_layer(owner: Any, layer: Callable[..., Any], *args: Any) -> Any:
    """Call a layer, in training with activation checkpointing if its owner has enabled it.

    Args:
        owner: a module with ``checkpointing``: keywords of `torch.utils.checkpoint.checkpoint`, or None to store all
            activations.
        layer: the layer or function to call.
        args: arguments of the call.
    """
    if owner.checkpointing is not None and owner.training:
        return checkpoint(layer, *args, **owner.checkpointing)
    return layer(*args)


class _Stack(nn.Module):
    """Base of encoder and decoder: a stack of layers with LayerDrop and activation checkpointing."""

    def __init__(self, layers: list[nn.Module], layerdrop: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.layerdrop = layerdrop
        self.checkpointing: dict[str, Any] | None = None  # see `run_layer`

    def _run(self, layer: Any, x: Tensor, *args: Any) -> tuple[Any, ...]:
        if self.training and self.layerdrop and float(torch.rand(())) < self.layerdrop:
            # Parameters and inputs of the dropped layer stay in the graph with gradient 0: DistributedDataParallel
            # waits for a gradient of every parameter.
            inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
            unused = sum((t.sum() * 0.0 for t in [*layer.parameters(), *inputs]), start=x.new_zeros(()))
            return (x + unused, None, None)
        return run_layer(self, layer, x, *args)


class Encoder(_Stack):
    """Encoder over the flattened feature map."""

    def __init__(self, config: DetrConfig) -> None:
        layers: list[nn.Module] = [EncoderLayer(config) for _ in range(config.encoder_layers)]
        super().__init__(layers, config.encoder_layerdrop)
        # transformers also applies dropout to the projected features; the original does not
        self.input_dropout = config.dropout if config.compat == "transformers" else 0.0

    def forward(
        self,
        features: Tensor,
        attend_mask: Tensor | None,
        position: Tensor,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> DetrEncoderOutput:
        """Encode the tokens.

        Args:
            features: float [B, S, D].
            attend_mask: bool [B, S], True on tokens that are not padding; None means no padding.
            position: float [B, S, D], added to queries and keys of each layer.
            output_attentions: also return the attention weights of each layer.
            output_hidden_states: also return the input and the output of each layer.
        """
        mask = None if attend_mask is None else additive_mask(attend_mask, features.dtype)
        hidden_states, attentions = [features], []
        x = F.dropout(features, p=self.input_dropout, training=self.training)
        for layer in self.layers:
            x, weights, *_ = self._run(layer, x, mask, position, output_attentions)
            hidden_states.append(x)
            attentions.append(weights)
        return DetrEncoderOutput(
            last_hidden_state=x,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class Decoder(_Stack):
    """Decoder over the object queries."""

    def __init__(self, config: DetrConfig) -> None:
        layers: list[nn.Module] = [DecoderLayer(config) for _ in range(config.decoder_layers)]
        super().__init__(layers, config.decoder_layerdrop)
        self.layernorm = nn.LayerNorm(config.d_model)
        self.auxiliary_loss = config.auxiliary_loss
        self.norm_feeds_next_layer = config.auxiliary_loss and config.compat == "transformers"

    def _layer_calls(
        self, _queries: Tensor | None, memory: Tensor, position: Tensor
    ) -> Iterable[tuple[Callable[..., Any], Tensor, Tensor]]:
        """Return, for each layer, the function to call and the inputs of the values and keys of its cross-attention."""
        key = memory + position
        return [(layer, memory, key) for layer in self.layers]

    def forward(
        self,
        queries: Tensor | None,
        query_position: Tensor,
        query_attend_mask: Tensor | None,
        memory: Tensor,
        memory_attend_mask: Tensor | None,
        memory_position: Tensor,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        groups: int = 1,
    ) -> DetrDecoderOutput:
        """Decode the queries.

        With ``auxiliary_loss``, the output of each layer is normalized for its loss, and the next layer gets the output
        that is not normalized, as in the original. With ``compat="transformers"``, the next layer gets the normalized
        output, and that of the last layer is normalized twice. Checkpoints that were trained this way need it.

        Args:
            queries: float [B, Q, D]; None means zeros.
            query_position: float [B, Q, D], added to queries and keys of each layer.
            query_attend_mask: bool [B, Q], False excludes a query from the keys of self-attention; None excludes none.
            memory: float [B, S, D], the output of the encoder.
            memory_attend_mask: bool [B, S], True on tokens that are not padding; None means no padding.
            memory_position: float [B, S, D], added to the keys of the cross-attention.
            output_attentions: also return the attention weights of each layer.
            output_hidden_states: also return the input and the output of each layer.
            groups: K groups of Q / K consecutive queries, each decoded independently of the others.
                ``query_attend_mask`` must be None if K is not 1.
        """
        x = torch.zeros_like(query_position) if queries is None else queries
        query_mask = None if query_attend_mask is None else additive_mask(query_attend_mask, x.dtype)
        memory_mask = None if memory_attend_mask is None else additive_mask(memory_attend_mask, memory.dtype)
        hidden_states, attentions, cross_attentions, intermediate = [x], [], [], []
        for layer, value, key in self._layer_calls(queries, memory, memory_position):
            x, weights, cross_weights = self._run(
                layer,
                x,
                query_position,
                query_mask,
                value,
                key,
                memory_mask,
                output_attentions,
                groups,
            )
            hidden_states.append(x)
            attentions.append(weights)
            cross_attentions.append(cross_weights)
            if self.norm_feeds_next_layer:
                x = self.layernorm(x)
                intermediate.append(x)
            elif self.auxiliary_loss:
                intermediate.append(self.layernorm(x))
        if self.auxiliary_loss and not self.norm_feeds_next_layer and intermediate:
            x = intermediate[-1]
        else:
            x = self.layernorm(x)
        hidden_states[-1] = x
        return DetrDecoderOutput(
            last_hidden_state=x,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if output_attentions else None,
            intermediate_hidden_states=torch.stack(intermediate) if intermediate else None,
        )
