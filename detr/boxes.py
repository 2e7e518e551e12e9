"""Box formats, IoU and generalized IoU.

``cxcywh`` is center x, center y, width, height; ``xyxy`` is left, top, right, bottom.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Avoids 0 / 0 in the IoU. Smaller than the area of any label: a pixel of a 1333-pixel image has area 6e-7.
_MIN_AREA = 1e-12


def box_cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Convert boxes float [..., 4] from cxcywh to xyxy, in the same units."""
    center, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat((center - 0.5 * size, center + 0.5 * size), dim=-1)


def box_xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Convert boxes float [..., 4] from xyxy to cxcywh, in the same units."""
    top_left, bottom_right = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat(((top_left + bottom_right) / 2, bottom_right - top_left), dim=-1)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """Compute the areas, float [...], of boxes float [..., 4] xyxy."""
    return (boxes_xyxy[..., 2] - boxes_xyxy[..., 0]) * (boxes_xyxy[..., 3] - boxes_xyxy[..., 1])


def _sides(boxes_xyxy: Tensor) -> tuple[Tensor, ...]:
    """Split boxes into left, top, right and bottom, float [...] each.

    The results are contiguous: operations on strided coordinates are not vectorized on a CPU.
    """
    return tuple(side.contiguous() for side in boxes_xyxy.unbind(-1))


def elementwise_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Compute IoU and union area of pairs of boxes, with broadcasting.

    Args:
        boxes1_xyxy: float [..., 4].
        boxes2_xyxy: float [..., 4], broadcast against the first.

    Returns:
        IoU in 0..1 and union area, both float [...]. Two boxes with zero area have IoU 0.
    """
    return _iou(_sides(boxes1_xyxy), _sides(boxes2_xyxy))


def _iou(sides1: Sequence[Tensor], sides2: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    left1, top1, right1, bottom1 = sides1
    left2, top2, right2, bottom2 = sides2
    width = (torch.minimum(right1, right2) - torch.maximum(left1, left2)).clamp(min=0)
    intersection = width * (torch.minimum(bottom1, bottom2) - torch.maximum(top1, top2)).clamp(min=0)
    union = (right1 - left1) * (bottom1 - top1) + (right2 - left2) * (bottom2 - top2) - intersection
    return intersection / union.clamp(min=_MIN_AREA), union


def elementwise_generalized_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """Compute the generalized IoU (https://giou.stanford.edu) of pairs of boxes, with broadcasting.

    The boxes are not checked: a non-finite box gives NaN.

    Args:
        boxes1_xyxy: float [..., 4].
        boxes2_xyxy: float [..., 4], broadcast against the first.

    Returns:
        float [...] in -1..1.
    """
    sides1, sides2 = _sides(boxes1_xyxy), _sides(boxes2_xyxy)
    iou, union = _iou(sides1, sides2)
    left1, top1, right1, bottom1 = sides1
    left2, top2, right2, bottom2 = sides2
    width = (torch.maximum(right1, right2) - torch.minimum(left1, left2)).clamp(min=0)
    hull = width * (torch.maximum(bottom1, bottom2) - torch.minimum(top1, top2)).clamp(min=0)
    return iou - (hull - union) / hull.clamp(min=_MIN_AREA)


def box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Compute IoU and union area of all pairs of two sets of boxes.

    Args:
        boxes1_xyxy: float [n, 4].
        boxes2_xyxy: float [m, 4].

    Returns:
        IoU in 0..1 and union area, both float [n, m].
    """
    return elementwise_iou(boxes1_xyxy[:, None], boxes2_xyxy[None])
