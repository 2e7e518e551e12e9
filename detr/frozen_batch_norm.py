"""Batch norm that never changes, as DETR uses it in the backbone: batches are too small for statistics.

It is an affine map of each channel, so the convolution before it does it too, with a scaled weight: that saves a pass
over every activation, and another in the backward pass. Parameters and their gradients stay those of the two layers.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

TRANSFORMERS_EPS = 1e-5


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters never change, with the activation fused into it if any.

    Args:
        num_features: channels.
        eps: added to the variance.
        activation: applied to the result; timm's ``BatchNormAct2d`` carries one.

    Attributes:
        folded: the convolution before it does the affine map; only the activation is left.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, num_features: int, eps: float = TRANSFORMERS_EPS, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.act = nn.Identity() if activation is None else activation
        self.folded = False

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The affine map that this layer is: float [C] and float [C]."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C, h, w] to float [B, C, h, w] of the same dtype, also under autocast."""
        if self.folded:
            return self.act(x)
        scale, shift = (t.to(x.dtype).view(1, -1, 1, 1) for t in self.scale_and_shift())
        # addcmul keeps no activation for the backward pass, F.batch_norm would keep its input
        return self.act(torch.addcmul(shift, x, scale))


class FoldedConv2d(nn.Conv2d):
    """A convolution and the affine map of the frozen batch norm behind it, as one convolution."""

    # In a tuple: a module of its own would stand twice in the state dict.
    norm: tuple[FrozenBatchNorm2d]

    def forward(self, input: Tensor) -> Tensor:
        """Float [B, C, h, w] to float [B, C', h', w']."""
        weight, bias = self.weight_and_bias()
        if self.kernel_size == (1, 1) and _is_for_onednn(input):
            # A kernel of one pixel has nothing to spread, so the dilation changes only what torch chooses: with one
            # thread it would not have oneDNN compute this layer and its gradients, which is faster where registers are wide.
            return F.conv2d(input, weight, bias, self.stride, self.padding, 2, self.groups)
        return self._conv_forward(input, weight, bias)

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """Those of the one convolution."""
        scale, shift = self.norm[0].scale_and_shift()
        bias = shift if self.bias is None else shift + self.bias * scale
        return self.weight * scale.view(-1, 1, 1, 1), bias


def _is_for_onednn(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # nor exporting; asked first, what follows would split the graph
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
    )


def fold_into_convolutions(net: nn.Module) -> None:
    """Let every convolution that only a frozen batch norm reads do its affine map, in place.

    Names in the state dict stay. A net that cannot be traced, because its forward branches on values, is left alone.
    """
    try:
        graph = trace(net)
    except (fx.proxy.TraceError, TypeError, RuntimeError):
        return
    for node in nodes_of(graph):
        norm = called_module(net, node)
        if not isinstance(norm, FrozenBatchNorm2d):
            continue
        convolution = called_module(net, node.args[0])
        if type(convolution) is nn.Conv2d and feeds_only(graph, node.args[0], node):
            # In place, so that hooks and names stay.
            folded: Any = convolution
            folded.__class__ = FoldedConv2d
            folded.norm = (norm,)
            norm.folded = True


_TRACING = threading.Lock()


class _Tracer(fx.Tracer):
    """Convolutions and norms stay whole, and so does what timm says cannot be traced.

    While torch traces, every module in the process calls its tracer. Those of other threads, which may be answering
    requests, have to be let through.
    """

    _thread = 0  # also when everything is forgotten: another thread may still be on its way here

    def __init__(self) -> None:
        get_notrace_functions, get_notrace_modules = (
            getattr(
                sys.modules.get("timm.models"), name, tuple
            )  # without timm there is no net of timm to trace
            for name in ("get_notrace_functions", "get_notrace_modules")
        )
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._leaves = (FrozenBatchNorm2d, FoldedConv2d, *get_notrace_modules())
        self._thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def forget(self) -> None:
        """Let go of what was traced: with its graph a tracer is a circle, too."""
        kept = {"_autowrap_function_ids": self._autowrap_function_ids}
        vars(self).clear()
        vars(self).update(kept)


def trace(net: nn.Module) -> fx.Graph:
    """The calls of a timm net as a graph, which names its modules and holds none of them.

    A `torch.fx.GraphModule` would: with its graph it is a circle, which keeps a net alive until Python looks for such.

    Raises:
        torch.fx.proxy.TraceError: its forward branches on values.
    """
    with _TRACING:  # two at once would undo each other's changes in the wrong order
        tracer = _Tracer()
        try:
            return tracer.trace(net)
        finally:
            tracer.forget()


def nodes_of(graph: fx.Graph) -> list[Any]:
    """The nodes of a graph, in the order in which they are computed; Any, since fx types what they hold loosely."""
    return list(graph.nodes)


def called_module(net: nn.Module, node: Any) -> nn.Module | None:
    """The module of a net that a node calls, if it does."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return net.get_submodule(str(node.target))


def feeds_only(graph: fx.Graph, node: Any, user: Any) -> bool:
    """Whether a node's result is read by ``user`` alone, and both call modules that are called nowhere else."""
    calls = [each.target for each in nodes_of(graph) if each.op == "call_module"]
    once = all(calls.count(each.target) == 1 for each in (node, user) if each.op == "call_module")
    return list(node.users) == [user] and once


@torch.no_grad()
def freeze_batch_norm(module: nn.Module, compat: str = "original") -> None:
    """Replace every ``BatchNorm2d`` inside ``module`` by `FrozenBatchNorm2d`, in place.

    A fused activation (timm's ``BatchNormAct2d``: EfficientNet, MobileNetV3, RegNet) and the net's own eps are
    kept; ``compat="transformers"`` drops the activation and sets eps to 1e-5, as transformers does.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            if compat == "transformers":
                frozen = FrozenBatchNorm2d(child.num_features)
            else:
                frozen = FrozenBatchNorm2d(child.num_features, child.eps, getattr(child, "act", None))
            frozen.load_state_dict(
                {k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"}
            )
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child, compat)


def differs_from_transformers(module: nn.Module) -> bool:
    """Whether a frozen batch norm inside has an activation or an eps that transformers would have replaced."""
    return any(
        isinstance(m, FrozenBatchNorm2d) and (not isinstance(m.act, nn.Identity) or m.eps != TRANSFORMERS_EPS)
        for m in module.modules()
    )
