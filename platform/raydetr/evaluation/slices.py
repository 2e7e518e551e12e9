"""Figures over parts of a data set: its crowded images, its small ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from detr.metrics.coco_matching import Evaluation
from raydetr.evaluation.ground_truth import Truth

_OBJECTS = ((0, "none"), (1, "1"), (2, "2 to 4"), (5, "5 to 9"), (10, "10 to 19"), (20, "20 or more"))
_SIDES = (
    (0, "under 256"),
    (256, "256 to 383"),
    (384, "384 to 511"),
    (512, "512 to 767"),
    (768, "768 or more"),
)
"""Least value of a slice, its name."""


def score_slices(truth: Truth, evaluation: Evaluation) -> dict[str, list[dict[str, Any]]]:
    """AP and AP50 of boxes by the number of objects in an image and by its shorter side in pixels.

    Args:
        truth: of the data set.
        evaluation: of boxes.

    Returns:
        "objects per image" and "shorter side" → `name`, `images`, `objects`, `AP` and `AP50` (-1 where it has no
        objects) of each slice that has images. Crowds are no objects, images without a known size are in no slice by
        side.
    """
    image_ids = evaluation.image_ids
    rows = evaluation.objects["iscrowd"] == 0
    objects = np.bincount(
        np.searchsorted(image_ids, evaluation.objects["image_id"][rows]), minlength=len(image_ids)
    )
    sides = np.full(len(image_ids), -1)
    for image in truth.images:
        if image.get("height") and image.get("width"):
            sides[np.searchsorted(image_ids, image["id"])] = min(image["height"], image["width"])
    return {
        "objects per image": _score(evaluation, objects, objects, _OBJECTS),
        "shorter side": _score(evaluation, sides, objects, _SIDES),
    }


def _score(
    evaluation: Evaluation, values: np.ndarray, objects: np.ndarray, bounds: Sequence[tuple[int, str]]
) -> list[dict[str, Any]]:
    number = np.searchsorted([least for least, _ in bounds], values, side="right") - 1
    members = {name: np.flatnonzero(number == index) for index, (_, name) in enumerate(bounds)}
    members = {name: images for name, images in members.items() if len(images)}
    if not members:
        return []
    found = evaluation.coco.slice_by({name: images.tolist() for name, images in members.items()})
    return [
        {
            "name": name,
            "images": len(images),
            "objects": int(objects[images].sum()),
            "AP": float(found[name]["AP"]),
            "AP50": float(found[name]["AP50"]),
        }
        for name, images in members.items()
    ]
