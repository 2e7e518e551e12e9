"""Check whether a module does exactly what its type does, so that its computation may be replaced or fused."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn


def is_intercepted(module: nn.Module) -> bool:
    """Return whether a call does more than the ``forward`` of the class: hooks, compilation, or an own ``forward``."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or module._compiled_call_impl is not None
        or "forward" in vars(module)
    )


def is_plain_tree(module: nn.Module, kinds: Collection[type[nn.Module]]) -> bool:
    """Return whether a module and all its submodules have exactly these types, and no call is intercepted.

    A layer that was replaced, wrapped (LoRA), parametrized or quantized has another type.
    """
    return all(type(each) in kinds and not is_intercepted(each) for each in module.modules())


def structure_of(net: nn.Module) -> list[Any] | None:
    """Return the modules of a network with their types and ``forward`` functions, to detect changes of the network.

    Returns:
        None if a call of any module is intercepted.
    """
    if nn.modules.module._has_any_global_hook():
        return None
    structure: list[Any] = []
    for module in net.modules():
        if is_intercepted(module):
            return None
        structure += (module, type(module), type(module).forward)
    return structure
