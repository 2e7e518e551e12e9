"""Faster layers for inference on a GPU, for `detr.inference.optimize`.

A GPU multiplies bfloat16 faster than it reads and writes the activations between layers. So these layers reduce how
often an activation is stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from detr.inference.mask_head import FastMaskHead
from detr.model.attention import activation_function
from detr.model.fx_graph import called_module, nodes_of
from detr.model.mask_head import MaskHead


class CudnnConv2d(nn.Module):
    """A cuDNN convolution with a fused addition and ReLU.

    Args:
        convolution: on a GPU.
    """

    ACTIVATIONS: ClassVar[dict[type[nn.Module], tuple[str, list[float]]]] = {nn.ReLU: ("relu", [])}

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self._weight = convolution.weight.detach().contiguous(memory_format=torch.channels_last)
        self._bias = None if convolution.bias is None else convolution.bias.detach()
        assert not isinstance(convolution.padding, str)
        padding, stride, dilation = convolution.padding, convolution.stride, convolution.dilation
        self._arguments = (list(stride), list(padding), list(dilation), convolution.groups)
        # Half precision only: for float32, torch uses TF32 in convolutions by default, but not in matrix products.
        self._is_product = (
            convolution.weight.dtype in (torch.float16, torch.bfloat16)
            and convolution.kernel_size == (1, 1)
            and stride == (1, 1)
            and padding == (0, 0)
            and convolution.groups == 1
        )
        self.activation: tuple[str, list[float]] = ("none", [])
        """Name and parameters of the activation, which is applied to the result, or to the sum with the second input."""

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Return whether a convolution with this weight can be converted."""
        return weight.device.type == "cuda" and weight.dtype != torch.float64

    def take_bias_of(self, other: Any) -> None:
        """Take over the bias of a convolution whose result is always added to that of this one."""
        if self._bias is not None and other._bias is not None:
            self._bias, other._bias = self._bias + other._bias, None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Convolve float [B, C, h, w] to float [B, C', h', w']; ``other`` is added."""
        if self.activation[0] == "none":
            result = F.conv2d(x, self._weight, self._bias, *self._arguments)
            return result if other is None else result + other
        if other is not None:
            return torch.cudnn_convolution_add_relu(x, self._weight, other, 1.0, self._bias, *self._arguments)
        if self._is_product and self._bias is not None:
            batch, channels, height, width = x.shape
            rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
            product = torch._addmm_activation(self._bias, rows, self._weight.flatten(1).t())
            return product.view(batch, height, width, -1).permute(0, 3, 1, 2)
        return torch.cudnn_convolution_relu(x, self._weight, self._bias, *self._arguments)


class SpaceToDepthConv2d(nn.Module):
    """A convolution of few channels with stride 2, as one with stride 1 on four times the channels at half the size.

    It computes the same products and sums, plus zeros. Three channels alone would leave tensor cores mostly idle.

    Args:
        convolution: with an odd kernel, padding of half the kernel, and stride 2.
    """

    def __init__(self, convolution: CudnnConv2d) -> None:
        super().__init__()
        weight = convolution._weight
        _, self._channels, size, _ = weight.shape
        self._before = (size // 2 + 1) // 2
        shift = 2 * self._before - size // 2  # moves the first tap of the kernel to an even position
        self._taps = (size + shift + 1) // 2
        end = 2 * self._taps - size - shift
        weight = F.pad(weight, (shift, end, shift, end))
        weight = weight.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [C', C, n, 2, n, 2]
        weight = weight.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
        self._depth = -(-weight.shape[1] // 8) * 8  # tensor cores load 8 channels at a time
        convolution._weight = F.pad(weight, (0, 0, 0, 0, 0, self._depth - weight.shape[1])).contiguous(
            memory_format=torch.channels_last
        )
        convolution._arguments = ([1, 1], [0, 0], [1, 1], 1)
        self.convolution = convolution

    @staticmethod
    def fits(convolution: Any) -> bool:
        """Return whether a module is a convolution that can be converted."""
        if not isinstance(convolution, CudnnConv2d):
            return False
        _, channels, height, width = convolution._weight.shape
        half = height // 2
        return (
            channels <= 4
            and height == width
            and height % 2 == 1
            and convolution._arguments == ([2, 2], [half, half], [1, 1], 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve float [B, C, H, W] to float [B, C', H / 2, W / 2], rounded up."""
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        batch, channels, height, width = x.shape
        more = self._taps - 1
        cells = x.new_zeros((batch, height // 2 + more, width // 2 + more, self._depth))
        inner = cells[:, self._before :, self._before :][:, : height // 2, : width // 2, : 4 * channels]
        inner.unflatten(3, (channels, 2, 2)).copy_(
            x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
        )
        result: Tensor = self.convolution(cells.permute(0, 3, 1, 2))
        return result


class LinearReLU(nn.Module):
    """A linear layer and a ReLU in one kernel."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight, self._bias = linear.weight.detach().t(), linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Map float [..., C] to float [..., C']."""
        return torch._addmm_activation(self._bias, x.flatten(0, -2), self._weight).view(*x.shape[:-1], -1)


def use_gpu_kernels(graph: fx.GraphModule) -> None:
    """Replace the first convolution and the max pools of a backbone by faster ones for a GPU."""
    from detr.inference.triton_pool import FastMaxPool2d  # imports Triton, which is needed only on a GPU

    for node in nodes_of(graph.graph):
        module: Any = called_module(graph, node)
        if SpaceToDepthConv2d.fits(module) and len(node.args) == 1:
            graph.set_submodule(str(node.target), SpaceToDepthConv2d(module))
        elif FastMaxPool2d.fits(module):
            graph.set_submodule(str(node.target), FastMaxPool2d(module))


def use_fast_layers(stacks: Iterable[Any]) -> None:
    """Run float32 layers of encoders and decoders on tensor cores, and fuse the ReLU of feed-forward layers."""
    from detr.inference.triton_tf32x3 import use_tensor_cores  # imports Triton

    for stack in stacks:
        use_tensor_cores(stack)
        for layer in stack.layers:
            if layer.activation is F.relu:
                layer.fc1 = LinearReLU(layer.fc1)
                layer.activation = activation_function("linear")


def gpu_mask_head(head: MaskHead) -> FastMaskHead:
    """Return a mask head with custom kernels if they can run here, else a `FastMaskHead`."""
    from detr.inference.triton_mask_head import GpuMaskHead  # imports Triton

    return GpuMaskHead(head) if GpuMaskHead.fits(head) else FastMaskHead(head)
