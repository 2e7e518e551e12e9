"""The refining decoder: queries start from tokens, and each layer corrects their scores and boxes.

Boxes are refined as in Deformable DETR and DINO (https://arxiv.org/abs/2203.03605): each layer adds a correction, in
logits, to the boxes of the previous layer, whose gradient is stopped. Scores start from those of the tokens. The first
layer thus starts from the predictions of the dense head, and only needs to separate objects from remaining duplicates
and background.

B batch, Q queries, M tokens of the memory, C classes, D ``d_model``, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from detr.config import DetrConfig
from detr.model.attention import additive_mask
from detr.model.initialization import init_as_original
from detr.model.multiscale.tokens import box_embedding
from detr.model.transformer import DecoderLayer, run_layer


class RefiningLayer(nn.Module):
    """A layer of DETR's decoder with heads for corrections; the corrections of a new layer are zero."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        dim = config.d_model
        self.layer = DecoderLayer(config)
        init_as_original(self.layer)
        self.class_labels_classifier = nn.Linear(dim, config.num_labels)
        self.bbox_predictor = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 4))
        self.reset_class_head()
        for parameter in self.bbox_predictor[2].parameters():
            nn.init.zeros_(parameter)

    def reset_class_head(self) -> None:
        """Reset the corrections of scores to zero."""
        for parameter in self.class_labels_classifier.parameters():
            nn.init.zeros_(parameter)


class RefiningDecoder(nn.Module):
    """Refine the scores and boxes of queries.

    Args:
        config: for D, C, L and the widths of the layers.
    """

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        dim = config.d_model
        self.dim = dim
        self.checkpointing: dict[str, Any] | None = None  # see `run_layer`
        self.content = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.position = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.layers = nn.ModuleList(RefiningLayer(config) for _ in range(config.decoder_layers))

    def forward(
        self,
        features: Tensor,
        logits: Tensor,
        boxes_cxcywh: Tensor,
        memory: Tensor,
        memory_position: Tensor,
        memory_attend_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Refine the predictions of the tokens that become queries.

        Args:
            features: float [B, Q, D], features of these tokens.
            logits: float [B, Q, C], their scores; no gradient flows to them.
            boxes_cxcywh: float [B, Q, 4], their boxes, cxcywh in 0..1; no gradient flows to them.
            memory: float [B, M, D].
            memory_position: float [B, M, D], added to the keys.
            memory_attend_mask: bool [B, M], False on padding; None means no padding.

        Returns:
            Logits float [L, B, Q, C], boxes float [L, B, Q, 4] cxcywh in 0..1, and the last hidden states float [B, Q,
            D].
        """
        x = self.content(features)
        key = memory + memory_position.to(memory.dtype)
        mask = None if memory_attend_mask is None else additive_mask(memory_attend_mask, memory.dtype)
        all_logits, all_boxes = [], []
        each: RefiningLayer
        for each in self.layers:  # type: ignore[assignment]
            logits, boxes_cxcywh = logits.detach(), boxes_cxcywh.detach()
            position = self.position(box_embedding(boxes_cxcywh, self.dim).to(x.dtype))
            x, *_ = run_layer(self, each.layer, x, position, None, memory, key, mask, False)
            with torch.autocast(device_type=x.device.type, enabled=False):
                states = x.to(each.class_labels_classifier.weight.dtype)
                logits = logits + each.class_labels_classifier(states)
                boxes_cxcywh = (_logit(boxes_cxcywh) + each.bbox_predictor(states)).sigmoid()
            all_logits.append(logits)
            all_boxes.append(boxes_cxcywh)
        return torch.stack(all_logits), torch.stack(all_boxes), x


def _logit(x: Tensor) -> Tensor:
    """Compute the logit of float [...] clamped to 0.001..0.999, with operations that all exporters support."""
    x = x.clamp(1e-3, 1 - 1e-3)
    return (x / (1 - x)).log()
