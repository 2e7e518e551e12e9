"""Error breakdown of detections with TIDE's kinds of errors (Bolya et al. 2020), image by image.

Each detection that is not a true positive at IoU 0.5 gets the first kind that applies:

- localisation: the IoU with an object of its class is 0.1 to 0.5.
- classification: the IoU with an object of another class is at least 0.5.
- duplicate: the IoU with an object of its class is at least 0.5, but another detection is matched with the object.
- background: the IoU with every object is below 0.1.
- both: none of the above; the IoU with an object of another class is 0.1 to 0.5.

An unmatched object is missed, unless a localization or classification error refers to it. Crowds and detections matched
with them are ignored.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hotcoco import mask as coco_mask

from detr.metrics.coco_matching import FALSE, IGNORED, Evaluation, Matches, evaluate_detections

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
OVERLAP, TOUCH = 0.5, 0.1
"""Minimum IoU of a true positive, and minimum IoU at which a detection refers to an object."""
_TIDE = dict(zip(KINDS, ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")))


@dataclass(frozen=True)
class Errors:
    """Errors of the detections that reach a minimum score.

    image, kind: int64 [n], index of each error into `Evaluation.image_ids` and into `KINDS`.
    weight: float64 [n], the detection's score; 1 for a missed object.
    """

    image: np.ndarray
    kind: np.ndarray
    weight: np.ndarray

    def counts(self) -> dict[str, int]:
        """Count the errors of each kind."""
        return dict(zip(KINDS, np.bincount(self.kind, minlength=len(KINDS)).tolist()))

    def worst(self, kind: str, image_ids: np.ndarray, limit: int = 12) -> tuple[int, ...]:
        """Return the ids of the images with the largest sum of weights of a kind, worst first."""
        rows = self.kind == KINDS.index(kind)
        weight = np.bincount(self.image[rows], self.weight[rows], minlength=len(image_ids))
        order = np.argsort(-weight, kind="stable")[:limit]
        return tuple(int(image_ids[position]) for position in order if weight[position] > 0)


def find_errors(evaluation: Evaluation, matches: Matches, min_score: float) -> Errors:
    """Classify the errors of box detections with a score of at least `min_score`."""
    wrong = np.flatnonzero((matches.score >= min_score) & (matches.status[0] == FALSE))
    kinds = np.full(len(wrong), KINDS.index("background"))
    is_missed = ~detected_objects(evaluation, matches, min_score)
    for detections, objects, iou, same in _overlaps(evaluation, matches, wrong):
        kinds[detections], referred = _kinds(iou, same)
        is_missed[objects[referred]] = False
    missed = np.flatnonzero(is_missed)
    return Errors(
        np.concatenate([matches.image[wrong], matches.object_image[missed]]),
        np.concatenate([kinds, np.full(len(missed), KINDS.index("missed"))]),
        np.concatenate([matches.score[wrong], np.ones(len(missed))]),
    )


def duplicate_share(evaluation: Evaluation, matches: Matches, min_score: float = 0.5) -> float:
    """Return the number of second detections divided by the number of objects; 0 without objects.

    A second detection has an IoU of at least 0.5 with an object of its class but no match, because detections
    with higher scores are matched with all such objects. TIDE's kind "duplicate" omits those that also overlap an
    object of another class.

    Args:
        evaluation: evaluation of boxes.
        matches: matches of `evaluation`.
        min_score: minimum score of a second detection.
    """
    wrong = np.flatnonzero((matches.score >= min_score) & (matches.status[0] == FALSE))
    second = sum(
        np.count_nonzero((same & (iou >= OVERLAP)).any(axis=1))
        for _, _, iou, same in _overlaps(evaluation, matches, wrong)
    )
    return second / max(len(matches.object_row), 1)


def detected_objects(evaluation: Evaluation, matches: Matches, min_score: float) -> np.ndarray:
    """Return bool [objects]: whether a detection with at least `min_score` is matched with the object at IoU 0.5."""
    found_by = matches.found_by[0]
    scores = np.append(evaluation.found["score"], -np.inf)
    return (found_by >= 0) & (scores[found_by] >= min_score)


def _kinds(iou: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classify the wrong detections of an image.

    Args:
        iou: float64 [n, objects], with at least one object.
        same: bool [n, objects], whether the classes are the same.

    Returns:
        Kinds int64 [n], as indices into `KINDS`, and indices of the objects to which localization and classification
        errors refer.
    """
    same_class, other_class = np.where(same, iou, 0), np.where(same, 0, iou)
    overlap, other_overlap = same_class.max(axis=1), other_class.max(axis=1)
    tests = (
        ("localisation", (overlap >= TOUCH) & (overlap < OVERLAP)),
        ("classification", other_overlap >= OVERLAP),
        ("duplicate", overlap >= OVERLAP),
        ("background", iou.max(axis=1) < TOUCH),
    )
    kinds = np.select(
        [test for _, test in tests], [KINDS.index(kind) for kind, _ in tests], KINDS.index("both")
    )
    referred = np.concatenate(
        [
            same_class.argmax(axis=1)[kinds == KINDS.index("localisation")],
            other_class.argmax(axis=1)[kinds == KINDS.index("classification")],
        ]
    )
    return kinds, referred


