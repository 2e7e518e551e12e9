"""Whether modules are what their types say: what may be computed in another way, and what has to be called."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn


def intervenes(module: nn.Module) -> bool:
    """Whether a call of this module does more than its class's ``forward``: hooks, or a ``forward`` of its own."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or module._compiled_call_impl is not None
        or "forward" in vars(module)
    )


def is_plain_tree(module: nn.Module, kinds: Collection[type[nn.Module]]) -> bool:
    """Whether a module and all in it are of exactly these types, and nothing intervenes in their calls.

    A layer that was replaced, wrapped (LoRA), parametrized or quantized has another type.
    """
    return all(type(each) in kinds and not intervenes(each) for each in module.modules())


def structure_of(net: nn.Module) -> list[Any] | None:
    """What decides which layers a net calls: its modules and their code. None where something intervenes in a call."""
    if nn.modules.module._has_any_global_hook():
        return None
    structure: list[Any] = []
    for module in net.modules():
        if intervenes(module):
            return None
        structure += (module, type(module), type(module).forward)
    return structure
