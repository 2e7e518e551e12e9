"""Metrics of slices of a data set: images grouped by number of objects and by size."""

from collections.abc import Sequence

import numpy as np

from detr.metrics.coco_matching import Evaluation
from raydetr.evaluation.ground_truth import GroundTruth
from raydetr.results.analysis import SliceMetrics

_OBJECTS = ((0, "none"), (1, "1"), (2, "2 to 4"), (5, "5 to 9"), (10, "10 to 19"), (20, "20 or more"))
_SIDES = (
    (0, "under 256"),
    (256, "256 to 383"),
    (384, "384 to 511"),
    (512, "512 to 767"),
    (768, "768 or more"),
)
"""Minimum value and name of each slice."""


def score_slices(ground_truth: GroundTruth, evaluation: Evaluation) -> dict[str, tuple[SliceMetrics, ...]]:
    """Compute AP and AP50 of boxes by number of objects in the image and by shorter side of the image in pixels.

    Args:
        ground_truth: ground truth of the data set.
        evaluation: evaluation of boxes.

    Returns:
        "objects per image" and "shorter side" → each slice that has images. AP and AP50 are -1 for a slice without
        objects. Crowds do not count as objects. Images of unknown size are in no slice of "shorter side".
    """
    image_ids = evaluation.image_ids
    rows = evaluation.objects["iscrowd"] == 0
    objects = np.bincount(
        np.searchsorted(image_ids, evaluation.objects["image_id"][rows]), minlength=len(image_ids)
    )
    sides = np.full(len(image_ids), -1)
    for image in ground_truth.images:
        if image.get("height") and image.get("width"):
            sides[np.searchsorted(image_ids, image["id"])] = min(image["height"], image["width"])
    return {
        "objects per image": _score(evaluation, objects, objects, _OBJECTS),
        "shorter side": _score(evaluation, sides, objects, _SIDES),
    }


def _score(
    evaluation: Evaluation, values: np.ndarray, objects: np.ndarray, bounds: Sequence[tuple[int, str]]
) -> tuple[SliceMetrics, ...]:
    number = np.searchsorted([minimum for minimum, _ in bounds], values, side="right") - 1
    members = {name: np.flatnonzero(number == index) for index, (_, name) in enumerate(bounds)}
    members = {name: images for name, images in members.items() if len(images)}
    if not members:
        return ()
    scored = evaluation.coco.slice_by({name: images.tolist() for name, images in members.items()})
    return tuple(
        SliceMetrics(
            name=name,
            images=len(images),
            objects=int(objects[images].sum()),
            ap=float(scored[name]["AP"]),
            ap50=float(scored[name]["AP50"]),
        )
        for name, images in members.items()
    )
