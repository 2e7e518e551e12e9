"""The convolutional backbone: any timm CNN with frozen batch norm, of which some stages train.

B batch; C_i, h_i, w_i channels and size of feature map i.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from detr.config import DetrConfig

# transformers' ResNetConfig by (layer_type, depths): the timm net that is the same network.
_RESNETS = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (2, 2, 2, 2)): "resnet26",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}


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

    def __init__(self, num_features: int, eps: float = 1e-5, activation: nn.Module | None = None) -> None:
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
        """Float [B, C, h, w] to float [B, C, h, w] of the same dtype."""
        scale, shift = (t.to(x.dtype).view(1, -1, 1, 1) for t in self.scale_and_shift())
        return self.act(torch.addcmul(shift, x, scale))


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
            frozen.load_state_dict(child.state_dict(), strict=False)
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child, compat)


def has_fused_activations(backbone: nn.Module) -> bool:
    """Whether a frozen batch norm of ``backbone`` applies an activation: where the two ``compat`` differ."""
    return any(
        isinstance(m, FrozenBatchNorm2d) and not isinstance(m.act, nn.Identity) for m in backbone.modules()
    )


def timm_arguments(config: DetrConfig) -> tuple[str, dict[str, Any]]:
    """Name and keyword arguments for ``timm.create_model`` of the backbone that ``config`` describes.

    Raises:
        ValueError: the description fits no timm network.
    """
    backbone = config.backbone_config
    if backbone["model_type"] == "timm_backbone":
        arguments: dict[str, Any] = {
            "in_chans": backbone["num_channels"],
            "out_indices": tuple(backbone["out_indices"]),
        }
        if backbone.get("output_stride") is not None:
            arguments["output_stride"] = backbone["output_stride"]
        return backbone["backbone"], arguments
    key = (backbone.get("layer_type", "bottleneck"), tuple(backbone.get("depths", (3, 4, 6, 3))))
    if (
        key not in _RESNETS
        or backbone.get("downsample_in_bottleneck")
        or backbone.get("hidden_act", "relu") != "relu"
    ):
        raise ValueError(
            f"backbone_config of model_type 'resnet' with layer_type and depths {key} is none of the standard "
            f"ResNets ({', '.join(_RESNETS.values())}); use a timm_backbone"
        )
    features = backbone.get("out_features") or [f"stage{i + 1}" for i in backbone.get("out_indices", [4])]
    indices = tuple(int(str(name).removeprefix("stage")) for name in features)
    return _RESNETS[key], {"in_chans": backbone["num_channels"], "out_indices": indices}


def create_timm_features(config: DetrConfig, pretrained: bool = False) -> nn.Module:
    """The timm feature extractor of ``config``, cut after the last map it returns, batch norm not yet frozen.

    Nets without a stem map (ConvNeXt) have four maps, 0 to 3: the default ``out_indices`` 1 to 4 then mean these.

    Args:
        config: says which net and which maps.
        pretrained: let timm load its pretrained weights, from its cache or the network.

    Raises:
        ValueError: timm has no such net, or it cannot be built with these maps or this output stride.
    """
    name, arguments = timm_arguments(config)
    if name not in timm.list_models() and name.split(".")[0] not in timm.list_models():
        raise ValueError(
            f"timm {timm.__version__} has no model {name!r}; `timm.list_models()` lists its names"
        )
    try:
        net = _create(name, pretrained, arguments)
    except (IndexError, AssertionError, NotImplementedError, TypeError, RuntimeError, ValueError) as error:
        if pretrained:
            raise
        raise ValueError(
            f"timm cannot build {name!r} as a backbone with {arguments}"
            + (
                " (dilation=True needs a net that can keep its resolution)"
                if "output_stride" in arguments
                else ""
            )
            + f": {error}"
        ) from error
    _cut(net)
    return net


def _create(name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    if arguments["out_indices"] == (1, 2, 3, 4):
        try:
            return timm.create_model(name, pretrained=pretrained, features_only=True, **arguments)
        except (IndexError, AssertionError):
            arguments = {**arguments, "out_indices": (0, 1, 2, 3)}
    return timm.create_model(name, pretrained=pretrained, features_only=True, **arguments)


def _cut(net: nn.Module) -> None:
    """Drop the blocks after the last returned map, which timm keeps in EfficientNet-like nets."""
    blocks = getattr(net, "blocks", None)
    last = net.feature_info.get_dicts()[-1]["module"].split(".")
    if isinstance(blocks, nn.Sequential) and last[0] == "blocks" and len(last) >= 2:
        net.blocks = blocks[: int(last[1]) + 1]
    elif isinstance(blocks, nn.Sequential) and last[0] in ("bn1", "act1", "conv_stem"):
        net.blocks = blocks[:0]


def stage_of_parameters(net: nn.Module) -> dict[str, int]:
    """The stage, 0 (stem) to 4, of every parameter of a timm feature extractor.

    timm lists the maps that a net can return, shallow to deep, whether or not they were asked for. The last four
    are the outputs of stages 1 to 4 (strides 4 to 32); what comes before them is the stem. A parameter belongs to
    the first map that is computed after it. Nets without a map of the stem count it to stage 1.

    Raises:
        ValueError: a map's module is not found in the net.
    """
    names = [name for name, _ in net.named_parameters()]
    modules = dict(net.named_modules())
    info = net.feature_info.info
    stage = {}
    start = 0
    for index, entry in enumerate(info):
        path = next((p for p in (entry["module"], entry["module"].replace(".", "_")) if p in modules), None)
        if path is None:
            if index > max(net.feature_info.out_indices):
                break
            raise ValueError(
                f"the backbone has no module {entry['module']!r}, so its stages cannot be told apart; set "
                "trainable_backbone_stages to 0 (train nothing) or 5 (train everything)"
            )
        order = list(modules)
        until = order.index(path)
        inside = {p for p in order if p == path or p.startswith(path + ".")}
        end = start
        for i, name in enumerate(names):
            owner = name.rpartition(".")[0]
            if owner in inside or order.index(owner) < until:
                end = max(end, i + 1)
        for name in names[start:end]:
            stage[name] = max(0, index - (len(info) - 4) + 1)
        start = end
    for name in names[start:]:
        stage[name] = 4
    return stage


def freeze_stages(net: nn.Module, trainable_stages: int) -> None:
    """Let the deepest ``trainable_stages`` stages of a timm feature extractor train and freeze the others.

    0 freezes all; 3, as in the paper, freezes the stem and the first stage; 5 trains all. The stages are those of
    the whole net (see `stage_of_parameters`), also where it is cut: of EfficientNet up to stride 16, 3 trains
    the two stages of strides 8 and 16.
    """
    if trainable_stages <= 0 or trainable_stages >= 5:
        net.requires_grad_(trainable_stages > 0)
        return
    stage = stage_of_parameters(net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(stage[name] > 4 - trainable_stages)


class ConvEncoder(nn.Module):
    """The feature extractor with frozen batch norm.

    Args:
        config: says which net, ``compat``, ``trainable_backbone_stages`` and ``use_pretrained_backbone``.
    """

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        pretrained = config.use_pretrained_backbone
        net = create_timm_features(config, pretrained=pretrained is True)
        self.channels: list[int] = net.feature_info.channels()
        self.strides: list[int] = net.feature_info.reduction()
        freeze_batch_norm(net, config.compat)
        freeze_stages(net, config.trainable_backbone_stages)
        self.model = net
        if isinstance(pretrained, str):
            load_backbone_weights(net, read_state_dict(pretrained), config, source=pretrained)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Float [B, 3, H, W] to the feature maps float [B, C_i, h_i, w_i], shallow to deep."""
        maps: list[Tensor] = self.model(pixel_values)
        return maps


