"""The ResNet of transformers, of any depth and width, as a feature extractor with timm's parameter names.

B batch; C_i, h_i, w_i channels and size of feature map i.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from detr.backbone_config import complete_resnet_config
from detr.model.attention import activation_function


@dataclass(frozen=True)
class FeatureInfo:
    """Description of the feature maps of a network, with the interface of timm's ``FeatureInfo``.

    Attributes:
        info: for every feature map, the ``module`` that computes it, its channels ``num_chs`` and its stride
            ``reduction``.
        out_indices: the feature maps that the network returns.
    """

    info: list[dict[str, Any]]
    out_indices: tuple[int, ...]

    def channels(self) -> list[int]:
        """Return the channels of the returned feature maps."""
        return [self.info[i]["num_chs"] for i in self.out_indices]

    def reduction(self) -> list[int]:
        """Return the strides of the returned feature maps, in pixels."""
        return [self.info[i]["reduction"] for i in self.out_indices]

    def module_name(self) -> list[str]:
        """Return the names of the modules that compute the returned feature maps."""
        return [self.info[i]["module"] for i in self.out_indices]


class ResNet(nn.Module):
    """The network of ``transformers.ResNetBackbone``, without the stages after its last returned feature map.

    Args:
        backbone_config: entries of ``transformers.ResNetConfig``, as returned by
            `detr.backbone_config.normalize_backbone_config`.

    Attributes:
        feature_info: the feature maps: 0 is the pooled stem, i is stage i.

    Raises:
        ValueError: the activation is not known.
    """

    def __init__(self, backbone_config: Mapping[str, Any]) -> None:
        super().__init__()
        values = complete_resnet_config(backbone_config)
        bottleneck, activation = values["layer_type"] == "bottleneck", values["hidden_act"]
        width, stride = values["embedding_size"], 4
        self.conv1 = nn.Conv2d(values["num_channels"], width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = _activation(activation)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        info = [{"module": "maxpool", "num_chs": width, "reduction": stride}]
        self._stages = []
        out_indices = tuple(values["out_indices"])
        for stage in range(1, out_indices[-1] + 1):
            channels, step = values["hidden_sizes"][stage - 1], 2
            if stage == 1 and not values["downsample_in_first_stage"]:
                step = 1
            stride *= step
            blocks: list[nn.Module] = []
            for block in range(values["depths"][stage - 1]):
                first = block == 0
                early = first and values["downsample_in_bottleneck"]
                blocks.append(_Block(width, channels, step if first else 1, early, bottleneck, activation))
                width = channels
            name = f"layer{stage}"
            self.add_module(name, nn.Sequential(*blocks))
            self._stages.append(name)
            info.append({"module": name, "num_chs": channels, "reduction": stride})
        self.feature_info = FeatureInfo(info, out_indices)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map float [B, channels, H, W] to feature maps float [B, C_i, h_i, w_i], shallow to deep."""
        maps = [self.maxpool(self.act1(self.bn1(self.conv1(x))))]
        for name in self._stages:
            maps.append(self.get_submodule(name)(maps[-1]))
        return [maps[i] for i in self.feature_info.out_indices]


class _Block(nn.Module):
    """A residual block: two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1.

    Args:
        width: channels of the input.
        channels: channels of the output.
        stride: stride of the block.
        early: whether a bottleneck applies its stride in its first convolution instead of its second.
        bottleneck: whether the block is a bottleneck.
        activation: activation after the sum. Inside a block, transformers always uses ReLU.
    """

    def __init__(
        self, width: int, channels: int, stride: int, early: bool, bottleneck: bool, activation: str
    ) -> None:
        super().__init__()
        inner = channels // 4 if bottleneck else channels
        if bottleneck:
            self.conv1 = _convolution(width, inner, 1, stride if early else 1)
            self.conv2 = _convolution(inner, inner, 3, 1 if early else stride)
        else:
            self.conv1 = _convolution(width, inner, 3, stride)
            self.conv2 = _convolution(inner, channels, 3, 1)
        self.bn1, self.act1 = nn.BatchNorm2d(inner), nn.ReLU(inplace=True)
        self.bn2, self.act2 = nn.BatchNorm2d(inner), _activation("relu" if bottleneck else activation)
        if bottleneck:
            self.conv3 = _convolution(inner, channels, 1, 1)
            self.bn3, self.act3 = nn.BatchNorm2d(channels), _activation(activation)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or width != channels:
            self.downsample = nn.Sequential(
                _convolution(width, channels, 1, stride), nn.BatchNorm2d(channels)
            )
        self.bottleneck = bottleneck

    def forward(self, x: Tensor) -> Tensor:
        """Map float [B, width, h, w] to float [B, channels, h / stride, w / stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            x = self.bn3(self.conv3(self.act2(x))) + shortcut
            return self.act3(x)
        return self.act2(x + shortcut)


class _Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = activation_function(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _activation(name: str) -> nn.Module:
    return nn.ReLU(inplace=True) if name == "relu" else _Activation(name)


def _convolution(width: int, channels: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(width, channels, size, stride=stride, padding=size // 2, bias=False)
