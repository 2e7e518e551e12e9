"""Record and replay CUDA graphs, for `detr.inference.optimize`.

For a single image, launching the kernels one by one from Python takes longer than computing them. A CUDA graph launches
all of them in one call.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from detr.model.engine import OptimizableModel, WithEngine
from detr.model.mask_head import MaskHead
from detr.model.multiscale.detector import MultiScaleDetector

_MAX_MEMORY_SHARE = 0.05
"""Maximum share of GPU memory for inputs and results of recorded graphs. Graphs share the memory of intermediate
results."""


class GraphMemory:
    """The memory pool and stream shared by the graphs of a model, of which only one runs at a time.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self.lock = threading.Lock()
        self.used_bytes = 0  # by inputs and results of all graphs

    def __reduce__(self) -> Any:
        """Raise an error: graphs recorded on a GPU cannot be copied."""
        raise TypeError(
            "a model from optimize() on a GPU cannot be copied or pickled: copy the original model and optimize the copy"
        )


class GraphEngine:
    """Records a function of tensors on a GPU as a CUDA graph for repeated input shapes.

    The first call with new shapes runs normally, which lets the libraries select their kernels. The second call is
    recorded, and later calls are replayed. Calls under autocast always run normally.

    Args:
        memory: of the model.
    """

    def __init__(self, memory: GraphMemory) -> None:
        self._memory = memory
        self._graphs: dict[Any, _RecordedGraph | None] = {}

    def __call__(self, compute: Callable[..., Any], /, *inputs: Tensor | None) -> Any:
        """Return the result of ``compute``, in newly allocated memory.

        Args:
            compute: the same function in every call. It maps tensors to a tensor, or to dataclasses or tuples of
                tensors.
            inputs: its arguments.
        """
        with torch.cuda.device(self._memory.device):  # Triton launches kernels on the current device
            return self._call_on_device(compute, inputs)

    def _call_on_device(self, compute: Callable[..., Any], inputs: Sequence[Tensor | None]) -> Any:
        if torch.is_autocast_enabled("cuda") or torch.cuda.is_current_stream_capturing():
            return compute(*inputs)
        key = tuple(None if each is None else (each.shape, each.dtype) for each in inputs)
        with self._memory.lock:
            if key not in self._graphs:
                self._graphs[key] = None
            elif self._graphs[key] is None:
                self._graphs[key] = self._record(compute, inputs)
            graph = self._graphs[key]
            if graph is not None:
                return graph.replay(inputs)
        return compute(*inputs)

    def _record(self, compute: Callable[..., Any], inputs: Sequence[Tensor | None]) -> _RecordedGraph | None:
        device = torch.cuda.get_device_properties(self._memory.device)
        if self._memory.used_bytes > _MAX_MEMORY_SHARE * device.total_memory:
            return None
        try:
            graph = _RecordedGraph(compute, inputs, self._memory)
        except RuntimeError:
            # Out of memory, or an operation that cannot be recorded. Stop recording: if the operation itself fails, the
            # normal call that follows raises the error.
            self._memory.used_bytes = sys.maxsize
            return None
        self._memory.used_bytes += graph.used_bytes
        return graph


def replay_graphs(model: OptimizableModel) -> None:
    """Make a model replay CUDA graphs for repeated image sizes, in place."""
    memory = GraphMemory(next(model.parameters()).device)
    for module in model.modules():
        if isinstance(module, WithEngine):
            if isinstance(module, MultiScaleDetector | MaskHead):
                module.engine = GraphEngine(memory)
            else:
                module.engine = _StatesEngine(model, memory)


class _StatesEngine:
    """Replays `DetrModel.states` as a CUDA graph if only images and masks are given.

    Args:
        model: the whole model. With a mask head, the graph also computes what its masks share.
        memory: of the whole model.
    """

    def __init__(self, model: OptimizableModel, memory: GraphMemory) -> None:
        self._config = model.config
        # weak, since the model holds this object: no reference cycle
        self._segmentation = weakref.ref(model) if model.predicts_masks else None
        self._graphs, self._memory = GraphEngine(memory), memory

    def __call__(
        self, compute: Callable[..., Any], /, pixel_values: Any, pixel_mask: Any = None, **options: Any
    ) -> Any:
        requested = [*options.values(), self._config.output_attentions, self._config.output_hidden_states]
        only_images = all(option is None or option is False for option in requested)
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_cuda or not only_images:
            with torch.cuda.device(self._memory.device):
                return compute(pixel_values, pixel_mask, **options)
        return self._graphs(partial(self._compute, compute), pixel_values, pixel_mask)

    def _compute(self, compute: Callable[..., Any], pixel_values: Tensor, pixel_mask: Tensor | None) -> Any:
        features, outputs = compute(pixel_values, pixel_mask)
        if self._segmentation is None:
            return replace(features, maps=()), outputs
        segmentation: Any = self._segmentation()
        context = segmentation.mask_context(features, outputs)
        return replace(features, maps=(), mask_context=context), outputs


class _RecordedGraph:
    """A CUDA graph, with the memory that it reads and writes.

    Args:
        compute: function from tensors to dataclasses of tensors.
        inputs: example inputs of the shapes to record.
        memory: pool and stream for the recording.

    Attributes:
        used_bytes: size of its inputs and results.
    """

    def __init__(
        self, compute: Callable[..., Any], inputs: Sequence[Tensor | None], memory: GraphMemory
    ) -> None:
        # Not in inference mode: its tensors could not be overwritten later, outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = [None if each is None else each.clone() for each in inputs]
            memory.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(memory.stream):
                compute(*self._inputs)
            torch.cuda.current_stream().wait_stream(memory.stream)
            self._graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may load models and copy images during the recording.
            with torch.cuda.graph(self._graph, memory.pool, memory.stream, capture_error_mode="thread_local"):
                self._outputs = compute(*self._inputs)
        self.used_bytes = sum(t.nbytes for t in _tensors((tuple(self._inputs), self._outputs)))

    def replay(self, inputs: Sequence[Tensor | None]) -> Any:
        """Compute the outputs for these inputs, in newly allocated memory."""
        with torch.no_grad():
            for own, given in zip(self._inputs, inputs, strict=True):
                if own is not None and given is not None:
                    own.copy_(given)
            self._graph.replay()
            return _clone(self._outputs)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif is_dataclass(value):
        yield from _tensors([getattr(value, field.name) for field in fields(value)])


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple | list):
        return type(value)(_clone(each) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _clone(getattr(value, field.name)) for field in fields(value)})
    return value