class Backbone(nn.Module):
    """Holds the `ConvEncoder` under the name that checkpoints give it, ``backbone.conv_encoder.model``."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.conv_encoder = ConvEncoder(config)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """See `ConvEncoder.forward`."""
        maps: list[Tensor] = self.conv_encoder(pixel_values)
        return maps


def downsample_mask(pixel_mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixel mask [B, H, W] (any dtype, not 0 is real) to bool [B, h, w] at the size of a feature map, nearest."""
    return F.interpolate(pixel_mask[:, None].float(), size=size)[:, 0].to(torch.bool)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, or of a ``.pth``/``.bin`` file read without running code from it.

    A file with ``{"model": ...}`` or ``{"state_dict": ...}`` gives what is inside.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of a .safetensors or .pth state dict")
    if path.suffix == ".safetensors":
        tensors: dict[str, Tensor] = load_file(str(path))
        return tensors
    content = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no state dict (names to tensors) but a {type(content).__name__}")
    return dict(content)


def load_pretrained_backbone(model: nn.Module, source: str | Path) -> None:
    """Load the backbone of a DETR model from a file of classification weights.

    Args:
        model: `DetrModel`, `DetrForObjectDetection` or anything with one `ConvEncoder` inside.
        source: a ``.safetensors`` or ``.pth`` state dict of the whole timm net (with its classifier) in timm's
            names, or in other names but timm's order and shapes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the tensors are not those of the net; the first difference is named.
    """
    encoders = [m for m in model.modules() if isinstance(m, ConvEncoder)]
    config = getattr(model, "config", None)
    if len(encoders) != 1 or not isinstance(config, DetrConfig):
        raise ValueError(
            f"{type(model).__name__} is not a DETR model: it must have a config and one backbone"
        )
    load_backbone_weights(encoders[0].model, read_state_dict(source), config, source=str(source))


