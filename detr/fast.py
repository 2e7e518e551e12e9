"""A model for inference: the same class and outputs, and a backbone that is one graph of folded convolutions.

What is done, and why it changes no result beyond rounding:

- A frozen batch norm is an affine map of each channel, so it is folded into the convolution before it.
- Weights and activations are channels-last, which is what convolutions read fastest.
- On a CPU each convolution is oneDNN's own, with its weight packed once and with the ReLU and the addition that follow
  it done while its result is still in a register.

The plain model beside it is the test (`tests/detr/test_fast.py`).
"""

from __future__ import annotations

import copy
import operator
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from detr.backbone import ConvEncoder
from detr.frozen_batch_norm import FoldedConv2d, FrozenBatchNorm2d, called_module, feeds_only, nodes_of, trace

M = TypeVar("M", bound=nn.Module)


def optimized(model: M, pack: bool = True) -> M:
    """A copy of ``model`` that is faster in inference: see the file's docstring.

    It is in evaluation mode, has no gradients, stays on its device and cannot be saved. A backbone that cannot be traced (its forward
    branches on values) stays as it is.

    Args:
        model: a DETR model, on its device and in its dtype. On a CPU, float32 gains most.
        pack: False leaves the convolutions to torch, for a model that will run under autocast, which does not reach
            packed ones.
    """
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    for module in fast.modules():
        if isinstance(module, ConvEncoder):
            module.model = _fast_backbone(module.model, pack)
    return fast


def is_optimized(model: nn.Module) -> bool:
    """Whether a model comes from `optimized`."""
    return any(isinstance(module, _Backbone) for module in model.modules())


class _Backbone(nn.Module):
    """A graph that wants its images channels-last."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph

    def forward(self, pixel_values: Tensor) -> Any:
        return self.graph_module(pixel_values.contiguous(memory_format=torch.channels_last))


@torch.no_grad()
def _fast_backbone(net: nn.Module, pack: bool) -> nn.Module:
    try:
        graph = fx.GraphModule(net, trace(net))
    except (fx.proxy.TraceError, TypeError, RuntimeError):
        return net
    _fold_batch_norms(graph)
    graph.to(memory_format=torch.channels_last)
    if pack and next(net.parameters()).device.type == "cpu" and torch.backends.mkldnn.is_available():
        _pack_convolutions(graph)
    graph.graph.lint()
    graph.recompile()
    graph.graph.owning_module = None  # no circle: a model that nobody holds is freed at once
    return _Backbone(graph)


def _fold_batch_norms(graph: fx.GraphModule) -> None:
    """Convolutions take their norm's weight and bias for good, and what then does nothing is left out."""
    for node in nodes_of(graph.graph):
        module = called_module(graph, node)
        if isinstance(module, FoldedConv2d):
            convolution: Any = module
            weight, bias = module.weight_and_bias()
            convolution.weight, convolution.bias = (nn.Parameter(t.clone(), False) for t in (weight, bias))
            convolution.__class__ = nn.Conv2d
        elif isinstance(module, FrozenBatchNorm2d) and module.folded:
            graph.set_submodule(str(node.target), module.act)
    for node in nodes_of(graph.graph):
        if type(called_module(graph, node)) is nn.Identity:
            _replace(graph, node, node.args[0])


# The activations that oneDNN does within a convolution: its name, and the numbers it needs.
_ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}


class _PackedConv2d(nn.Module):
    """A convolution of oneDNN with a packed weight, and what is done to its result before it is stored.

    oneDNN chooses how a weight is packed by the size of the input, and a weight that is packed for another is packed
    anew in every call, which can cost more than the convolution. There are few ways, so each is kept.

    Args:
        convolution: float32, on the CPU.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        padding, strides, dilation = convolution.padding, convolution.stride, convolution.dilation
        self._arguments = (list(padding), list(strides), list(dilation), convolution.groups)
        self._weight, self._bias = convolution.weight.detach().contiguous(), convolution.bias
        self._by_shape: dict[torch.Size, Tensor] = {}
        self._by_layout: dict[bytes, Tensor] = {}
        self.activation: tuple[str, list[float]] = ("none", [])
        """Of the result; of the sum where there is another input."""

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


def _pack_convolutions(graph: fx.GraphModule) -> None:
    """Convolutions become oneDNN's, with the additions and activations that follow them."""
    for node in nodes_of(graph.graph):
        convolution: Any = called_module(graph, node)
        plain = type(convolution) is nn.Conv2d and convolution.padding_mode == "zeros"
        if plain and not isinstance(convolution.padding, str) and convolution.weight.dtype == torch.float32:
            graph.set_submodule(str(node.target), _PackedConv2d(convolution))
    order = {node: number for number, node in enumerate(nodes_of(graph.graph))}
    for node in nodes_of(graph.graph):
        if node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add):
            _fuse_addition(graph, node, order)
            continue
        kind, source = type(called_module(graph, node)), node.args[0] if node.args else None
        packed = called_module(graph, source)
        if (
            kind in _ACTIVATIONS
            and isinstance(packed, _PackedConv2d)
            and feeds_only(graph.graph, source, node)
        ):
            packed.activation = _ACTIVATIONS[kind]
            _replace(graph, node, source)


def _fuse_addition(graph: fx.GraphModule, addition: Any, order: dict[Any, int]) -> None:
    """Let a convolution that feeds a sum add to the other input in place, if nothing else reads that afterwards."""
    first, second = addition.args
    for node, other in ((first, second), (second, first)):
        packed = called_module(graph, node)
        if (
            not isinstance(packed, _PackedConv2d)
            or len(node.args) > 1
            or not feeds_only(graph.graph, node, addition)
        ):
            continue
        # Readers that are convolutions have results of their own; anything else might be a view, or the output.
        readers = [user for user in getattr(other, "users", ()) if user is not addition]
        done = all(
            order[user] < order[addition] and isinstance(called_module(graph, user), _PackedConv2d)
            for user in readers
        )
        if not isinstance(called_module(graph, other), _PackedConv2d | nn.MaxPool2d) or not done:
            continue
        with graph.graph.inserting_before(addition):
            fused = graph.graph.call_module(node.target, (node.args[0], other))
        order[fused] = order[addition]
        _replace(graph, addition, fused)
        graph.graph.erase_node(node)
        return


def _replace(graph: fx.GraphModule, node: Any, by: Any) -> None:
    node.replace_all_uses_with(by)
    graph.graph.erase_node(node)
