"""Graphs of the module calls of a net, made by torch.fx, and what is asked of them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from torch import fx, nn

_TRACING = threading.Lock()


class _Tracer(fx.Tracer):
    """Keeps the given layers whole, and what timm says cannot be traced.

    While torch traces, every module in the process calls its tracer. Those of other threads, which may be answering
    requests, have to be let through.
    """

    _thread = 0  # also when everything is forgotten: another thread may still be on its way here

    def __init__(self, leaves: tuple[type[nn.Module], ...]) -> None:
        timm = sys.modules.get("timm.models")  # without it there is no net of timm to trace
        get_notrace_functions, get_notrace_modules = (
            getattr(timm, name, tuple) for name in ("get_notrace_functions", "get_notrace_modules")
        )
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._leaves = (*leaves, *get_notrace_modules())
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


def trace(net: nn.Module, leaves: tuple[type[nn.Module], ...]) -> fx.Graph | None:
    """The calls of a timm net as a graph, which names its modules and holds none of them.

    A `torch.fx.GraphModule` would: with its graph it is a circle, which keeps a net alive until Python looks for such.

    Args:
        net: the net.
        leaves: layers that are one node each, as torch's own are.

    Returns:
        None where the net cannot be traced: its forward branches on values, or a layer of the user's needs tensors.
    """
    with _TRACING:  # two at once would undo each other's changes in the wrong order
        tracer = _Tracer(leaves)
        try:
            return tracer.trace(net)
        except Exception:  # of any code, which was called without tensors
            return None
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
