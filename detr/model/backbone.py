"""The convolutional backbone: a timm CNN or the ResNet of transformers, with frozen batch norm and frozen stages.

B batch; C_i, h_i, w_i channels and size of feature map i.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.checkpoint.key_maps import BACKBONE_PREFIX, to_file_name
from detr.checkpoint.state_dict import read_model_weights, read_state_dict
from detr.config import DetrConfig
from detr.model.frozen_batch_norm import ConvolutionFolding, freeze_batch_norm
from detr.model.resnet import ResNet
from detr.model_files import is_hub_id

# Pretrained timm networks whose weights fit a ResNet of transformers, by (layer_type, depths).
_RESNETS = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (2, 2, 2, 2)): "resnet26",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}
_DEFAULT_INDICES = (1, 2, 3, 4)


class ConvEncoder(nn.Module):
    """Feature extractor with frozen batch norm.

    Args:
        config: defines the network by ``backbone_config``, ``compat``, ``trainable_backbone_stages`` and
            ``use_pretrained_backbone``. ``out_indices`` of ``config.backbone_config`` is set to the indices that the
            network actually uses.

    Attributes:
        model: the feature extractor, from timm or a `ResNet`.
        channels: C_i of each feature map.
        strides: stride of each feature map, in pixels.
        folding: folds the frozen batch norms into convolutions while the network runs; None if there are none to fold.
    """

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        pretrained = config.use_pretrained_backbone
        net = create_features(config, pretrained=pretrained is True)
        info = _feature_info(net)
        self.channels: list[int] = info.channels()
        self.strides: list[int] = info.reduction()
        if config.backbone_config["model_type"] == "timm_backbone":
            config.backbone_config["out_indices"] = list(info.out_indices)
        freeze_batch_norm(net, config.compat)
        freeze_stages(net, config.trainable_backbone_stages)
        self.model = net
        self.folding: ConvolutionFolding | None = ConvolutionFolding()
        if isinstance(pretrained, str):
            load_backbone_weights(net, _read_backbone(pretrained), config, source=pretrained)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Map float [B, channels, H, W] to feature maps float [B, C_i, h_i, w_i], shallow to deep."""
        with nullcontext() if self.folding is None else self.folding.running(self.model):
            maps: list[Tensor] = self.model(pixel_values)
        return maps


class Backbone(nn.Module):
    """Wrap the `ConvEncoder`, so that parameter names are those of checkpoints: ``backbone.conv_encoder.model``."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.conv_encoder = ConvEncoder(config)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Compute feature maps; see `ConvEncoder.forward`."""
        maps: list[Tensor] = self.conv_encoder(pixel_values)
        return maps


def downsample_mask(pixel_mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a pixel mask to the size of a feature map, by nearest neighbor.

    Args:
        pixel_mask: [B, H, W] of any dtype, nonzero on real pixels.
        size: (h, w).

    Returns:
        bool [B, h, w].
    """
    return F.interpolate(pixel_mask[:, None].float(), size=size)[:, 0].to(torch.bool)


def create_features(config: DetrConfig, pretrained: bool = False) -> nn.Module:
    """Create the feature extractor of ``config``, without the layers after its last feature map.

    Batch norm is not frozen yet.

    Args:
        config: defines the network and its feature maps.
        pretrained: load timm's pretrained weights, from its cache or the network.

    Raises:
        ValueError: the network does not exist, cannot be built with these feature maps or this output stride, or has no
            pretrained weights.
        OSError: the pretrained weights are not in the cache and cannot be downloaded.
    """
    backbone = config.backbone_config
    if backbone["model_type"] == "timm_backbone":
        return create_timm_features(config, pretrained)
    net = ResNet(backbone)
    if pretrained:
        shape = (backbone.get("layer_type", "bottleneck"), tuple(backbone.get("depths", (3, 4, 6, 3))))
        if shape not in _RESNETS:
            raise ValueError(
                f"use_pretrained_backbone=True: no pretrained weights exist for layer_type and depths {shape}; "
                "give the path of a state dict, a folder or a hub id"
            )
        name = _RESNETS[shape]
        with _explain_missing_weights(name):
            weights = _timm().create_model(name, pretrained=True, in_chans=backbone["num_channels"])
        load_backbone_weights(net, weights.state_dict(), config, source=f"timm's {name}")
    return net


def _timm() -> Any:
    """Import timm when a network is built, not before: with torchvision it takes as long to import as torch."""
    import timm

    return timm


def timm_arguments(config: DetrConfig) -> tuple[str, dict[str, Any]]:
    """Return the name and the keyword arguments with which ``timm.create_model`` builds the backbone of ``config``."""
    backbone = config.backbone_config
    arguments = {"in_chans": backbone["num_channels"], "out_indices": tuple(backbone["out_indices"])}
    if backbone["output_stride"] is not None:
        arguments["output_stride"] = backbone["output_stride"]
    return backbone["backbone"], arguments


def create_timm_features(config: DetrConfig, pretrained: bool = False) -> nn.Module:
    """Create the timm feature extractor of ``config``; see `create_features`.

    Networks without a feature map of the stem, such as ConvNeXt, have only the indices 0 to 3. The default
    ``out_indices`` 1 to 4 then mean 0 to 3.
    """
    name, arguments = timm_arguments(config)
    timm = _timm()
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; timm.list_models() lists the names")
    try:
        with _explain_missing_weights(name):
            try:
                net = _create(name, pretrained, arguments)
            except (IndexError, AssertionError):
                if arguments["out_indices"] != _DEFAULT_INDICES:
                    raise
                net = _create(name, pretrained, {**arguments, "out_indices": (0, 1, 2, 3)})
    except (IndexError, AssertionError, NotImplementedError, TypeError, RuntimeError, ValueError) as error:
        hint = (
            " (dilation=True needs a network that supports output_stride)"
            if "output_stride" in arguments
            else ""
        )
        raise ValueError(
            f"timm cannot build {name!r} as a backbone with {arguments}{hint}: {error}"
        ) from error
    _drop_unused_blocks(net)
    return net


@contextmanager
def _explain_missing_weights(name: str) -> Iterator[None]:
    """Add what to do to errors of missing pretrained weights."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the pretrained weights of timm's {name} could not be loaded: {error}. use_pretrained_backbone=True "
            "needs timm's cache or the network; give the path of a state dict instead, or False"
        ) from error


