"""A model for inference: the same class and outputs, and a backbone that is one graph of folded convolutions.

What is done, and why it changes no result beyond rounding:

- A frozen batch norm is an affine map of each channel, so it is folded into the convolution before it.
- Weights and activations are channels-last, which is what convolutions read fastest.
- Each convolution does the ReLU and the addition that follow it, while its result is still in a register: with oneDNN
  on a CPU (`detr.inference.onednn`, which has it compute linear layers too), with cuDNN on a GPU (`detr.inference.cuda`).
- Convolutions and linear layers of the multi-scale architecture are oneDNN's too.
- The first self-attention of the decoder is a constant, and all its layers make keys and values in one product
  (`detr.inference.decoder`).
- A mask head does not compute again what the maps that it doubles repeat (`detr.inference.mask_head`).
- OpenVINO computes it all on a CPU where a user asks for that engine (`detr.inference.openvino`).
- On a GPU, float32 layers run on the units for matrix products (`detr.inference.triton_tf32x3`), what is between the convolutions of
  a mask head has kernels of its own (`detr.inference.triton_mask_head`), and all is asked for at once (`detr.inference.cuda_graphs`).

The plain model beside it is the test (`tests/detr/inference/test_optimize.py`).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, fx, nn

from detr.inference.cuda import (
    CudnnConv2d,
    SpaceToDepthConv2d,
    gpu_mask_head,
    use_fast_layers,
    use_gpu_kernels,
)
from detr.inference.cuda_graphs import replay_graphs
from detr.inference.decoder import use_fast_decoder
from detr.inference.mask_head import FastMaskHead
from detr.inference.onednn import OneDnnConv2d, pack_layers
from detr.inference.openvino import compute_with_openvino, uses_openvino
from detr.model.attention import MultiheadAttention
from detr.model.backbone import ConvEncoder
from detr.model.capture import refuse_capture
from detr.model.frozen_batch_norm import FrozenBatchNorm2d, fold, foldable_pairs
from detr.model.fx_graph import called_module, feeds_only, nodes_of, trace
from detr.model.mask_head import MaskHead
from detr.model.multiscale.decoder import RefiningLayer
from detr.model.multiscale.dense_head import DenseHead
from detr.model.multiscale.hybrid_encoder import HybridEncoder, PositionNorm, SeparableConvolution
from detr.model.multiscale.masks import MultiScaleMaskHead
from detr.model.plain_layers import is_plain_tree, structure_of
from detr.model.transformer import Decoder, DecoderLayer, Encoder, EncoderLayer

M = TypeVar("M", bound=nn.Module)
_FUSED: tuple[type[OneDnnConv2d] | type[CudnnConv2d], ...] = (OneDnnConv2d, CudnnConv2d)
_TRANSFORMER = {Encoder, Decoder, EncoderLayer, DecoderLayer, MultiheadAttention}
_TRANSFORMER_LAYERS = {*_TRANSFORMER, nn.ModuleList, nn.Linear, nn.LayerNorm}
_MASK_LAYERS = {MaskHead, nn.Conv2d, nn.GroupNorm}


Engine = Literal["torch", "openvino"]
"""What computes a model."""


def optimized(model: M, pack: bool = True, dtype: torch.dtype | None = None, engine: Engine = "torch") -> M:
    """A copy of ``model`` that is faster in inference: see the file's docstring.

    It is in evaluation mode and has no gradients. Parts that are not the layers of this package stay as they are: a
    backbone that cannot be traced, an encoder, a decoder or a mask head in which a layer has a hook or was replaced,
    wrapped (LoRA), parametrized or quantized. A model that is optimized already is returned as it is.

    The result refuses, with an error that says what to do instead: to be saved, to take other weights, to change its
    dtype or device, and to be traced or exported (a CPU's with ``pack=False`` can be). Where it holds OpenVINO's or a
    GPU's state, it cannot be copied or pickled either.

    Args:
        model: a DETR model, on its device and in its dtype. On a CPU, float32 gains most.
        pack: False leaves the convolutions to torch, for a model that will run under autocast, which does not reach
            packed ones.
        dtype: of all but the heads for classes and boxes, which stay as they are: a thousandth of the work, and
            bfloat16 boxes are off by pixels. None leaves everything in its dtype.
        engine: "openvino" has OpenVINO compute backbone and transformer; it takes some seconds to prepare and a second
            copy of the weights.

    Raises:
        ValueError: the model is optimised already, in another dtype or without the engine; there is no such engine, or
            it cannot compute this model.
        ImportError: the engine is not installed.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine={engine!r}: expected one of {list(get_args(Engine))}")
    if is_optimized(model):
        own = next(tensor.dtype for name, tensor in model.named_parameters() if not _is_of_heads(name))
        if dtype not in (None, own):
            raise ValueError(
                f"optimize(dtype={dtype}) of a model that is optimised in {own}: call the original's"
            )
        if engine == "openvino" and not uses_openvino(model):
            raise ValueError(f"optimize(engine={engine!r}) of a model that is optimised: call the original's")
        return model
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    for module in fast.modules():
        for method in ("states", "encode"):
            vars(module).pop(method, None)  # of a model that is compiled: it would call the original
    for module in fast.modules():
        if isinstance(module, ConvEncoder):
            net = _fast_backbone(module.model, pack, dtype)
            if net is not module.model:
                module.model, module.folding = net, None
    stacks: list[Any] = [
        module
        for module in fast.modules()
        if isinstance(module, Encoder | Decoder) and is_plain_tree(module, _TRANSFORMER_LAYERS)
    ]
    for stack in stacks:
        use_fast_decoder(stack)
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
        if hasattr(module, "is_optimized"):
            vars(module)["is_optimized"] = True
    fast.register_load_state_dict_pre_hook(_refuse_weights)  # type: ignore[no-untyped-call]
    return fast


def _multi_scale_layers(model: nn.Module) -> list[nn.Module]:
    """What of the multi-scale architecture is layers of its own kinds, besides its encoder."""
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
    """Whether a model, or one inside it, comes from `optimized`."""
    return any(getattr(module, "is_optimized", False) for module in model.modules())


def refuse_conversion(model: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Raise an error where a function, which is to be applied to the tensors of a model, changes dtype or device.

    Args:
        model: from `optimized`: its packed weights would not follow.
        function: as `torch.nn.Module.to` makes it.

    Raises:
        ValueError: it does.
    """
    for own in {(tensor.dtype, tensor.device): tensor for tensor in model.parameters()}.values():
        given = function(torch.empty(0, dtype=own.dtype, device=own.device))
        if (given.dtype, given.device) != (own.dtype, own.device):
            raise ValueError(
                f"this model comes from optimize() and stays {own.dtype} on {own.device}, it cannot become {given.dtype} "
                f"on {given.device}: convert the one it was made from, and optimize that"
            )


def _refuse_weights(*_: Any) -> None:
    # Those of folded and packed layers are elsewhere: half of the model would stay the old one.
    raise ValueError(
        "this model comes from optimize() and cannot take other weights: load them into the one it was made from, and "
        "optimize that"
    )


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not _is_of_heads(name):
            tensor.data = tensor.data.to(dtype)


def _is_of_heads(name: str) -> bool:
    return not {"class_labels_classifier", "bbox_predictor"}.isdisjoint(name.split("."))


class _Backbone(nn.Module):
    """A graph that wants its images channels-last, unless its first convolution puts them in order itself."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph
        self._is_packed = any(isinstance(module, _FUSED) for module in graph.modules())
        self._as_they_are = any(isinstance(module, SpaceToDepthConv2d) for module in graph.modules())

    def forward(self, pixel_values: Tensor) -> Any:
        if self._is_packed:
            refuse_capture(
                "a model from optimize()", "export the one it was made from, or optimize(pack=False)"
            )
        if not self._as_they_are:
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return self.graph_module(pixel_values)


@torch.no_grad()
def _fast_backbone(net: nn.Module, pack: bool, dtype: torch.dtype | None) -> nn.Module:
    calls = None if structure_of(net) is None else trace(net, (FrozenBatchNorm2d,))
    if calls is None:
        return net
    graph = fx.GraphModule(net, calls)
    _fold_batch_norms(graph)  # before it is rounded
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
    graph.graph.owning_module = None  # no circle: a model that nobody holds is freed at once
    return _Backbone(graph)


def _fold_batch_norms(graph: fx.GraphModule) -> None:
    """Convolutions take their norm's weight and bias for good, and what then does nothing is left out."""
    for node, convolution, norm in foldable_pairs(graph, graph.graph):
        weight, bias = fold(convolution, norm)
        convolution.weight, convolution.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        graph.set_submodule(str(node.target), norm.act)
    for node in nodes_of(graph.graph):
        if type(called_module(graph, node)) is nn.Identity:
            _replace(graph, node, node.args[0])


def _fuse_convolutions(graph: fx.GraphModule, kind: Any) -> None:
    """Convolutions become those of a library, with the additions and activations that follow them.

    Args:
        graph: of a backbone.
        kind: of the modules of `_FUSED`.
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
    """Let a convolution that feeds a sum add to the other input in place, if nothing else reads that afterwards."""
    first, second = addition.args
    for node, other in ((first, second), (second, first)):
        fused = called_module(graph, node)
        if not isinstance(fused, _FUSED) or len(node.args) > 1 or not feeds_only(graph.graph, node, addition):
            continue
        # Readers that are convolutions have results of their own; anything else might be a view, or the output.
        readers = [user for user in getattr(other, "users", ()) if user is not addition]
        done = all(
            order[user] < order[addition] and isinstance(called_module(graph, user), _FUSED)
            for user in readers
        )
        source = called_module(graph, other)
        if not isinstance(source, (*_FUSED, nn.MaxPool2d)) or not done:
            continue
        alone = isinstance(source, _FUSED) and source.activation[0] == "none"
        if alone and feeds_only(graph.graph, other, addition):
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