def _overlaps(
    evaluation: Evaluation, matches: Matches, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Compute the overlaps of the given detections with the objects, for each image that has both.

    Args:
        evaluation: evaluation of boxes.
        matches: matches of `evaluation`.
        rows: int64 [n], the detections, as rows of `matches`.

    Yields:
        For each image: indices into `rows` [d], objects of `matches` [o], their IoU float64 [d, o], and bool [d, o],
        whether they have the same class.
    """
    by_image = _by_image(matches.image[rows], matches.num_images)
    objects_by_image = _by_image(matches.object_image, matches.num_images)
    boxes, true_boxes = evaluation.found["bbox"][matches.row], evaluation.objects["bbox"][matches.object_row]
    for detections, objects in zip(by_image, objects_by_image, strict=True):
        if len(detections) and len(objects):
            iou = coco_mask.bbox_iou(
                boxes[rows[detections]], true_boxes[objects], np.zeros(len(objects), bool)
            )
            same = matches.category[rows[detections]][:, None] == matches.object_category[objects]
            yield detections, objects, iou, same


def _by_image(image: np.ndarray, num_images: int) -> list[np.ndarray]:
    """Return the row indices of each image, given the image index of each row."""
    order = np.argsort(image, kind="stable")
    return np.split(order, np.searchsorted(image[order], np.arange(1, num_images)))


def filter_by_score(
    ground_truth: Mapping[str, Any], evaluation: Evaluation, matches: Matches, min_score: float
) -> Evaluation:
    """Repeat an evaluation without crowds, detections matched with crowds, and detections below `min_score`.

    Args:
        ground_truth: ground truth of `evaluation`, as a COCO dict.
        evaluation: evaluation of boxes.
        matches: matches of `evaluation`.
        min_score: minimum score of the remaining detections.
    """
    rows = np.sort(matches.row[(matches.score >= min_score) & (matches.status[0] != IGNORED)])
    objects = [item for item in ground_truth.get("annotations", ()) if not item.get("iscrowd")]
    found = {name: column[rows] for name, column in evaluation.found.items()}
    return evaluate_detections({**ground_truth, "annotations": objects}, found)


def error_costs(filtered: Evaluation) -> tuple[dict[str, float], float]:
    """Return how much higher AP50 would be without the errors of each kind, and AP50 itself.

    Args:
        filtered: from `filter_by_score`.
    """
    tide = filtered.coco.tide_errors(pos_thr=OVERLAP, bg_thr=TOUCH)
    return {kind: float(tide["delta_ap"][name]) for kind, name in _TIDE.items()}, float(tide["ap_base"])
