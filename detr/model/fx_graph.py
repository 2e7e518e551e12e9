"""Trace the module calls of a network with torch.fx, and query the resulting graph."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from torch import fx, nn

_TRACING = threading.Lock()


class _Tracer(fx.Tracer):
    """Tracer that does not trace into the given layers, nor into what timm declares untraceable.

    While torch traces, module calls of all threads of the process go to its tracer. Calls of other threads, which may
    be serving requests, must run normally.
    """

    _thread = 0  # class attribute, valid also after `release`: another thread may still call this tracer

    def __init__(self, leaves: tuple[type[nn.Module], ...] = ()) -> None:
        timm = sys.modules.get("timm.models")  # if it is not imported, the network is not timm's
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

    def release(self) -> None:
        """Drop references to what was traced: a tracer and its graph form a reference cycle."""
        needed = {"_autowrap_function_ids": self._autowrap_function_ids}
        vars(self).clear()
        vars(self).update(needed)


def trace(net: nn.Module, leaves: tuple[type[nn.Module], ...]) -> fx.Graph | None:
    """Trace the calls of a network into a graph that refers to modules by name only.

    A `torch.fx.GraphModule` would hold the modules themselves. With its graph it forms a reference cycle, which keeps
    the network in memory until Python's garbage collector runs.

    Args:
        net: the network.
        leaves: types of layers that become one node each, like the layers of torch.

    Returns:
        None if the network cannot be traced: its forward branches on values, or a custom layer needs real tensors.
    """
    with _TRACING:  # concurrent traces would restore torch's patched functions in the wrong order
        tracer = _Tracer(leaves)
        try:
            return tracer.trace(net)
        except Exception:  # layers called with proxies in place of tensors can raise anything
            return None
        finally:
            tracer.release()


def nodes_of(graph: fx.Graph) -> list[Any]:
    """Return the nodes of a graph in execution order; typed as Any because fx types the attributes of nodes loosely."""
    return list(graph.nodes)


def called_module(net: nn.Module, node: Any) -> nn.Module | None:
    """Return the module that a node calls, or None if the node does not call a module."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return net.get_submodule(str(node.target))


def feeds_only(graph: fx.Graph, node: Any, user: Any) -> bool:
    """Return whether ``user`` is the only reader of a node's result, and the modules of both are called only once."""
    calls = [each.target for each in nodes_of(graph) if each.op == "call_module"]
    called_once = all(calls.count(each.target) == 1 for each in (node, user) if each.op == "call_module")
    return list(node.users) == [user] and called_once
