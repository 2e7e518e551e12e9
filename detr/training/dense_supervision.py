"""Cells that answer too: in training every cell of the encoder's output tells the class and box of the object it is on.

DETR starts slowly because its decoder has to find out at once where objects are and what they are, from features
that do not yet say where they lie: position embeddings enter queries and keys of the attention, never the values. Here
the model's own heads answer for the cells of the encoder's output too, taught densely (each object by all cells in
its middle, as the auxiliary heads of Co-DETR, https://arxiv.org/abs/2211.12860). So the encoder learns within
minutes to write class and place into its cells, in the language of the heads, and the decoder only has to choose
among them. It is a loss and nothing else: the model's graph and parameters are unchanged.

B batch, S = h x w cells, Q queries, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.boxes import box_cxcywh_to_xyxy, elementwise_generalized_iou
from detr.config import DetrConfig
from detr.loss.targets import gather_targets

CENTRE = 0.6
"""Share of a box's width and height, around its centre, of which the cells are taught the object."""


def cell_losses(
    logits: Tensor,
    boxes: Tensor,
    counted: Tensor,
    labels: Sequence[Mapping[str, Any]],
    config: DetrConfig,
    *,
    num_boxes: float | Tensor,
    class_weight_sum: float | Tensor,
    image_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The losses of the cells of a batch, in float32 (float64 for float64 predictions).

    The normalisers are those of `detr.loss.criterion.set_loss`, so that W workers compute the gradient of one process.
    Every object counts once, however many cells it has; an image's cross-entropy weighs as much as that of its
    queries.

    Args:
        logits: float [B, S, C + 1], of the cells.
        boxes: float [B, S, 4], cxcywh in 0..1.
        counted: bool [B, h, w], True on cells that are not padding.
        labels: one dict per image, as for the model.
        config: of the model.
        num_boxes: what the box terms are divided by.
        class_weight_sum: what the cross-entropy is divided by.
        image_weights: float [B]; None: 1 each.

    Returns:
        ``loss_cells_ce``, ``loss_cells_bbox`` and ``loss_cells_giou``, float [] each, unweighted.
    """
    with torch.autocast(device_type=logits.device.type, enabled=False):
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logits, boxes, device = logits.to(dtype), boxes.to(dtype), logits.device
        targets = gather_targets(labels, config.num_labels, len(logits), device, dtype)
        weights = logits.new_ones(len(logits)) if image_weights is None else image_weights.to(device, dtype)
        keep = counted.flatten(1)
        owner = cell_owners(counted, [label["boxes"].to(device, dtype) for label in labels])
        image, cell = ((owner >= 0) & keep).nonzero().unbind(1)
        first = torch.tensor([0, *targets.counts[:-1]], device=device).cumsum(0)
        target = owner[image, cell] + first[image]

        wanted = torch.full_like(owner, config.num_labels)
        wanted[image, cell] = targets.class_ids[target]
        entropy = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view_as(owner)
        entropy = (entropy * keep).sum(1) / keep.sum(1).clamp(min=1)
        queries = config.num_queries
        matched = torch.tensor([min(n, queries) for n in targets.counts], device=device)
        per_image = matched + config.eos_coefficient * (queries - matched)

        cells_of = torch.bincount(target, minlength=len(targets.class_ids)).clamp(min=1)
        share = weights[image] / cells_of[target]
        found, true = boxes[image, cell], targets.boxes_cxcywh[target]
        giou = elementwise_generalized_iou(box_cxcywh_to_xyxy(found), box_cxcywh_to_xyxy(true))
        return {
            "loss_cells_ce": (entropy * per_image * weights).sum() / class_weight_sum,
            "loss_cells_bbox": ((found - true).abs().sum(-1) * share).sum() / num_boxes,
            "loss_cells_giou": ((1 - giou) * share).sum() / num_boxes,
        }


def cell_owners(counted: Tensor, boxes_cxcywh: Sequence[Tensor]) -> Tensor:
    """Which object every cell is taught: the smallest one whose middle it is in; the cell under a centre always.

    Args:
        counted: bool [B, h, w], True on cells that are not padding: the top left part of each image.
        boxes_cxcywh: per image float [n, 4], relative to the image without its padding.

    Returns:
        int64 [B, S], the object's index within its image; -1 on cells of none.
    """
    batch, height, width = counted.shape
    owners = torch.full((batch, height * width), -1, dtype=torch.int64, device=counted.device)
    heights, widths = counted[:, :, 0].sum(1), counted[:, 0].sum(1)
    for i, boxes in enumerate(boxes_cxcywh):
        if not len(boxes):
            continue
        y = (torch.arange(height, device=boxes.device) + 0.5) / heights[i]
        x = (torch.arange(width, device=boxes.device) + 0.5) / widths[i]
        centre, half = boxes[:, :2], boxes[:, 2:] * (CENTRE / 2)
        near_x = ((x - centre[:, :1]).abs() <= half[:, :1]) | _holds(centre[:, 0], widths[i], width)
        near_y = ((y - centre[:, 1:]).abs() <= half[:, 1:]) | _holds(centre[:, 1], heights[i], height)
        inside = (near_y[:, :, None] & near_x[:, None, :]).flatten(1)
        area = boxes[:, 2:].prod(1)[:, None].expand_as(inside).masked_fill(~inside, torch.inf)
        smallest, owner = area.min(0)
        owners[i] = torch.where(smallest.isfinite(), owner, -1)
    return owners


def _holds(centre: Tensor, real: Tensor, cells: int) -> Tensor:
    """Bool [n, cells]: the cell of a row or column of ``real`` cells that a centre in 0..1 lies in."""
    index = (centre * real).long().clamp(min=0).minimum(real - 1)
    return F.one_hot(index, cells).bool()
