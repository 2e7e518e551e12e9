"""The dense head: every token of every map predicts a class and a box relative to its own place.

One head for all strides, of two towers of separable convolutions, as the one-stage detectors have it (FCOS,
https://arxiv.org/abs/1904.01355; TOOD, https://arxiv.org/abs/2108.07755). Boxes relative to the token are
what lets it learn within minutes: it need not find out where in the image it is.

B batch, S tokens, C classes, D ``d_model``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detr.config import DetrConfig
from detr.model.multiscale.hybrid_encoder import SeparableConvolution
from detr.model.multiscale.tokens import TokenGrid
from detr.model.transformer import run_layer

PRIOR_LOGIT = -4.0
"""Of every class at the start: hardly any token is an object (the prior of focal loss, which was 0.01)."""

_REACH, _SIZE = 2.0, 4.0
"""In token sizes: how far a box's center may lie from its token, and how large a new head's boxes are."""


@dataclass(frozen=True)
class DensePredictions:
    """What the tokens predict.

    Attributes:
        logits: float [B, S, C], before the sigmoid.
        boxes_cxcywh: float [B, S, 4], relative to the image without its padding; not clipped to it.
        features: float [B, S, D], what queries and the decoder's memory are made of.
    """

    logits: Tensor
    boxes_cxcywh: Tensor
    features: Tensor


class DenseHead(nn.Module):
    """Predict classes and boxes of tokens.

    Args:
        config: D, C, and the length of the towers.
        convolutions: in each tower.
    """

    def __init__(self, config: DetrConfig, convolutions: int) -> None:
        super().__init__()
        dim = config.d_model
        self.checkpointing: dict[str, Any] | None = None  # see `run_layer`
        self.class_tower = nn.ModuleList(SeparableConvolution(dim) for _ in range(convolutions))
        self.box_tower = nn.ModuleList(SeparableConvolution(dim) for _ in range(convolutions))
        self.class_labels_classifier = nn.Linear(dim, config.num_labels)
        self.bbox_predictor = nn.Linear(dim, 4)
        self.reset_class_head()
        nn.init.zeros_(self.bbox_predictor.weight)
        nn.init.zeros_(self.bbox_predictor.bias)

    def reset_class_head(self) -> None:
        """Reinitialize the class head, for other classes."""
        self.class_labels_classifier.reset_parameters()
        nn.init.constant_(self.class_labels_classifier.bias, PRIOR_LOGIT)

    def towers(self, maps: Sequence[Tensor], grid: TokenGrid) -> tuple[list[Tensor], list[Tensor]]:
        """Features for classes and for boxes, float [B, D, h_i, w_i] each, of such maps, finest first."""
        return self._run(self.class_tower, maps, grid), self._run(self.box_tower, maps, grid)

    def forward(
        self, class_maps: Sequence[Tensor], box_maps: Sequence[Tensor], grid: TokenGrid
    ) -> DensePredictions:
        """Predict from what `towers` returns. Linear layers run outside autocast: see `detr.model.detection`."""
        of_class, of_box = (
            torch.cat([each.flatten(2).transpose(1, 2) for each in maps], 1)
            for maps in (class_maps, box_maps)
        )
        with torch.autocast(device_type=of_class.device.type, enabled=False):
            dtype = self.class_labels_classifier.weight.dtype
            logits = self.class_labels_classifier(of_class.to(dtype))
            raw = self.bbox_predictor(of_box.to(dtype))
            centers = grid.centers_xy + _REACH * grid.sizes_wh * raw[..., :2].tanh()
            sizes = _SIZE * grid.sizes_wh * raw[..., 2:].clamp(-4, 4).exp()
        return DensePredictions(logits, torch.cat((centers, sizes), -1), of_class + of_box)

    def _run(self, tower: nn.ModuleList, maps: Sequence[Tensor], grid: TokenGrid) -> list[Tensor]:
        results = []
        for each, real in zip(maps, grid.masks(maps[0].dtype), strict=True):
            x = each
            for convolution in tower:
                x = run_layer(self, convolution, x, real)
            results.append(x)
        return results
