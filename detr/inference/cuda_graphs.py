"""CUDA graphs, for `detr.inference.optimize`: a GPU is faster than Python.

One image takes longer to be asked for, kernel by kernel, than to be computed, unless all of it is asked for at once.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from detr.model.multiscale.detector import MultiScaleDetector

_MOST_KEPT = 0.05
"""Share of the GPU's memory for the inputs and results of recorded graphs; what is between them they share."""


class GraphMemory:
    """What the graphs of a model share, of which one runs at a time: the memory that they compute in, and a stream.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self.lock = threading.Lock()
        self.kept = 0  # bytes

    def __reduce__(self) -> Any:
        """Raise an error: what a GPU has recorded cannot be copied."""
        raise TypeError(
            "a model that optimize() made on a GPU cannot be copied or pickled: copy the one it was made from, and "
            "optimize that"
        )


class Replayed:
    """A function of tensors on a GPU that is recorded for shapes it has seen before.

    The first call with inputs of some shapes is computed as always, which lets the libraries choose their kernels; the
    second is recorded; further ones are replayed. What runs under autocast is always computed.

    Args:
        compute: a method, from tensors to a tensor, or dataclasses or tuples of them; its object may hold this.
        memory: of the model.
    """

    def __init__(self, compute: Callable[..., Any], memory: GraphMemory) -> None:
        self._method, self._memory = weakref.WeakMethod(compute), memory  # no circle
        self._graphs: dict[Any, _Recorded | None] = {}

    def __call__(self, *inputs: Tensor | None) -> Any:
        """What ``compute`` returns, in memory of its own."""
        with torch.cuda.device(self._memory.device):  # Triton's kernels run on the current one
            return self._on_device(inputs)

    def _on_device(self, inputs: Sequence[Tensor | None]) -> Any:
        compute: Any = self._method()
        if torch.is_autocast_enabled("cuda") or torch.cuda.is_current_stream_capturing():
            return compute(*inputs)
        key = tuple(None if each is None else (each.shape, each.dtype) for each in inputs)
        with self._memory.lock:
            if key not in self._graphs:
                self._graphs[key] = None
            elif self._graphs[key] is None:
                self._graphs[key] = self._recorded(compute, inputs)
            graph = self._graphs[key]
            if graph is not None:
                return graph.replay(inputs)
        return compute(*inputs)

    def _recorded(self, compute: Callable[..., Any], inputs: Sequence[Tensor | None]) -> _Recorded | None:
        device = torch.cuda.get_device_properties(self._memory.device)
        if self._memory.kept > _MOST_KEPT * device.total_memory:
            return None
        try:
            graph = _Recorded(compute, inputs, self._memory)
        except RuntimeError:
            # Out of memory, or an operation that cannot be recorded: what is wrong shows when it is computed.
            self._memory.kept = sys.maxsize
            return None
        self._memory.kept += graph.kept
        return graph


def replay_graphs(model: nn.Module) -> None:
    """Let a model replay CUDA graphs for images of a size that it has seen before."""
    memory = GraphMemory(next(model.parameters()).device)
    for module in model.modules():
        inner: Any = module
        if hasattr(inner, "states"):
            inner.states = _ReplayedStates(inner, model if hasattr(model, "mask_context") else None, memory)
        elif isinstance(inner, MultiScaleDetector):
            vars(inner)["encode"] = Replayed(inner.encode, memory)
        elif hasattr(inner, "replay_masks"):
            inner.replay_masks(memory)


class _ReplayedStates:
    """`DetrModel.states`, replayed where nothing but images is given.

    Args:
        model: a `DetrModel`.
        segmentation: the model around it that makes masks, if one does.
        memory: of the whole model.
    """

    def __init__(self, model: Any, segmentation: Any, memory: GraphMemory) -> None:
        self._states: Callable[..., Any] = type(model).states
        self._model = weakref.ref(model)  # which holds this: no circle
        self._segmentation = None if segmentation is None else weakref.ref(segmentation)
        self._replayed, self._memory = Replayed(self._compute, memory), memory

    def __call__(self, pixel_values: Any, pixel_mask: Any = None, **options: Any) -> Any:
        model: Any = self._model()
        asked = [*options.values(), model.config.output_attentions, model.config.output_hidden_states]
        unused = all(option is None or option is False for option in asked)
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_cuda or not unused:
            with torch.cuda.device(self._memory.device):
                return self._states(model, pixel_values, pixel_mask, **options)
        return self._replayed(pixel_values, pixel_mask)

    def _compute(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Any:
        features, outputs = self._states(self._model(), pixel_values, pixel_mask)
        if self._segmentation is None:
            return replace(features, maps=()), outputs
        segmentation: Any = self._segmentation()
        context = segmentation.mask_context(features, outputs)
        return replace(features, maps=(), mask_context=context), outputs


class _Recorded:
    """A CUDA graph, with the memory that it reads and writes.

    Args:
        compute: from tensors to dataclasses of tensors.
        inputs: of the shapes that are recorded.
        memory: where it is recorded.

    Attributes:
        kept: bytes of its inputs and results.
    """

    def __init__(
        self, compute: Callable[..., Any], inputs: Sequence[Tensor | None], memory: GraphMemory
    ) -> None:
        # Not in inference mode: nothing may be written into its tensors outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = [None if each is None else each.clone() for each in inputs]
            memory.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(memory.stream):
                compute(*self._inputs)
            torch.cuda.current_stream().wait_stream(memory.stream)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads load models and copy images meanwhile.
            with torch.cuda.graph(self._graph, memory.pool, memory.stream, capture_error_mode="thread_local"):
                self._outputs = compute(*self._inputs)
        self.kept = sum(t.nbytes for t in _tensors((tuple(self._inputs), self._outputs)))

    def replay(self, inputs: Sequence[Tensor | None]) -> Any:
        """The outputs for these inputs, in memory of their own."""
        with torch.no_grad():
            for own, given in zip(self._inputs, inputs, strict=True):
                if own is not None and given is not None:
                    own.copy_(given)
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
