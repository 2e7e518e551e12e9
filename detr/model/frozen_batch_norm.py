"""Frozen batch norm, which DETR uses in the backbone because its batches are too small for batch statistics.

A frozen batch norm is an affine map of each channel, y = scale x + shift, with scale = weight / sqrt(running_var + eps)
and shift = bias - running_mean scale. Applied to a convolution x = W * u + b, it gives y = (scale W) * u + (scale b +
shift), which is another convolution. Folding the norm into the convolution thus saves a pass over every activation, and
another one in the backward pass. The gradient of W flows through the product scale W.

`ConvolutionFolding` folds while a backbone runs. It does not change the module tree: layers keep their parameters,
gradients, copies and file format.
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
    """Batch norm with constant statistics and affine parameters, and an optional fused activation.

    Args:
        num_features: number of channels.
        eps: added to the variance.
        activation: applied to the result; that of timm's ``BatchNormAct2d``.
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
        """Return scale and shift of the affine map, float [C] each."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        """Normalize float [B, C, h, w]. The result has the dtype of the input, also under autocast."""
        if (
            not torch.compiler.is_compiling()
            and _ACTIVE.folded is not None
            and _ACTIVE.folded.pop_result(self, x)
        ):
            return self.act(x)
        scale, shift = (t.to(x.dtype).view(1, -1, 1, 1) for t in self.scale_and_shift())
        # addcmul stores no activation for the backward pass; F.batch_norm would store its input
        return self.act(torch.addcmul(shift, x, scale))


def fold(convolution: nn.Conv2d, norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the convolution that equals both layers; see the equation at the top of this module."""
    scale, shift = norm.scale_and_shift()
    bias = shift if convolution.bias is None else shift + convolution.bias * scale
    return convolution.weight * scale.view(-1, 1, 1, 1), bias


class ConvolutionFolding:
    """Fold frozen batch norms of a network into the convolutions before them, while the network runs.

    At each call, the pairs of convolution and norm are determined from the current module tree. Nothing is folded if a
    call is intercepted (by a hook, a ``forward`` of an instance or a compiled module) or if the network cannot be
    traced. Layers can therefore be replaced, wrapped, copied and saved as in any torch network.
    """

    def __init__(self) -> None:
        self._cached: tuple[list[Any], list[tuple[nn.Conv2d, FrozenBatchNorm2d]]] = ([], [])

    def __reduce__(self) -> tuple[type[ConvolutionFolding], tuple[()]]:
        """Copy without the cached pairs: a copy belongs to another network."""
        return type(self), ()

    def running(self, net: nn.Module) -> AbstractContextManager[Any]:
        """Return a context in which a call of ``net`` in this thread folds its norms."""
        # A replica of DataParallel has different modules in every forward.
        is_replica = getattr(net, "_is_replica", False)
        structure = structure_of(net) if may_branch_on_values() and not is_replica else None
        if structure is None:
            return nullcontext()
        cached, pairs = self._cached
        if len(cached) != len(structure) or not all(a is b for a, b in zip(cached, structure, strict=True)):
            graph = trace(net, (FrozenBatchNorm2d,))
            pairs = (
                []
                if graph is None
                else [(convolution, norm) for _, convolution, norm in foldable_pairs(net, graph)]
            )
            self._cached = structure, pairs
        return _FoldedConvolutions(pairs) if pairs else nullcontext()


class _FoldedConvolutions(TorchFunctionMode):
    """Compute the convolution of each pair with the folded weight; the norm of the pair then returns its input.

    A torch function mode is local to its thread, and intercepts convolutions wherever they are called.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Conv2d, FrozenBatchNorm2d]]) -> None:
        super().__init__()
        layers_of_weight = Counter(id(convolution.weight) for convolution, _ in pairs)
        # A convolution is recognized by its weight. A weight shared by two layers is ambiguous and is not folded.
        self._pairs = {
            id(pair[0].weight): pair for pair in pairs if layers_of_weight[id(pair[0].weight)] == 1
        }
        self._results: dict[nn.Module, Tensor] = {}
        self._hooks = _saved_tensor_hooks()
        self._outer: _FoldedConvolutions | None = None

    def __enter__(self) -> _FoldedConvolutions:
        self._outer, _ACTIVE.folded = _ACTIVE.folded, self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.folded = self._outer
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self._results and error[0] is None:
            raise _changed_result(next(iter(self._results)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        pair = self._pairs.get(id(args[1])) if func is F.conv2d and len(args) == 7 else None
        # Inside activation checkpointing, the layers are called again in the backward pass, outside this context, and
        # must save the same tensors as here. Changed hooks of saved tensors show that checkpointing is active.
        if pair is None or _saved_tensor_hooks() != self._hooks:
            return func(*args, **(kwargs or {}))
        x, _, _, stride, padding, dilation, groups = args
        convolution, norm = pair
        weight, bias = fold(convolution, norm)
        if convolution.kernel_size == (1, 1) and _is_for_onednn(x):
            # A dilation does not change the result of a 1 x 1 kernel, only the implementation that torch chooses. With
            # one thread, `ConvParams::use_mkldnn` (aten/src/ATen/native/Convolution.cpp) does not use oneDNN for such a
            # kernel with stride 1, dilation 1 and a batch below 16. oneDNN is faster on CPUs with wide registers
            # (AVX-512), in the forward and the backward pass.
            dilation = 2
        result = self._results[norm] = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return result

    def pop_result(self, norm: FrozenBatchNorm2d, x: Tensor) -> bool:
        """Return whether ``x`` is the result of a convolution with ``norm`` folded into it, and forget that result."""
        result = self._results.pop(norm, None)
        if result is not None and result is not x:
            raise _changed_result(norm)
        return result is not None


class _Active(threading.local):
    folded: _FoldedConvolutions | None = None


_ACTIVE = _Active()


def _saved_tensor_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _changed_result(norm: nn.Module) -> RuntimeError:
    return RuntimeError(
        f"the backbone's forward changed the result of a convolution before {norm}, which it did not do when it was "
        "traced: register a forward hook on that convolution to disable folding"
    )


def _is_for_onednn(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
    )


def foldable_pairs(net: nn.Module, graph: fx.Graph) -> list[tuple[Any, nn.Conv2d, FrozenBatchNorm2d]]:
    """Find the convolutions whose only reader is a frozen batch norm: (node of the norm, convolution, norm)."""
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

    The eps and a fused activation (timm's ``BatchNormAct2d``: EfficientNet, MobileNetV3, RegNet) are preserved.
    ``compat="transformers"`` drops the activation and sets eps to 1e-5, as transformers does.
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
                    frozen.register_buffer(key, tensor.detach().clone())  # stays on its device, such as meta
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child, compat)


def differs_from_transformers(modules: Iterable[nn.Module]) -> bool:
    """Return whether a frozen batch norm among the modules has an activation or an eps that transformers would drop."""
    return any(
        isinstance(m, FrozenBatchNorm2d) and (not isinstance(m.act, nn.Identity) or m.eps != TRANSFORMERS_EPS)
        for m in modules
    )
