"""Optimize a model for inference: the same class and outputs, with a backbone that is one graph of fused convolutions.

The optimized model is a copy whose parts are faster modules, each built from the plain part. OpenVINO and CUDA graphs
are engines (`detr.model.engine`) that the copy holds.

The optimizations, none of which changes results beyond rounding:

- Frozen batch norms are folded into the preceding convolutions, since they are affine per channel.
- Weights and activations are channels-last, the fastest memory format for convolutions.
- Convolutions include the ReLU and the addition that follow, while the result is still in registers: with oneDNN on a
  CPU (`detr.inference.onednn`, also for linear layers), with cuDNN on a GPU (`detr.inference.cuda`).
- The convolutions and linear layers of the multi-scale architecture use oneDNN too.
- The first self-attention of the decoder is a precomputed constant, and all decoder layers share one product for keys
  and one for values (`detr.inference.decoder`).
- The mask head computes repeated pixels of enlarged maps only once (`detr.inference.mask_head`).
- With ``engine="openvino"``, OpenVINO computes the backbone and the transformer on a CPU (`detr.inference.openvino`).
- On a GPU, float32 layers run on tensor cores (`detr.inference.triton_tf32x3`), the mask head has custom kernels
  (`detr.inference.triton_mask_head`), and the model is replayed as CUDA graphs (`detr.inference.cuda_graphs`).

`tests/detr/inference/test_optimize.py` compares the optimized model with the plain one.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, fx, nn

from detr.config import EngineName
from detr.inference.cuda import (
    CudnnConv2d,
    SpaceToDepthConv2d,
    gpu_mask_head,
    use_fast_layers,
    use_gpu_kernels,
)
from detr.inference.cuda_graphs import replay_graphs
from detr.inference.decoder import FastDecoder
from detr.inference.mask_head import FastMaskHead
from detr.inference.onednn import OneDnnConv2d, pack_layers
from detr.inference.openvino import compute_with_openvino, uses_openvino
from detr.model.attention import MultiheadAttention
from detr.model.backbone import ConvEncoder
from detr.model.capture import check_not_capturing
from detr.model.engine import OptimizableModel, WithEngine
from detr.model.frozen_batch_norm import FrozenBatchNorm2d, fold, foldable_pairs
from detr.model.fx_graph import called_module, feeds_only, nodes_of, trace
from detr.model.mask_head import MaskHead
from detr.model.multiscale.decoder import RefiningLayer
from detr.model.multiscale.dense_head import DenseHead
from detr.model.multiscale.hybrid_encoder import HybridEncoder, PositionNorm, SeparableConvolution
from detr.model.multiscale.masks import MultiScaleMaskHead
from detr.model.plain_layers import is_plain_tree, structure_of
from detr.model.transformer import Decoder, DecoderLayer, Encoder, EncoderLayer

M = TypeVar("M", bound=OptimizableModel)
_FUSED: tuple[type[OneDnnConv2d] | type[CudnnConv2d], ...] = (OneDnnConv2d, CudnnConv2d)
_TRANSFORMER = {Encoder, Decoder, EncoderLayer, DecoderLayer, MultiheadAttention}
_TRANSFORMER_LAYERS = {*_TRANSFORMER, nn.ModuleList, nn.Linear, nn.LayerNorm}
_MASK_LAYERS = {MaskHead, nn.Conv2d, nn.GroupNorm}


def optimized(
    model: M, pack: bool = True, dtype: torch.dtype | None = None, engine: EngineName = "torch"
) -> M:
    """Return a copy of ``model`` that is faster in inference: see the docstring of this module.

    ``model`` is not modified and shares no weights with the copy. The copy is in evaluation mode and has no gradients. Parts that are not plain layers of this package are not
    optimized: a backbone that cannot be traced, and an encoder, decoder or mask head in which a layer has a hook or was
    replaced, wrapped (LoRA), parametrized or quantized. A model that is already optimized is returned itself.

    The copy cannot be saved, load other weights, change its dtype or device, or be traced or exported (on a CPU,
    ``pack=False`` allows export). With OpenVINO or on a GPU it cannot be copied or pickled either. Each attempt raises
    an error that says what to do instead.

    Args:
        model: a DETR model, on its device and in its dtype. On a CPU, float32 gains most.
        pack: False leaves the convolutions to torch, for a model that will run under autocast: autocast does not affect
            packed layers.
        dtype: of everything but the heads for classes and boxes. The heads are a thousandth of the work, and bfloat16
            boxes are off by pixels, so they keep their dtype. None keeps all dtypes.
        engine: "openvino" lets OpenVINO compute the backbone and the transformer. It takes some seconds to prepare and
            a second copy of the weights.

    Raises:
        ValueError: the model is already optimized in another dtype or without the engine, the engine is unknown, or the
            engine cannot compute this model.
        ImportError: the engine is not installed.
    """
    if engine not in get_args(EngineName):
        raise ValueError(f"engine={engine!r}: expected one of {list(get_args(EngineName))}")
    if is_optimized(model):
        own = next(tensor.dtype for name, tensor in model.named_parameters() if not _is_head_parameter(name))
        if dtype not in (None, own):
            raise ValueError(
                f"optimize(dtype={dtype}): the model is already optimized in {own}: call optimize() of the original model"
            )
        if engine == "openvino" and not uses_openvino(model):
            raise ValueError(
                f"optimize(engine={engine!r}): the model is already optimized: call optimize() of the original model"
            )
        return model
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    for module in fast.modules():
        if isinstance(module, WithEngine):
            module.engine = None  # that of a compiled model would compute the original model
        if isinstance(module, ConvEncoder):
            net = _fast_backbone(module.model, pack, dtype)
            if net is not module.model:
                module.model, module.folding = net, None
    stacks: list[Any] = []
    for name, module in [*fast.named_modules()]:
        if isinstance(module, Encoder | Decoder) and is_plain_tree(module, _TRANSFORMER_LAYERS):
            if isinstance(module, Decoder) and len(module.layers):
                fast.set_submodule(name, FastDecoder(module))
            stacks.append(fast.get_submodule(name))
    on_gpu = pack and next(fast.parameters()).device.type == "cuda"
    for name, module in [*fast.named_modules()]:
        if isinstance(module, MaskHead) and is_plain_tree(module, _MASK_LAYERS):
            fast.set_submodule(name, gpu_mask_head(module) if on_gpu else FastMaskHead(module))
    if dtype is not None:
        _convert(fast, dtype)
    if on_gpu:
        use_fast_layers(stacks)
        replay_graphs(fast)
    elif pack:
        pack_layers(fast, [*stacks, *_multi_scale_layers(fast)])
    if engine == "openvino":
        compute_with_openvino(fast, optimized(model, pack=False), dtype)
    for module in fast.modules():
        if isinstance(module, OptimizableModel):
            module.is_optimized = True
    fast.register_load_state_dict_pre_hook(_refuse_weights)  # type: ignore[no-untyped-call]
    return fast


def _multi_scale_layers(model: nn.Module) -> list[nn.Module]:
    """Return the parts of the multi-scale architecture, other than transformer encoders, that consist of plain layers."""
    kinds = {*_TRANSFORMER_LAYERS, SeparableConvolution, nn.Sequential, nn.Conv2d, PositionNorm}
    parts: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, HybridEncoder):
            parts += (module.projections, module.fusions)
        elif isinstance(module, DenseHead):
            parts += (module.class_tower, module.box_tower)
        elif isinstance(module, RefiningLayer):
            parts.append(module.layer)
        elif isinstance(module, MultiScaleMaskHead):
            parts.append(module.tower)
    return [part for part in parts if is_plain_tree(part, kinds)]


def is_optimized(model: nn.Module) -> bool:
    """Return whether a model, or a model inside it, was returned by `optimized`."""
    return any(isinstance(module, OptimizableModel) and module.is_optimized for module in model.modules())


def check_conversion(model: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Raise an error if a conversion of an optimized model would change the dtype or device of its tensors.

    Packed weights are not parameters, so a conversion would not reach them.

    Args:
        model: from `optimized`.
        function: conversion of a tensor, as `torch.nn.Module.to` creates it.

    Raises:
        ValueError: the function changes the dtype or device of a parameter.
    """
    for own in {(tensor.dtype, tensor.device): tensor for tensor in model.parameters()}.values():
        given = function(torch.empty(0, dtype=own.dtype, device=own.device))
        if (given.dtype, given.device) != (own.dtype, own.device):
            raise ValueError(
                f"this model comes from optimize() and stays {own.dtype} on {own.device}, it cannot become {given.dtype} "
                f"on {given.device}: convert the original model and optimize it again"
            )


