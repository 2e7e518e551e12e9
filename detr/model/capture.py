"""Whether a forward is recorded as a graph that will run on other inputs: tracing, export, compilation.

A Python branch on the value of a tensor, or on a size, is not part of such a graph: the branch that the example input
took would be taken for every input. Every such branch in this package asks here first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def may_branch_on_values() -> bool:
    """Whether Python code may branch on values and sizes of tensors.

    Not under `torch.jit.trace` (which `torch.onnx.export(dynamo=False)` and OpenVINO's ``convert_model`` use),
    `torch.export`, `torch.compile`, `torch.func` transforms, or fake tensors, which have no values.
    """
    # is_compiling first: the compiler folds it to a constant and never sees the rest.
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_all_ones(mask: Tensor) -> bool:
    """Whether a mask on the CPU is all ones; on an accelerator the answer would cost a synchronization."""
    return mask.device.type == "cpu" and may_branch_on_values() and bool((mask != 0).all())


def refuse_capture(what: str, instead: str) -> None:
    """Refuse to become part of an exported graph.

    Code that is compiled may still leave the graph and is let through.

    Args:
        what: what cannot be exported, the subject of the message.
        instead: what to do, the rest of the message.

    Raises:
        RuntimeError: `torch.jit.trace`, `torch.export` or `torch.onnx.export` is recording.
    """
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    if tracing or torch.compiler.is_exporting():
        raise RuntimeError(
            f"{what} cannot be traced or exported, since it depends on values in Python: {instead}"
        )
