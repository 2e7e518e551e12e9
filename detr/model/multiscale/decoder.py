"""The refining decoder: queries that start from tokens and correct their scores and boxes layer by layer.

Boxes are refined as in Deformable DETR and DINO (https://arxiv.org/abs/2203.03605): each layer adds to the box of the
one before, whose gradient is stopped. Scores start from the token's own, so that the first layer
begins with what the dense head already knows and only has to tell objects from leftovers.

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
    """A layer of DETR's decoder and the corrections that it makes; a new one corrects nothing."""

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
        """Correct no score, as a new layer."""
        for parameter in self.class_labels_classifier.parameters():
            nn.init.zeros_(parameter)


class RefiningDecoder(nn.Module):
    """Refine queries.

    Args:
        config: D, C, L and the layers' widths.
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
        memory_keep: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Refine.

        Args:
            features: float [B, Q, D], of the tokens that queries start from.
            logits: float [B, Q, C], their predictions; no gradient flows to them.
            boxes_cxcywh: float [B, Q, 4], cxcywh in 0..1.
            memory: float [B, M, D].
            memory_position: float [B, M, D].
            memory_keep: bool [B, M], False on padding; None where there is none.

        Returns:
            Logits float [L, B, Q, C], boxes float [L, B, Q, 4] cxcywh in 0..1, and the last states float [B, Q, D].
        """
        x = self.content(features)
        key = memory + memory_position.to(memory.dtype)
        mask = None if memory_keep is None else additive_mask(memory_keep, memory.dtype)
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
    """The logit of x float [...] in 0..1, kept off its ends, in operations that all exporters know."""
    x = x.clamp(1e-3, 1 - 1e-3)
    return (x / (1 - x)).log()
