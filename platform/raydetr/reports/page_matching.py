"""What is right and what is wrong among the detections of one image, so that a picture can point at it.

The kinds of error are those of `errors_by_kind`, which counts them in a whole data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detr.mask_codec import box_iou_xywh

GOOD, NEAR = 0.5, 0.1
"""IoU from which a detection fits an object, and from which it is thought to mean it."""


@dataclass(frozen=True)
class Item:
    """An object of the truth, or a detection."""

    category_id: int
    box: tuple[float, float, float, float]
    """x, y, width, height in pixels."""
    score: float | None = None
    """Of a detection."""
    crowd: bool = False
    mask: np.ndarray | None = None
    """uint8 [height, width], 0 or 1."""


@dataclass(frozen=True)
class Verdict:
    """What became of the objects and detections of an image, in their order."""

    objects: list[str]
    """found, missed, near (a detection means it, but is no fit) or crowd (does not count)."""
    detections: list[str]
    """right, one of `page_text.ERRORS` without missed, or crowd (lies in one)."""
    meant: list[int | None]
    """For each detection the object that it fits or means."""


def match_image(objects: Sequence[Item], detections: Sequence[Item]) -> Verdict:
    """Match detections with objects of their class, best score first, and name the errors of the others.

    Args:
        objects: of the truth.
        detections: in descending order of score; what is under the least score that counts is left out before.
    """
    overlaps = _iou(detections, objects)
    crowd = np.array([each.crowd for each in objects], dtype=bool)
    same = np.array([[d.category_id == o.category_id for o in objects] for d in detections], dtype=bool)
    same = same.reshape(overlaps.shape)
    fates = ["crowd" if each.crowd else "missed" for each in objects]
    verdicts, meant = ["background"] * len(detections), [None] * len(detections)  # type: list[str], list[int | None]

    def best(row: np.ndarray, allowed: np.ndarray, least: float) -> int | None:
        values = np.where(allowed, row, -1)
        return int(values.argmax()) if values.size and values.max() >= least else None

    for index, row in enumerate(overlaps):
        free = same[index] & np.array([fate == "missed" for fate in fates], dtype=bool)
        if (found := best(row, free, GOOD)) is not None:
            fates[found], verdicts[index], meant[index] = "found", "right", found
    for index, row in enumerate(overlaps):
        if verdicts[index] == "right":
            continue
        if best(row, same[index] & crowd, GOOD) is not None:
            verdicts[index] = "crowd"
            continue
        ours, others = same[index] & ~crowd, ~same[index] & ~crowd
        best_ours = row[ours].max(initial=0)
        for kind, found in (  # in TIDE's order
            ("localisation", best(row, ours, NEAR) if best_ours < GOOD else None),
            ("classification", best(row, others, GOOD)),
            ("duplicate", best(row, ours, GOOD)),
            ("both", best(row, others, NEAR)),
        ):
            if found is not None:
                verdicts[index], meant[index] = kind, found
                if kind in ("classification", "localisation") and fates[found] == "missed":
                    fates[found] = "near"
                break
    return Verdict(fates, verdicts, meant)


def _iou(detections: Sequence[Item], objects: Sequence[Item]) -> np.ndarray:
    """float64 [detections, objects]; with a crowd it is the share of the detection that lies in it."""
    found, truth = ([list(each.box) for each in items] for items in (detections, objects))
    return box_iou_xywh(found, truth, [each.crowd for each in objects])
