"""Detect whether a forward pass is captured as a graph: tracing, export, compilation.

A captured graph does not contain Python branches on values or sizes of tensors: it takes the branch of the example
input for every input. Every such branch in this package checks `may_branch_on_values` first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def may_branch_on_values() -> bool:
    """Return whether Python code may branch on values and sizes of tensors.

    False under `torch.jit.trace` (used by `torch.onnx.export(dynamo=False)` and OpenVINO's ``convert_model``),
    `torch.export`, `torch.compile`, `torch.func` transforms, and with fake tensors, which have no values.
    """
    # is_compiling comes first: the compiler folds it to a constant and does not trace the rest.
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_all_ones(mask: Tensor) -> bool:
    """Return whether a mask is all ones. False on an accelerator, where reading the values would synchronize."""
    return mask.device.type == "cpu" and may_branch_on_values() and bool((mask != 0).all())


def check_not_capturing(what: str, instead: str) -> None:
    """Raise an error during tracing and export. `torch.compile` is allowed, since it supports graph breaks.

    Args:
        what: what cannot be exported, the subject of the error message.
        instead: what to do instead, the end of the error message.

    Raises:
        RuntimeError: `torch.jit.trace`, `torch.export` or `torch.onnx.export` is running.
    """
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if tracing or torch.compiler.is_exporting():
        raise RuntimeError(
            f"{what} cannot be traced or exported, because it depends on tensor values in Python: {instead}"
        )
