"""torchvision's Faster R-CNN and FCOS with a feature pyramid, with the interface of a DETR model.

`learning.py` and the speed rows compare the multi-scale architecture with these. The backbone is that of `detr`, with
the same weights and frozen parts. The rest is torchvision's, with its losses, samplers and non-maximum suppression.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from detr import DetrConfig
from detr.model.backbone import Backbone

_SMALLEST_BOX = 0.5
"""Minimum side of a training box in pixels; torchvision rejects boxes without area."""


@dataclass(frozen=True)
class TrainingOutput:
    """Loss as in a DETR model's output: the sum, float [], and its terms by name."""

    loss: Tensor
    loss_dict: dict[str, Tensor]


class Pyramid(nn.Module):
    """A backbone with a feature pyramid: float [B, 3, H, W] to maps with `out_channels` channels, by name.

    Args:
        config: configuration of the backbone.
        width: channels of every map.
        coarser: block that adds maps of larger strides.

    Attributes:
        strides: strides of the backbone's maps, finest first.
    """

    def __init__(self, config: DetrConfig, width: int, coarser: ExtraFPNBlock) -> None:
        super().__init__()
        self.net = Backbone(config)
        self.strides = self.net.conv_encoder.strides
        self.fpn = FeaturePyramidNetwork(self.net.conv_encoder.channels, width, coarser)
        self.out_channels = width

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Compute the maps, finest first."""
        return self.fpn({str(index): each for index, each in enumerate(self.net(pixel_values))})


class TorchvisionDetector(nn.Module):
    """A torchvision detector that takes normalized pixels and labels like a DETR model.

    Args:
        kind: "faster-rcnn" or "fcos".
        config: configuration of the backbone, with the number of classes.
        edge: shorter side of test images in pixels. Faster R-CNN's anchors are scaled to it as torchvision's are to
            800 pixels.
        width: channels of the pyramid.

    Raises:
        ValueError: unknown kind.
    """

    def __init__(self, kind: str, config: DetrConfig, edge: int, width: int = 128) -> None:
        super().__init__()
        self.config = config
        if kind == "faster-rcnn":
            body = Pyramid(config, width, LastLevelMaxPool())
            self.detector: nn.Module = _faster_rcnn(body, config.num_labels, edge)
        elif kind == "fcos":
            body = Pyramid(config, width, LastLevelP6P7(width, width))
            self.detector = _fcos(body, config.num_labels)
        else:
            raise ValueError(f"kind is {kind!r}: expected 'faster-rcnn' or 'fcos'")
        # Class 0 of Faster R-CNN is "background".
        self.first_label = 1 if kind == "faster-rcnn" else 0
        self.detector.transform = _BatchOnly(edge, edge, [0.0], [1.0])

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Sequence[dict[str, Tensor]] | None = None,
    ) -> TrainingOutput | list[dict[str, Tensor]]:
        """Compute the losses if labels are given, else detect.

        Args:
            pixel_values: float [B, 3, H, W], normalized.
            pixel_mask: [B, H, W], nonzero on real pixels; None: no padding.
            labels: as for `DetrForObjectDetection`.

        Returns:
            The losses; or for each image `boxes` float [n, 4] (corners in pixels of `pixel_values`), `scores`
            and `labels` (from 0).
        """
        images = list(pixel_values)
        if pixel_mask is not None:
            real = pixel_mask != 0
            sizes = zip(real[:, :, 0].sum(1).tolist(), real[:, 0].sum(1).tolist(), strict=True)
            images = [image[:, :height, :width] for image, (height, width) in zip(images, sizes, strict=True)]
        if labels is None:
            detections = self.detector(images)
            return [{**each, "labels": each["labels"] - self.first_label} for each in detections]
        targets = [self._target(image, label) for image, label in zip(images, labels, strict=True)]
        terms = self.detector(images, targets)
        return TrainingOutput(torch.stack(list(terms.values())).sum(), terms)

    def _target(self, image: Tensor, label: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert the labels of an image to torchvision's format: corners in pixels."""
        height, width = image.shape[1:]
        boxes_cxcywh = label["boxes"].float() * label["boxes"].new_tensor([width, height] * 2).float()
        center, half = boxes_cxcywh[:, :2], boxes_cxcywh[:, 2:] / 2
        boxes = torch.cat([center - half, center + half], 1)
        large = (2 * half > _SMALLEST_BOX).all(1)
        return {"boxes": boxes[large], "labels": label["class_labels"][large] + self.first_label}


class _BatchOnly(GeneralizedRCNNTransform):
    """Batch images that are already resized and normalized."""

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target


def _faster_rcnn(body: Pyramid, classes: int, edge: int) -> FasterRCNN:
    """Build Faster R-CNN with fewer proposals than torchvision's 2,000 and 1,000, which small images do not need."""
    maps = len(body.strides)
    sizes = tuple((edge * 2**level // 24,) for level in range(maps + 1))
    return FasterRCNN(
        body,
        classes + 1,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign([str(level) for level in range(maps)], 7, 2),
        rpn_pre_nms_top_n_train=500,
        rpn_post_nms_top_n_train=300,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_test=150,
        box_batch_size_per_image=128,
    )


def _fcos(body: Pyramid, classes: int) -> FCOS:
    """Build FCOS with anchors the size of the strides, as torchvision requires, and the paper's threshold, 0.05."""
    coarsest = body.strides[-1]
    sizes = tuple((stride,) for stride in (*body.strides, 2 * coarsest, 4 * coarsest))
    anchors = AnchorGenerator(sizes, ((1.0,),) * len(sizes))
    return FCOS(body, classes, anchor_generator=anchors, score_thresh=0.05)
