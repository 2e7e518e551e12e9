"""oneDNN's convolutions for `detr.fast`: packed weights, and what follows done before the result is stored."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class OneDnnConv2d(nn.Module):
    """A convolution of oneDNN with a packed weight, and what is done to its result before it is stored.

    oneDNN chooses how a weight is packed by the size of the input, and a weight that is packed for another is packed
    anew in every call, which can cost more than the convolution. There are few ways, so each is kept.

    Args:
        convolution: float32, on the CPU.
    """

    # The activations that oneDNN does within a convolution: its name, and the numbers it needs.
    ACTIVATIONS: ClassVar[dict[type[nn.Module], tuple[str, list[float]]]] = {
        nn.ReLU: ("relu", []),
        nn.ReLU6: ("hardtanh", [0.0, 6.0]),
        nn.SiLU: ("swish", []),
        nn.Hardswish: ("hardswish", []),
    }

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        padding, strides, dilation = convolution.padding, convolution.stride, convolution.dilation
        self._arguments = (list(padding), list(strides), list(dilation), convolution.groups)
        self._weight = convolution.weight.detach().contiguous()
        self._bias = None if convolution.bias is None else convolution.bias.detach()
        self._by_shape: dict[torch.Size, Tensor] = {}
        self._by_layout: dict[bytes, Tensor] = {}
        self.activation: tuple[str, list[float]] = ("none", [])
        """Of the result; of the sum where there is another input."""

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether a convolution with this weight can be one."""
        return (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
        )

    def take_bias_of(self, other: Any) -> None:
        """Add the bias of the convolution whose result is always added to this one's."""
        self._bias, other._bias = _sum(self._bias, other._bias), None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Float [B, C, h, w] to float [B, C', h', w']; ``other``, which is added, is overwritten by the result."""
        weight = self._by_shape.get(x.shape)
        if weight is None:
            weight = self._by_shape[x.shape] = self._pack(x.shape)
        name, numbers = self.activation
        given = (x, weight, self._bias, *self._arguments)
        if other is None:
            return torch.ops.mkldnn._convolution_pointwise(*given, name, numbers, "")
        after = None if name == "none" else name
        return torch.ops.mkldnn._convolution_pointwise_.binary(other, *given, "add", 1.0, after, numbers, "")

    def _pack(self, shape: torch.Size) -> Tensor:
        packed = torch.ops.mkldnn._reorder_convolution_weight(self._weight, *self._arguments, list(shape))
        layout = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())
        return self._by_layout.setdefault(layout, packed)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
