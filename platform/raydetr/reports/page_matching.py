"""Matching of the detections and objects of one image, so that an overlay can mark the errors.

The kinds of errors are those of `evaluation.errors_by_kind`, which counts them in a whole data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detr.mask_codec import box_iou_xywh

GOOD, NEAR = 0.5, 0.1
"""Minimum IoU at which a detection matches an object, and minimum IoU at which it refers to one."""


@dataclass(frozen=True)
class Item:
    """A ground-truth object, or a detection."""

    category_id: int
    box: tuple[float, float, float, float]
    """x, y, width, height in pixels."""
    score: float | None = None
    """Score of a detection; None for an object."""
    crowd: bool = False
    mask: np.ndarray | None = None
    """uint8 [height, width], 0 or 1."""


@dataclass(frozen=True)
class ImageMatching:
    """Statuses of the objects and detections of an image, in their order."""

    objects: list[str]
    """found, missed, near (a detection refers to it, but does not match) or crowd (ignored)."""
    detections: list[str]
    """right, a key of `page_text.ERRORS` except missed, or crowd (lies in a crowd)."""
    referred: list[int | None]
    """For each detection, the index of the object that it matches or refers to."""


def match_image(objects: Sequence[Item], detections: Sequence[Item]) -> ImageMatching:
    """Match detections with objects of their class, best score first, and classify the errors of the others.

    Args:
        objects: ground-truth objects.
        detections: detections that reach the minimum score, in descending order of score.
    """
    overlaps = _iou(detections, objects)
    crowd = np.array([each.crowd for each in objects], dtype=bool)
    same = np.array([[d.category_id == o.category_id for o in objects] for d in detections], dtype=bool)
    same = same.reshape(overlaps.shape)
    statuses = ["crowd" if each.crowd else "missed" for each in objects]
    kinds, referred = ["background"] * len(detections), [None] * len(detections)  # type: list[str], list[int | None]

    def best(row: np.ndarray, allowed: np.ndarray, minimum: float) -> int | None:
        values = np.where(allowed, row, -1)
        return int(values.argmax()) if values.size and values.max() >= minimum else None

    for index, row in enumerate(overlaps):
        free = same[index] & np.array([status == "missed" for status in statuses], dtype=bool)
        if (match := best(row, free, GOOD)) is not None:
            statuses[match], kinds[index], referred[index] = "found", "right", match
    for index, row in enumerate(overlaps):
        if kinds[index] == "right":
            continue
        if best(row, same[index] & crowd, GOOD) is not None:
            kinds[index] = "crowd"
            continue
        same_class, other_class = same[index] & ~crowd, ~same[index] & ~crowd
        best_same_class = row[same_class].max(initial=0)
        for kind, match in (  # in TIDE's order
            ("localisation", best(row, same_class, NEAR) if best_same_class < GOOD else None),
            ("classification", best(row, other_class, GOOD)),
            ("duplicate", best(row, same_class, GOOD)),
            ("both", best(row, other_class, NEAR)),
        ):
            if match is not None:
                kinds[index], referred[index] = kind, match
                if kind in ("classification", "localisation") and statuses[match] == "missed":
                    statuses[match] = "near"
                break
    return ImageMatching(statuses, kinds, referred)


def _iou(detections: Sequence[Item], objects: Sequence[Item]) -> np.ndarray:
    """Compute the IoU, float64 [detections, objects]; for a crowd, the share of the detection that lies in it."""
    predicted_boxes, true_boxes = ([list(each.box) for each in items] for items in (detections, objects))
    return box_iou_xywh(predicted_boxes, true_boxes, [each.crowd for each in objects])
