"""What makes inference on a GPU fast, for `detr.fast`: cuDNN's fused convolutions, and CUDA graphs.

A GPU multiplies bfloat16 faster than it can read and write what is between two layers, so what counts is how often an
activation is stored. And it is faster than Python: one image takes longer to be asked for than to be computed, unless
the whole network is asked for at once.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from detr.attention import activation_function
from detr.fast_mask_head import FastMaskHead
from detr.frozen_batch_norm import called_module, nodes_of
from detr.mask_head import MaskHead
from detr.transformer import DecoderLayer, EncoderLayer

_MOST_KEPT = 0.05
"""Share of the GPU's memory for the images and results of recorded graphs; what is between them they share."""


class CudnnConv2d(nn.Module):
    """A convolution that adds and does the ReLU before its result is stored.

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
        # In float32 torch computes convolutions with TF32 by default, and products without.
        self._is_product = (
            convolution.weight.dtype in (torch.float16, torch.bfloat16)
            and convolution.kernel_size == (1, 1)
            and stride == (1, 1)
            and padding == (0, 0)
            and convolution.groups == 1
        )
        self.activation: tuple[str, list[float]] = ("none", [])
        """Of the result; of the sum where there is another input."""

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether a convolution with this weight can be one."""
        return weight.device.type == "cuda" and weight.dtype != torch.float64

    def take_bias_of(self, other: Any) -> None:
        """Add the bias of the convolution whose result is always added to this one's."""
        if self._bias is not None and other._bias is not None:
            self._bias, other._bias = self._bias + other._bias, None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Float [B, C, h, w] to float [B, C', h', w']; ``other`` is added."""
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
    """A convolution with stride 2 of few channels, as one with stride 1 of four times as many at half the size.

    The same products and sums, and zeros: three channels leave the units for matrix products mostly idle.

    Args:
        convolution: odd kernel, padded by half of it, stride 2.
    """

    def __init__(self, convolution: CudnnConv2d) -> None:
        super().__init__()
        weight = convolution._weight
        _, self._channels, size, _ = weight.shape
        self._before = (size // 2 + 1) // 2
        shift = 2 * self._before - size // 2  # of the first tap, to an even place
        self._taps = (size + shift + 1) // 2
        end = 2 * self._taps - size - shift
        weight = F.pad(weight, (shift, end, shift, end))
        weight = weight.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [C', C, n, 2, n, 2]
        weight = weight.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
        self._depth = -(-weight.shape[1] // 8) * 8  # what tensor cores load at once
        convolution._weight = F.pad(weight, (0, 0, 0, 0, 0, self._depth - weight.shape[1])).contiguous(
            memory_format=torch.channels_last
        )
        convolution._arguments = ([1, 1], [0, 0], [1, 1], 1)
        self.convolution = convolution

    @staticmethod
    def fits(convolution: Any) -> bool:
        """Whether a module is such a convolution."""
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
        """Float [B, C, H, W] to float [B, C', H / 2, W / 2], rounded up."""
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
    """A linear layer with ReLU, as one kernel."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight, self._bias = linear.weight.detach().t(), linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., C] to float [..., C']."""
        return torch._addmm_activation(self._bias, x.flatten(0, -2), self._weight).view(*x.shape[:-1], -1)


def use_gpu_kernels(graph: fx.GraphModule) -> None:
    """Let the first convolution of a backbone keep the GPU busy, and its pool write no more than it must."""
    from detr.fast_pool import FastMaxPool2d  # imports Triton, which only a GPU needs

    for node in nodes_of(graph.graph):
        module: Any = called_module(graph, node)
        if SpaceToDepthConv2d.fits(module) and len(node.args) == 1:
            graph.set_submodule(str(node.target), SpaceToDepthConv2d(module))
        elif FastMaxPool2d.fits(module):
            graph.set_submodule(str(node.target), FastMaxPool2d(module))


def use_fast_layers(model: nn.Module) -> None:
    """Let the layers of a transformer run on the units for matrix products, and the wide ones do their ReLU."""
    from detr.fast_float32 import use_tensor_cores  # imports Triton

    use_tensor_cores(model)
    for module in model.modules():
        if isinstance(module, EncoderLayer | DecoderLayer) and module.activation is F.relu:
            layer: Any = module
            layer.fc1 = LinearReLU(layer.fc1)
            layer.activation = activation_function("linear")


def gpu_mask_head(head: MaskHead) -> FastMaskHead:
    """A mask head with kernels of its own, where they run."""
    from detr.fast_mask_kernels import GpuMaskHead  # imports Triton

    return GpuMaskHead(head) if GpuMaskHead.fits(head) else FastMaskHead(head)


def replay_graphs(model: nn.Module) -> None:
    """Let every DETR model inside replay a CUDA graph for images of a size that it has seen before."""
    for module in model.modules():
        inner: Any = module
        if hasattr(inner, "states"):
            inner.states = _Replayed(inner, model if hasattr(model, "mask_context") else None)


class _Replayed:
    """`DetrModel.states` that asks the GPU for everything at once.

    The first batch of a shape is computed as always, which lets the libraries choose their kernels; the second is
    recorded; further ones are replayed. What asks for more than images, and what runs under autocast, is always
    computed.

    Args:
        model: a `DetrModel`.
        segmentation: the model around it that makes masks, if one does.
    """

    def __init__(self, model: Any, segmentation: Any) -> None:
        self._states: Callable[..., Any] = type(model).states
        self._model = weakref.ref(model)  # which holds this: no circle
        self._segmentation = None if segmentation is None else weakref.ref(segmentation)
        self._graphs: dict[Any, _Recorded | None] = {}
        self._kept = 0  # bytes
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self._lock = threading.Lock()

    def __call__(self, pixel_values: Any, pixel_mask: Any = None, **options: Any) -> Any:
        unused = all(option is None or option is False for option in options.values())
        plain = isinstance(pixel_values, Tensor) and pixel_values.is_cuda and unused
        if not plain or torch.is_autocast_enabled("cuda") or torch.cuda.is_current_stream_capturing():
            return self._states(self._model(), pixel_values, pixel_mask, **options)
        key = (pixel_values.shape, pixel_values.dtype, None if pixel_mask is None else pixel_mask.dtype)
        with self._lock:
            if key not in self._graphs:
                self._graphs[key] = None
            elif self._graphs[key] is None:
                self._graphs[key] = self._recorded(pixel_values, pixel_mask)
            graph = self._graphs[key]
            if graph is not None:
                return graph.replay(pixel_values, pixel_mask)
        return self._states(self._model(), pixel_values, pixel_mask)

    def _recorded(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> _Recorded | None:
        if self._kept > _MOST_KEPT * torch.cuda.get_device_properties(pixel_values.device).total_memory:
            return None
        try:
            graph = _Recorded(self._compute, pixel_values, pixel_mask, self._pool, self._stream)
        except RuntimeError:
            # Out of memory, or an operation that cannot be recorded: what is wrong shows when it is computed.
            self._kept = sys.maxsize
            return None
        self._kept += graph.kept
        return graph

    def _compute(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Any:
        features, outputs = self._states(self._model(), pixel_values, pixel_mask)
        if self._segmentation is None:
            return replace(features, maps=()), outputs
        segmentation: Any = self._segmentation()
        context = segmentation.mask_context(features, outputs)
        return replace(features, maps=(), mask_context=context), outputs


class _Recorded:
    """A CUDA graph of a function of images, with the memory that it reads and writes.

    Args:
        compute: from pixels and mask to dataclasses of tensors.
        pixel_values: of the shape that is recorded.
        pixel_mask: likewise; None where there is none.
        pool: the memory that it shares with other graphs, of which one runs at a time.
        stream: where it is recorded; the same for all of a pool.

    Attributes:
        kept: bytes of its images and results.
    """

    def __init__(
        self,
        compute: Callable[..., Any],
        pixel_values: Tensor,
        pixel_mask: Tensor | None,
        pool: Any,
        stream: torch.cuda.Stream,
    ) -> None:
        # Not in inference mode: nothing may be written into its tensors outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._pixels = pixel_values.clone()
            self._mask = None if pixel_mask is None else pixel_mask.clone()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                compute(self._pixels, self._mask)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads load models and copy images meanwhile.
            with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
                self._outputs = compute(self._pixels, self._mask)
        self.kept = sum(t.nbytes for t in _tensors((self._pixels, self._mask, self._outputs)))

    def replay(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Any:
        """The outputs for these images, in memory of their own."""
        with torch.no_grad():
            self._pixels.copy_(pixel_values)
            if self._mask is not None and pixel_mask is not None:
                self._mask.copy_(pixel_mask)
            self._graph.replay()
            return _cloned(self._outputs)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif is_dataclass(value):
        yield from _tensors([getattr(value, field.name) for field in fields(value)])


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple | list):
        return type(value)(_cloned(each) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _cloned(getattr(value, field.name)) for field in fields(value)})
    return value
