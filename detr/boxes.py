"""Boxes: their two formats and how much they overlap.

``cxcywh`` is centre x, centre y, width, height; ``xyxy`` is left, top, right, bottom.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below any area that a label can have (a pixel of a 1333-pixel image is 6e-7); keeps 0 / 0 out of IoU.
_MIN_AREA = 1e-12


def box_cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """float [..., 4] cxcywh to float [..., 4] xyxy, in the same units."""
    centre, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat((centre - 0.5 * size, centre + 0.5 * size), dim=-1)


def box_xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """float [..., 4] xyxy to float [..., 4] cxcywh, in the same units."""
    top_left, bottom_right = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat(((top_left + bottom_right) / 2, bottom_right - top_left), dim=-1)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """Areas float [...] of boxes float [..., 4] xyxy."""
    return (boxes_xyxy[..., 2] - boxes_xyxy[..., 0]) * (boxes_xyxy[..., 3] - boxes_xyxy[..., 1])


def _sides(boxes_xyxy: Tensor) -> tuple[Tensor, ...]:
    """Left, top, right and bottom, float [...] each.

    Contiguous ones: a CPU does not vectorize over pairs of coordinates.
    """
    return tuple(side.contiguous() for side in boxes_xyxy.unbind(-1))


def elementwise_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and union of pairs of boxes, with broadcasting.

    Args:
        boxes1_xyxy: float [..., 4].
        boxes2_xyxy: float [..., 4], broadcast against the first.

    Returns:
        IoU in 0..1 and union area, both float [...]. Two boxes without area have IoU 0.
    """
    left1, top1, right1, bottom1 = _sides(boxes1_xyxy)
    left2, top2, right2, bottom2 = _sides(boxes2_xyxy)
    width = (torch.minimum(right1, right2) - torch.maximum(left1, left2)).clamp(min=0)
    intersection = width * (torch.minimum(bottom1, bottom2) - torch.maximum(top1, top2)).clamp(min=0)
    union = box_area(boxes1_xyxy) + box_area(boxes2_xyxy) - intersection
    return intersection / union.clamp(min=_MIN_AREA), union


def elementwise_generalized_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """Generalized IoU (https://giou.stanford.edu) of pairs of boxes, with broadcasting.

    Nothing is checked: a box that is not finite gives NaN, for the caller to deal with.

    Args:
        boxes1_xyxy: float [..., 4].
        boxes2_xyxy: float [..., 4], broadcast against the first.

    Returns:
        float [...] in -1..1.
    """
    iou, union = elementwise_iou(boxes1_xyxy, boxes2_xyxy)
    left1, top1, right1, bottom1 = _sides(boxes1_xyxy)
    left2, top2, right2, bottom2 = _sides(boxes2_xyxy)
    width = (torch.maximum(right1, right2) - torch.minimum(left1, left2)).clamp(min=0)
    hull = width * (torch.maximum(bottom1, bottom2) - torch.minimum(top1, top2)).clamp(min=0)
    return iou - (hull - union) / hull.clamp(min=_MIN_AREA)


def box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and union of every box of one set with every box of another.

    Args:
        boxes1_xyxy: float [n, 4].
        boxes2_xyxy: float [m, 4].

    Returns:
        IoU in 0..1 and union area, both float [n, m].
    """
    return elementwise_iou(boxes1_xyxy[:, None], boxes2_xyxy[None])


def generalized_box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """Generalized IoU of every box of one set with every box of another.

    Args:
        boxes1_xyxy: float [n, 4], right and bottom not less than left and top.
        boxes2_xyxy: float [m, 4], likewise.

    Returns:
        float [n, m] in -1..1.

    Raises:
        ValueError: a box has a negative size or is NaN.
    """
    for name, boxes in (("boxes1", boxes1_xyxy), ("boxes2", boxes2_xyxy)):
        wrong = ~(boxes[:, 2:] >= boxes[:, :2]).all(dim=1)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"{name}[{first}] is {boxes[first].tolist()}, not xyxy with x1 >= x0 and y1 >= y0"
            )
    return elementwise_generalized_iou(boxes1_xyxy[:, None], boxes2_xyxy[None])