def _refuse_weights(*_: Any) -> None:
    # Folded and packed layers do not store weights under the names of the original, so they would keep the old weights.
    raise ValueError(
        "this model comes from optimize() and cannot load other weights: load them into the original model and optimize "
        "it again"
    )


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not _is_head_parameter(name):
            tensor.data = tensor.data.to(dtype)


def _is_head_parameter(name: str) -> bool:
    return not {"class_labels_classifier", "bbox_predictor"}.isdisjoint(name.split("."))


class _Backbone(nn.Module):
    """A graph of fused convolutions. It converts images to channels-last, unless its first convolution does so."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph
        self._is_packed = any(isinstance(module, _FUSED) for module in graph.modules())
        self._reorders_itself = any(isinstance(module, SpaceToDepthConv2d) for module in graph.modules())

    def forward(self, pixel_values: Tensor) -> Any:
        if self._is_packed:
            check_not_capturing(
                "a model from optimize()", "export the original model, or optimize(pack=False)"
            )
        if not self._reorders_itself:
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return self.graph_module(pixel_values)


@torch.no_grad()
def _fast_backbone(net: nn.Module, pack: bool, dtype: torch.dtype | None) -> nn.Module:
    calls = None if structure_of(net) is None else trace(net, (FrozenBatchNorm2d,))
    if calls is None:
        return net
    graph = fx.GraphModule(net, calls)
    _fold_batch_norms(graph)  # before the conversion of dtype, so that weights are rounded once
    if dtype is not None:
        graph.to(dtype)
    graph.to(memory_format=torch.channels_last)
    first = next(net.parameters())
    for kind in _FUSED:
        if pack and kind.fits(first):
            _fuse_convolutions(graph, kind)
    if pack and first.device.type == "cuda":
        use_gpu_kernels(graph)
    graph.graph.lint()
    graph.recompile()
    graph.graph.owning_module = None  # avoid a reference cycle, so that an unused model is freed immediately
    return _Backbone(graph)


def _fold_batch_norms(graph: fx.GraphModule) -> None:
    """Fold batch norms into the weight and bias of their convolutions, and remove layers that have become identities."""
    for node, convolution, norm in foldable_pairs(graph, graph.graph):
        weight, bias = fold(convolution, norm)
        convolution.weight, convolution.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        graph.set_submodule(str(node.target), norm.act)
    for node in nodes_of(graph.graph):
        if type(called_module(graph, node)) is nn.Identity:
            _replace(graph, node, node.args[0])


def _fuse_convolutions(graph: fx.GraphModule, kind: Any) -> None:
    """Replace convolutions by those of a library, and fuse the following additions and activations into them.

    Args:
        graph: of a backbone.
        kind: one of the classes in `_FUSED`.
    """
    for node in nodes_of(graph.graph):
        convolution: Any = called_module(graph, node)
        plain = type(convolution) is nn.Conv2d and convolution.padding_mode == "zeros"
        if plain and not isinstance(convolution.padding, str) and kind.fits(convolution.weight):
            graph.set_submodule(str(node.target), kind(convolution))
    order = {node: number for number, node in enumerate(nodes_of(graph.graph))}
    for node in nodes_of(graph.graph):
        if node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add):
            _fuse_addition(graph, node, order)
            continue
        activation, source = type(called_module(graph, node)), node.args[0] if node.args else None
        fused = called_module(graph, source)
        if (
            isinstance(fused, _FUSED)
            and activation in fused.ACTIVATIONS
            and feeds_only(graph.graph, source, node)
        ):
            fused.activation = fused.ACTIVATIONS[activation]
            _replace(graph, node, source)


def _fuse_addition(graph: fx.GraphModule, addition: Any, order: dict[Any, int]) -> None:
    """Replace ``convolution(x) + other`` by one call, ``convolution(x, other)``.

    oneDNN accumulates into the memory of ``other`` and returns it, which saves writing and reading the result of the
    convolution. The call takes the place of the addition in the graph. This is safe if all of these hold:

    1. Only the addition reads ``convolution(x)``, which no longer exists afterwards. The convolution has no second input
       yet.
    2. ``other`` was allocated by a fused convolution or a max pool. Anything else may be the input of the network, or a
       view of memory that is still needed.
    3. Every other reader of ``other`` runs before the addition and is a fused convolution, whose result is in memory of
       its own. Any other reader might be a view of ``other``, or the output of the network.

    If ``other`` is itself a convolution without activation that feeds only this addition, (W x + b) + (V y + c) becomes
    W x + (b + c) + V y, so only one bias is added.
    """
    first, second = addition.args
    for node, other in ((first, second), (second, first)):
        fused = called_module(graph, node)
        if not isinstance(fused, _FUSED) or len(node.args) > 1 or not feeds_only(graph.graph, node, addition):
            continue
        readers = [user for user in getattr(other, "users", ()) if user is not addition]
        can_overwrite = all(
            order[user] < order[addition] and isinstance(called_module(graph, user), _FUSED)
            for user in readers
        )
        source = called_module(graph, other)
        if not isinstance(source, (*_FUSED, nn.MaxPool2d)) or not can_overwrite:
            continue
        is_linear = isinstance(source, _FUSED) and source.activation[0] == "none"
        if is_linear and feeds_only(graph.graph, other, addition):
            fused.take_bias_of(source)
        with graph.graph.inserting_before(addition):
            call = graph.graph.call_module(node.target, (node.args[0], other))
        order[call] = order[addition]
        _replace(graph, addition, call)
        graph.graph.erase_node(node)
        return


def _replace(graph: fx.GraphModule, node: Any, by: Any) -> None:
    node.replace_all_uses_with(by)
    graph.graph.erase_node(node)
