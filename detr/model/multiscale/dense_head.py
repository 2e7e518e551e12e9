"""The dense head: every token of every feature map predicts class scores and a box relative to its own position.

All strides share one head with two towers of separable convolutions, as in one-stage detectors (FCOS,
https://arxiv.org/abs/1904.01355; TOOD, https://arxiv.org/abs/2108.07755). Because boxes are relative to the token, the
head learns within minutes: it does not need to infer where in the image a token is.

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
"""Initial logit of every class: few tokens are objects. The focal loss paper starts from a probability of 0.01."""

_MAX_OFFSET, _INITIAL_SIZE = 2.0, 4.0
"""In token sizes: the maximum distance from a token to the center of its box along an axis; the initial box size."""


@dataclass(frozen=True)
class DensePredictions:
    """Predictions of the tokens.

    Attributes:
        logits: float [B, S, C], before the sigmoid.
        boxes_cxcywh: float [B, S, 4], relative to the image without its padding; not clipped to it.
        features: float [B, S, D], from which queries and the memory of the decoder are taken.
    """

    logits: Tensor
    boxes_cxcywh: Tensor
    features: Tensor


class DenseHead(nn.Module):
    """Predict class scores and boxes of tokens.

    Args:
        config: for D and C.
        convolutions: number of convolutions in each tower.
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
        """Reinitialize the class head, for training with other classes."""
        self.class_labels_classifier.reset_parameters()
        nn.init.constant_(self.class_labels_classifier.bias, PRIOR_LOGIT)

    def towers(self, maps: Sequence[Tensor], grid: TokenGrid) -> tuple[list[Tensor], list[Tensor]]:
        """Apply both towers to the feature maps.

        Args:
            maps: float [B, D, h_i, w_i], finest first.
            grid: grid of their tokens.

        Returns:
            Features for class scores and features for boxes, with the shapes of ``maps``.
        """
        return self._run(self.class_tower, maps, grid), self._run(self.box_tower, maps, grid)

    def forward(
        self, class_maps: Sequence[Tensor], box_maps: Sequence[Tensor], grid: TokenGrid
    ) -> DensePredictions:
        """Predict from the results of `towers`.

        The linear layers run outside autocast, for the reason given in `DetrForObjectDetection.predict`.
        """
        class_features, box_features = (
            torch.cat([each.flatten(2).transpose(1, 2) for each in maps], 1)
            for maps in (class_maps, box_maps)
        )
        with torch.autocast(device_type=class_features.device.type, enabled=False):
            dtype = self.class_labels_classifier.weight.dtype
            logits = self.class_labels_classifier(class_features.to(dtype))
            raw = self.bbox_predictor(box_features.to(dtype))
            centers = grid.centers_xy + _MAX_OFFSET * grid.sizes_wh * raw[..., :2].tanh()
            sizes = _INITIAL_SIZE * grid.sizes_wh * raw[..., 2:].clamp(-4, 4).exp()
        return DensePredictions(logits, torch.cat((centers, sizes), -1), class_features + box_features)

    def _run(self, tower: nn.ModuleList, maps: Sequence[Tensor], grid: TokenGrid) -> list[Tensor]:
        results = []
        for each, valid_mask in zip(maps, grid.masks(maps[0].dtype), strict=True):
            x = each
            for convolution in tower:
                x = run_layer(self, convolution, x, valid_mask)
            results.append(x)
        return results