def load_backbone_weights(
    net: nn.Module, state_dict: Mapping[str, Tensor], config: DetrConfig, source: str = "the state dict"
) -> None:
    """Copy classification weights into a feature extractor; see `load_pretrained_backbone`.

    Where the names are not timm's, the tensors are matched with those of the whole timm net by order, and every
    shape has to agree.
    """
    own = net.state_dict()
    tensors = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    if not _by_name(own, tensors):
        tensors = _in_timm_names(tensors, config, source)
    renamed = _by_name(own, tensors)
    missing = sorted(set(own) - set(renamed))
    if missing:
        raise ValueError(
            f"{source} does not hold {missing[0]!r} of the backbone ({len(missing)} tensors missing)"
        )
    for name, tensor in renamed.items():
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"{source}: {name!r} has shape {tuple(tensor.shape)}, the backbone {tuple(own[name].shape)}"
            )
    net.load_state_dict(renamed, strict=True)


def _by_name(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that ``own`` has, under its names; a features net writes ``stages.0`` as ``stages_0``."""
    found = {name: tensors[name] for name in own if name in tensors}
    flat = {name.replace(".", "_"): tensor for name, tensor in tensors.items()}
    found.update({name: flat[name.replace(".", "_")] for name in own if name.replace(".", "_") in flat})
    return found


def _in_timm_names(tensors: Mapping[str, Tensor], config: DetrConfig, source: str) -> dict[str, Tensor]:
    """Rename tensors, which are in the order of the whole timm net, to its names."""
    name, arguments = timm_arguments(config)
    with torch.device("meta"):
        whole = timm.create_model(name, pretrained=False, in_chans=arguments["in_chans"])
    expected = {k: v for k, v in whole.state_dict().items() if not k.endswith("num_batches_tracked")}
    for (ours, theirs), (their_name, tensor) in zip(expected.items(), tensors.items(), strict=False):
        if theirs.shape != tensor.shape and theirs.ndim != 2:  # the classifier may have other classes
            raise ValueError(
                f"{source} is not a state dict of timm's {name}: {their_name!r} has shape {tuple(tensor.shape)} "
                f"where {ours!r} has {tuple(theirs.shape)}"
            )
    if len(expected) != len(tensors):
        raise ValueError(f"{source} holds {len(tensors)} tensors, timm's {name} has {len(expected)}")
    return dict(zip(expected, tensors.values(), strict=True))
