"""Box formats, IoU and generalized IoU.

``cxcywh`` is center x, center y, width, height; ``xyxy`` is left, top, right, bottom.
"""

from __future__ import annotations

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
    left1, top1, right1, bottom1 = _sides(boxes1_xyxy)
    left2, top2, right2, bottom2 = _sides(boxes2_xyxy)
    width = (torch.minimum(right1, right2) - torch.maximum(left1, left2)).clamp(min=0)
    intersection = width * (torch.minimum(bottom1, bottom2) - torch.maximum(top1, top2)).clamp(min=0)
    union = box_area(boxes1_xyxy) + box_area(boxes2_xyxy) - intersection
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
    iou, union = elementwise_iou(boxes1_xyxy, boxes2_xyxy)
    left1, top1, right1, bottom1 = _sides(boxes1_xyxy)
    left2, top2, right2, bottom2 = _sides(boxes2_xyxy)
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


def generalized_box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """Compute the generalized IoU of all pairs of two sets of boxes.

    Args:
        boxes1_xyxy: float [n, 4], with right >= left and bottom >= top.
        boxes2_xyxy: float [m, 4], with right >= left and bottom >= top.

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
