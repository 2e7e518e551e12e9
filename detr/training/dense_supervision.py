"""Dense supervision: in training, every encoder token predicts the class and box of the object it lies on.

DETR converges slowly. Its decoder has to learn where objects are and what they are at the same time, from features that
do not contain their position: position embeddings are added to queries and keys of the attention, never to values. With
dense supervision, the heads of the model are also applied to the tokens of the encoder's output. Each object supervises
all tokens in the middle of its box, as in the auxiliary heads of Co-DETR (https://arxiv.org/abs/2211.12860). The
encoder thus learns within minutes to represent class and position in its tokens in the way that the heads expect, and
the decoder only has to select among them. Dense supervision only adds a loss: graph and parameters of the model are
unchanged.

B batch, S = h x w tokens, Q queries, C classes.
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

CENTER_FRACTION = 0.6
"""Size of the central region of a box in which tokens are assigned to the object, relative to the box."""


def encoder_token_losses(
    logits: Tensor,
    boxes: Tensor,
    valid_mask: Tensor,
    labels: Sequence[Mapping[str, Any]],
    config: DetrConfig,
    *,
    num_boxes: float | Tensor,
    class_weight_sum: float | Tensor,
    image_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute the losses of the encoder tokens of a batch, in float32 (float64 for float64 predictions).

    The normalizers are those of `detr.loss.criterion.set_loss`, so W workers compute the gradient of one process. The
    box losses of an object are averaged over its tokens. The cross-entropy of an image has the same total weight as
    that of its queries.

    Args:
        logits: float [B, S, C + 1], predicted by the tokens.
        boxes: float [B, S, 4], cxcywh in 0..1, predicted by the tokens.
        valid_mask: bool [B, h, w], True on tokens that are not padding.
        labels: one dict per image, as for the model.
        config: configuration of the model.
        num_boxes: normalizer of the box losses.
        class_weight_sum: normalizer of the cross-entropy.
        image_weights: float [B]; None means 1 each.

    Returns:
        ``loss_cells_ce``, ``loss_cells_bbox`` and ``loss_cells_giou``, float [] each, unweighted.
    """
    with torch.autocast(device_type=logits.device.type, enabled=False):
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logits, boxes, device = logits.to(dtype), boxes.to(dtype), logits.device
        targets = gather_targets(labels, config.num_labels, len(logits), device, dtype)
        weights = logits.new_ones(len(logits)) if image_weights is None else image_weights.to(device, dtype)
        is_valid = valid_mask.flatten(1)
        assigned = assign_objects_to_tokens(
            valid_mask, [label["boxes"].to(device, dtype) for label in labels]
        )
        image, token = ((assigned >= 0) & is_valid).nonzero().unbind(1)
        first = torch.tensor([0, *targets.counts[:-1]], device=device).cumsum(0)
        target = assigned[image, token] + first[image]

        target_classes = torch.full_like(assigned, config.num_labels)
        target_classes[image, token] = targets.class_ids[target]
        entropy = F.cross_entropy(logits.flatten(0, 1), target_classes.flatten(), reduction="none")
        entropy = (entropy.view_as(assigned) * is_valid).sum(1) / is_valid.sum(1).clamp(min=1)
        queries = config.num_queries
        matched = torch.tensor([min(n, queries) for n in targets.counts], device=device)
        per_image = matched + config.eos_coefficient * (queries - matched)

        tokens_of_object = torch.bincount(target, minlength=len(targets.class_ids)).clamp(min=1)
        share = weights[image] / tokens_of_object[target]
        predicted, target_boxes = boxes[image, token], targets.boxes_cxcywh[target]
        giou = elementwise_generalized_iou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(target_boxes))
        return {
            "loss_cells_ce": (entropy * per_image * weights).sum() / class_weight_sum,
            "loss_cells_bbox": ((predicted - target_boxes).abs().sum(-1) * share).sum() / num_boxes,
            "loss_cells_giou": ((1 - giou) * share).sum() / num_boxes,
        }


def assign_objects_to_tokens(valid_mask: Tensor, boxes_cxcywh: Sequence[Tensor]) -> Tensor:
    """Assign an object to every token: the smallest of the objects whose central region contains the token.

    The token that contains the center of a box always belongs to its central region.

    Args:
        valid_mask: bool [B, h, w], True on tokens that are not padding, a rectangle in the top left corner.
        boxes_cxcywh: float [n, 4] per image, relative to the image without its padding.

    Returns:
        int64 [B, S], the index of the object within its image; -1 on tokens without an object.
    """
    batch, height, width = valid_mask.shape
    assigned = torch.full((batch, height * width), -1, dtype=torch.int64, device=valid_mask.device)
    heights, widths = valid_mask[:, :, 0].sum(1), valid_mask[:, 0].sum(1)
    for i, boxes in enumerate(boxes_cxcywh):
        if not len(boxes):
            continue
        y = (torch.arange(height, device=boxes.device) + 0.5) / heights[i]
        x = (torch.arange(width, device=boxes.device) + 0.5) / widths[i]
        center, half = boxes[:, :2], boxes[:, 2:] * (CENTER_FRACTION / 2)
        near_x = ((x - center[:, :1]).abs() <= half[:, :1]) | _contains(center[:, 0], widths[i], width)
        near_y = ((y - center[:, 1:]).abs() <= half[:, 1:]) | _contains(center[:, 1], heights[i], height)
        inside = (near_y[:, :, None] & near_x[:, None, :]).flatten(1)
        area = boxes[:, 2:].prod(1)[:, None].expand_as(inside).masked_fill(~inside, torch.inf)
        smallest, index = area.min(0)
        assigned[i] = torch.where(smallest.isfinite(), index, -1)
    return assigned


def _contains(center: Tensor, valid: Tensor, length: int) -> Tensor:
    """Return which row or column contains a center, bool [n, length].

    Args:
        center: float [n] in 0..1 of the ``valid`` rows or columns.
        valid: int64 [], number of rows or columns that are not padding.
        length: number of rows or columns.
    """
    index = (center * valid).long().clamp(min=0).minimum(valid - 1)
    return F.one_hot(index, length).bool()