def _create(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    net: nn.Module = _timm().create_model(name, pretrained=pretrained, features_only=True, **arguments)
    return net


def _feature_info(net: nn.Module) -> Any:
    """Return timm's description of the feature maps of a network."""
    return net.feature_info


def _drop_unused_blocks(net: nn.Module) -> None:
    """Drop the blocks after the last returned feature map; timm leaves them in networks such as EfficientNet."""
    blocks = getattr(net, "blocks", None)
    last = _feature_info(net).module_name()[-1].split(".")
    if isinstance(blocks, nn.Sequential):
        net.blocks = blocks[: int(last[1]) + 1 if last[0] == "blocks" and len(last) > 1 else 0]


def stage_of_parameters(net: nn.Module) -> dict[str, int]:
    """Return the stage, 0 (stem) to 4, of each parameter of a timm feature extractor, by parameter name.

    ``feature_info`` lists all feature maps that a network can return, shallow to deep, also those that are not
    selected. The last four are the outputs of stages 1 to 4 (strides 4 to 32); anything before them is the stem. A
    parameter belongs to the first feature map whose module ends after it, in the order in which modules are registered.
    In a network without a feature map of the stem, the stem belongs to stage 1.

    Raises:
        ValueError: the network has no module of the name that a feature map refers to.
    """
    info = _feature_info(net)
    order = {name: i for i, (name, _) in enumerate(net.named_modules())}
    ends = []  # position of the last module of each feature map, in registration order
    for index, entry in enumerate(info.info):
        # A feature extractor of timm renames the module `stages.0` to `stages_0`.
        path = next((p for p in (entry["module"], entry["module"].replace(".", "_")) if p in order), None)
        if path is None and index <= max(info.out_indices):
            raise ValueError(
                f"the backbone has no module {entry['module']!r}, so its stages are unknown; set "
                "trainable_backbone_stages to 0 (train nothing) or 5 (train everything)"
            )
        if path is not None:
            ends.append(max(i for name, i in order.items() if name == path or name.startswith(path + ".")))
    stem_maps = len(info.info) - 4
    stages = {}
    for name, _ in net.named_parameters():
        position = order[name.rpartition(".")[0]]
        completed_maps = sum(end < position for end in ends)
        stages[name] = min(max(completed_maps - stem_maps + 1, 0), 4)
    return stages


def freeze_stages(net: nn.Module, trainable_stages: int) -> None:
    """Make the deepest ``trainable_stages`` stages of a timm feature extractor trainable and freeze the others.

    0 freezes everything; 3, as in the paper, freezes the stem and the first stage; 5 trains everything. Stages are
    counted in the complete network (see `stage_of_parameters`), even if its last stages are not built: in an
    EfficientNet up to stride 16, 3 trains the two stages of strides 8 and 16.
    """
    if trainable_stages <= 0 or trainable_stages >= 5:
        net.requires_grad_(trainable_stages > 0)
        return
    stages = stage_of_parameters(net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(stages[name] > 4 - trainable_stages)


def load_pretrained_backbone(model: nn.Module, source: str | Path) -> None:
    """Load the weights of an image classifier into the backbone of a DETR model.

    Args:
        model: `DetrModel`, `DetrForObjectDetection` or another model with a ``config`` and one `ConvEncoder`.
        source: a ``.safetensors`` or ``.pth`` state dict of the complete timm network with its classifier; or a folder
            or hub id of a transformers ResNet. The tensors of a state dict have timm's names, or other names but timm's
            order and shapes.

    Raises:
        FileNotFoundError: the file, folder or model does not exist.
        ValueError: the tensors do not fit the network; the message names the first difference.
    """
    encoders = [m for m in model.modules() if isinstance(m, ConvEncoder)]
    config = getattr(model, "config", None)
    if len(encoders) != 1 or not isinstance(config, DetrConfig):
        raise ValueError(
            f"{type(model).__name__} is not a DETR model: it must have a config and one backbone"
        )
    load_backbone_weights(encoders[0].model, _read_backbone(source), config, source=str(source))


def _read_backbone(source: str | Path) -> dict[str, Tensor]:
    if Path(source).is_dir() or (not Path(source).exists() and is_hub_id(source)):
        return read_model_weights(source)
    return read_state_dict(source)


def load_backbone_weights(
    net: nn.Module, state_dict: Mapping[str, Tensor], config: DetrConfig, source: str = "the state dict"
) -> None:
    """Copy the weights of an image classifier into a feature extractor, in place; see `load_pretrained_backbone`."""
    own = net.state_dict()
    own = {k: v for k, v in own.items() if not k.endswith("num_batches_tracked")}
    given = {_to_timm_name(k): v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    if config.backbone_config["model_type"] == "resnet":
        given = {k: v for k, v in given.items() if not k.startswith(("fc.", "classifier."))}
        parts = {name.split(".")[0] for name in own}
        unknown = next((k for k in given if k not in own and not _is_unbuilt_stage(k, parts)), None)
        if unknown is not None:
            raise ValueError(f"{source} is not a state dict of a ResNet: {unknown} is not one of its tensors")
        tensors: Mapping[str, Tensor] = given
    else:
        tensors = given if given.keys() == own.keys() else _rename_to_timm(given, config, source)
    # A feature extractor of timm renames `stages.0` to `stages_0`.
    flat = {name.replace(".", "_"): tensor for name, tensor in tensors.items()}
    matched = {name: flat[name.replace(".", "_")] for name in own if name.replace(".", "_") in flat}
    if len(matched) < len(own):
        missing = next(name for name in own if name not in matched)
        raise ValueError(f"{source} has no {missing}, which the backbone has")
    for name, tensor in matched.items():
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, the backbone {tuple(own[name].shape)}"
            )
    # strict=False: before batch norm is frozen, num_batches_tracked is missing
    net.load_state_dict(matched, strict=False)


def _is_unbuilt_stage(name: str, parts: set[str]) -> bool:
    """Return whether a tensor belongs to a stage after the last feature map, which is not built."""
    part = name.split(".")[0]
    return part.startswith("layer") and part not in parts


def _to_timm_name(name: str) -> str:
    """Convert a tensor name of transformers' ResNet, alone or in a classifier, to timm's; others stay unchanged."""
    return to_file_name(BACKBONE_PREFIX + name.removeprefix("resnet.")).removeprefix(BACKBONE_PREFIX)


def _rename_to_timm(tensors: Mapping[str, Tensor], config: DetrConfig, source: str) -> Mapping[str, Tensor]:
    """Give the tensors of a complete timm network timm's names: by name if any name matches, else by order."""
    name, arguments = timm_arguments(config)
    with torch.device("meta"):
        whole: Any = _timm().create_model(name, pretrained=False, in_chans=arguments["in_chans"])
    expected = {k: v for k, v in whole.state_dict().items() if not k.endswith("num_batches_tracked")}
    heads = whole.pretrained_cfg["classifier"]
    classifier = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    if not expected.keys().isdisjoint(tensors):
        missing = [n for n in expected if n not in tensors and not n.startswith(classifier)]
        unknown = [n for n in tensors if n not in expected and not n.startswith(classifier)]
        if missing or unknown:
            first = f"it has no {missing[0]}" if missing else f"{unknown[0]} is not one of its tensors"
            raise ValueError(f"{source} is not a state dict of timm's {name}: {first}")
        return tensors
    for (ours, theirs), (other, tensor) in zip(expected.items(), tensors.items(), strict=False):
        if theirs.shape != tensor.shape and not ours.startswith(classifier):
            raise ValueError(
                f"{source} is not in the order of timm's {name}: {other} has shape {tuple(tensor.shape)} where "
                f"{ours} has {tuple(theirs.shape)}"
            )
    if len(expected) != len(tensors):
        raise ValueError(f"{source} contains {len(tensors)} tensors, timm's {name} has {len(expected)}")
    return dict(zip(expected, tensors.values(), strict=True))
