"""Batch norm that never changes, as DETR uses it in the backbone: batches are too small for statistics.

It is an affine map of each channel, so the convolution before it can do it too, with a scaled weight: that saves a pass
over every activation, and another in the backward pass. `ConvolutionFolding` does so while a backbone runs. The module
tree stays one of plain layers, whose parameters, gradients, copies and files are those of the layers.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from detr.model.capture import may_branch_on_values
from detr.model.fx_graph import called_module, feeds_only, nodes_of, trace
from detr.model.plain_layers import structure_of

TRANSFORMERS_EPS = 1e-5


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters never change, with the activation fused into it if any.

    Args:
        num_features: channels.
        eps: added to the variance.
        activation: applied to the result; timm's ``BatchNormAct2d`` carries one.
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

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The affine map that this layer is: float [C] and float [C]."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C, h, w] to float [B, C, h, w] of the same dtype, also under autocast."""
        if (
            not torch.compiler.is_compiling()
            and _RUNNING.folded is not None
            and _RUNNING.folded.take(self, x)
        ):
            return self.act(x)
        scale, shift = (t.to(x.dtype).view(1, -1, 1, 1) for t in self.scale_and_shift())
        # addcmul keeps no activation for the backward pass, F.batch_norm would keep its input
        return self.act(torch.addcmul(shift, x, scale))


def fold(convolution: nn.Conv2d, norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that does the work of both layers."""
    scale, shift = norm.scale_and_shift()
    bias = shift if convolution.bias is None else shift + convolution.bias * scale
    return convolution.weight * scale.view(-1, 1, 1, 1), bias


class ConvolutionFolding:
    """Lets the convolutions of a net do the work of the frozen batch norms behind them, while the net runs.

    Whether a convolution and a norm belong together is asked of the modules that are in the tree at each call. Where
    anything intervenes (a hook, a forward of an instance, a compiled module, a net that cannot be traced), the net
    runs as it is. So layers can be replaced, wrapped, copied and saved as in any net of torch.
    """

    def __init__(self) -> None:
        self._known: tuple[list[Any], list[tuple[nn.Conv2d, FrozenBatchNorm2d]]] = ([], [])

    def __reduce__(self) -> tuple[type[ConvolutionFolding], tuple[()]]:
        """A copy, which belongs to another net, finds its pairs itself."""
        return type(self), ()

    def running(self, net: nn.Module) -> AbstractContextManager[Any]:
        """A context in which to call ``net``, in this thread."""
        # A replica of DataParallel has other modules in every forward.
        is_replica = getattr(net, "_is_replica", False)
        structure = structure_of(net) if may_branch_on_values() and not is_replica else None
        if structure is None:
            return nullcontext()
        known, pairs = self._known
        if len(known) != len(structure) or not all(a is b for a, b in zip(known, structure, strict=True)):
            graph = trace(net, (FrozenBatchNorm2d,))
            pairs = (
                []
                if graph is None
                else [(convolution, norm) for _, convolution, norm in foldable_pairs(net, graph)]
            )
            self._known = structure, pairs
        return _FoldedConvolutions(pairs) if pairs else nullcontext()


class _FoldedConvolutions(TorchFunctionMode):
    """Computes the convolution of each pair with the folded weight, and hands the result to its norm.

    A mode of torch is local to its thread, and sees the convolutions wherever they are called.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Conv2d, FrozenBatchNorm2d]]) -> None:
        super().__init__()
        tensors = Counter(id(convolution.weight) for convolution, _ in pairs)
        # A weight that two layers share does not say which of them is called.
        self._pairs = {id(pair[0].weight): pair for pair in pairs if tensors[id(pair[0].weight)] == 1}
        self._results: dict[nn.Module, Tensor] = {}
        self._hooks = _saved_tensor_hooks()
        self._before: _FoldedConvolutions | None = None

    def __enter__(self) -> _FoldedConvolutions:
        self._before, _RUNNING.folded = _RUNNING.folded, self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _RUNNING.folded = self._before
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self._results and error[0] is None:
            raise _lost(next(iter(self._results)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pair = self._pairs.get(id(args[1])) if func is F.conv2d and len(args) == 7 else None
        # Within activation checkpointing the layers are called again in the backward pass, outside of this context, and
        # have to save the same tensors there.
        if pair is None or _saved_tensor_hooks() != self._hooks:
            return func(*args, **(kwargs or {}))
        x, _, _, stride, padding, dilation, groups = args
        convolution, norm = pair
        weight, bias = fold(convolution, norm)
        if convolution.kernel_size == (1, 1) and _is_for_onednn(x):
            # A kernel of one pixel has nothing to spread, so the dilation changes only what torch chooses: with one
            # thread it would not have oneDNN compute this layer and its gradients, which is faster where registers are wide.
            dilation = 2
        result = self._results[norm] = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return result

    def take(self, norm: FrozenBatchNorm2d, x: Tensor) -> bool:
        """Whether ``x`` is the result of a convolution that did the work of ``norm``."""
        result = self._results.pop(norm, None)
        if result is not None and result is not x:
            raise _lost(norm)
        return result is not None


class _Running(threading.local):
    folded: _FoldedConvolutions | None = None


_RUNNING = _Running()


def _saved_tensor_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _lost(norm: nn.Module) -> RuntimeError:
    return RuntimeError(
        f"the backbone's forward changed the result of a convolution before its {norm}, which it did not do when it was "
        "traced: register a forward hook on that convolution, so that both layers are computed one after the other"
    )


def _is_for_onednn(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
    )


def foldable_pairs(net: nn.Module, graph: fx.Graph) -> list[tuple[Any, nn.Conv2d, FrozenBatchNorm2d]]:
    """Convolutions that only a frozen batch norm reads: the norm's node, the convolution and the norm."""
    pairs = []
    for node in nodes_of(graph):
        norm = called_module(net, node)
        if type(norm) is not FrozenBatchNorm2d:
            continue
        convolution = called_module(net, node.args[0])
        if type(convolution) is nn.Conv2d and feeds_only(graph, node.args[0], node):
            pairs.append((node, convolution, norm))
    return pairs


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
            for key in ("weight", "bias", "running_mean", "running_var"):
                tensor = getattr(child, key)
                if tensor is not None:  # a norm without affine parameters
                    frozen.register_buffer(key, tensor.detach().clone())  # on its own device, such as meta
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child, compat)


def differs_from_transformers(modules: Iterable[nn.Module]) -> bool:
    """Whether a frozen batch norm among them has an activation or an eps that transformers would have replaced."""
    return any(
        isinstance(m, FrozenBatchNorm2d) and (not isinstance(m.act, nn.Identity) or m.eps != TRANSFORMERS_EPS)
        for m in modules
    )
