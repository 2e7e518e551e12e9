"""Attention, its masks, and the activations of the feed-forward layers.

B batch, D ``d_model``, H heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _linear(x: Tensor) -> Tensor:
    return x


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # no lambdas: a model must be picklable
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "linear": _linear,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu_squared,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation_function(activation: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the activation function of a name; a callable is returned unchanged.

    Raises:
        ValueError: the name is not known.
    """
    if not isinstance(activation, str):
        return activation
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation_function {activation!r} is not known; choose one of {sorted(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[activation]


def additive_mask(attend_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Create an additive attention mask: 0 on the keys to attend to, the smallest finite number elsewhere.

    With -inf, the softmax of an image that consists of padding only would be NaN; with finite numbers it is uniform.

    Args:
        attend_mask: bool [B, keys], True on the keys to attend to.
        dtype: a float dtype.

    Returns:
        ``dtype`` [B, 1, 1, keys], to be added to the attention scores.
    """
    mask = torch.zeros(attend_mask.shape, dtype=dtype, device=attend_mask.device)
    return mask.masked_fill(~attend_mask, torch.finfo(dtype).min)[:, None, None, :]


class MultiheadAttention(nn.Module):
    """Multi-head attention with position embeddings added to queries and keys, never to values.

    Args:
        dim: D.
        num_heads: H, a divisor of D.
        dropout: dropout probability of the attention weights.
        eager: always compute the attention weights, as ``output_attentions`` does, instead of using fused attention.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float, eager: bool = False) -> None:
        super().__init__()
        self.eager = eager
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.dropout = dropout
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention.

        Args:
            query: float [B, n, D].
            key: float [B, m, D].
            value: float [B, m, D].
            mask: float, broadcastable to [B, H, n, m], added to the scores; None attends to all keys.
            output_attentions: also return the attention weights, which is slower.

        Returns:
            float [B, n, D], and the attention weights float [B, H, n, m] or None.
        """
        q = self._split_heads(self.q_proj(query))
        k = self._split_heads(self.k_proj(key))
        v = self._split_heads(self.v_proj(value))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if mask is not None and mask.dtype != q.dtype:  # autocast; the minimum of float32 is -inf in bfloat16
            mask = mask.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)
        if output_attentions or self.eager:
            scores = (q @ k.transpose(-1, -2)) * self.head_dim**-0.5
            if mask is not None:
                scores = scores + mask
            weights = F.dropout(scores.softmax(dim=-1), p=dropout, training=self.training)
            attended = weights.to(v.dtype) @ v
        else:
            attended = self.attend(q, k, v, mask, dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), weights if output_attentions else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """Compute attention without returning its weights.

        Args:
            q: float [B, H, n, D / H].
            k: float [B, H, m, D / H].
            v: float [B, H, m, D / H].
            mask: as in `forward`, with the dtype of q.
            dropout: dropout probability of the attention weights.

        Returns:
            float [B, H, n, D / H].
        """
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
