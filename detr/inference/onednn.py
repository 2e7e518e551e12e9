"""Convolutions and linear layers of oneDNN, for `detr.inference.optimize`: packed weights and fused activations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.inference.mask_head import FastMaskHead
from detr.model.attention import activation_function
from detr.model.plain_layers import is_plain_tree
from detr.model.transformer import DecoderLayer, EncoderLayer


class OneDnnConv2d(nn.Module):
    """A convolution of oneDNN with a packed weight, a fused activation and an optional fused addition.

    oneDNN chooses the packed layout of a weight by the size of the input. A weight in another layout is packed again in
    every call, which can take longer than the convolution. There are few layouts, so each packed weight is cached.

    Args:
        convolution: float32, on the CPU.
    """

    # The activations that oneDNN can fuse into a convolution: its name and parameters.
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
        """Name and parameters of the activation, which is applied to the result, or to the sum with the second input."""

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Return whether a convolution with this weight can be converted."""
        return (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without packed weights, which cannot be copied; they are packed again when needed."""
        return {**self.__dict__, "_by_shape": {}, "_by_layout": {}}

    def take_bias_of(self, other: Any) -> None:
        """Take over the bias of a convolution whose result is always added to that of this one."""
        self._bias, other._bias = _sum(self._bias, other._bias), None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Convolve float [B, C, h, w] to [B, C', h', w']; ``other`` is added and overwritten by the result."""
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


class OneDnnLinear(nn.Module):
    """A linear layer as a 1 x 1 convolution of one row of pixels: faster in oneDNN than the matrix product of MKL.

    Args:
        linear: float32, on the CPU.
        activation: a key of `OneDnnConv2d.ACTIVATIONS`, applied to the result.
    """

    def __init__(self, linear: nn.Linear, activation: type[nn.Module] | None = None) -> None:
        super().__init__()
        kernel = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None)
        kernel.weight = nn.Parameter(linear.weight.detach()[..., None, None], False)
        kernel.bias = linear.bias
        self._features = linear.out_features
        self._convolution = OneDnnConv2d(kernel)
        if activation is not None:
            self._convolution.activation = OneDnnConv2d.ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map float [..., C] to float [..., C']."""
        if not x.numel():  # oneDNN does not accept empty images
            return x.new_zeros((*x.shape[:-1], self._features))
        pixels = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
        return self._convolution(pixels).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def pack_layers(model: nn.Module, stacks: Iterable[Any]) -> None:
    """Convert linear layers with their ReLU, the input projection and the convolutions of a mask head to oneDNN.

    Args:
        model: changed in place.
        stacks: its encoders, decoders and other parts that consist of plain layers; other layers stay unchanged.
    """
    for name, module in [*model.named_modules()]:
        is_projection = name.rpartition(".")[2] == "input_projection" and is_plain_tree(module, {nn.Conv2d})
        if is_projection and OneDnnConv2d.fits(module.weight):
            model.set_submodule(name, OneDnnConv2d(module))
    for head in model.modules():
        if isinstance(head, FastMaskHead):
            for name, module in [*head.named_modules(remove_duplicate=False)]:
                if isinstance(module, nn.Conv2d) and OneDnnConv2d.fits(module.weight):
                    head.set_submodule(name, OneDnnConv2d(module))
    for stack in stacks:
        for layer in stack.modules():
            is_layer = isinstance(layer, EncoderLayer | DecoderLayer)
            if is_layer and layer.activation is F.relu and OneDnnConv2d.fits(layer.fc1.weight):
                layer.fc1 = OneDnnLinear(layer.fc1, nn.ReLU)
                layer.activation = activation_function("linear")
        for name, module in [*stack.named_modules()]:
            if isinstance(module, nn.Linear) and OneDnnConv2d.fits(module.weight):
                stack.set_submodule(name, OneDnnLinear(module))
            elif isinstance(module, nn.Conv2d) and OneDnnConv2d.fits(module.weight):
                stack.set_submodule(name, OneDnnConv2d(module))


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
