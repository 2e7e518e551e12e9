"""What goes wrong with detections: TIDE's kinds of errors (Bolya et al. 2020), image by image.

A detection that is not true at IoU 0.5 is, the first that fits,

- localisation: an object of its class overlaps it by 0.1 to 0.5;
- classification: an object of another class overlaps it by 0.5 or more;
- duplicate: an object of its class overlaps it by 0.5 or more, and another detection has it;
- background: no object overlaps it by more than 0.1;
- both: what is left, an object of another class at 0.1 to 0.5.

An object that is not found is missed, unless a localisation or classification error is about it. Crowds and detections
matched with them are left out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hotcoco import mask as coco_mask

from detr.metrics.coco_matching import FALSE, IGNORED, Evaluation, Matches, evaluate_detections

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
OVERLAP, TOUCH = 0.5, 0.1
"""IoU of a true detection, and of one that is about an object at all."""
_TIDE = dict(zip(KINDS, ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")))


@dataclass(frozen=True)
class Errors:
    """Errors of detections of a least score.

    image, kind: int64 [n], an error's position in `Evaluation.image_ids` and in `KINDS`.
    weight: float64 [n], the detection's score; 1 for a missed object.
    """

    image: np.ndarray
    kind: np.ndarray
    weight: np.ndarray

    def counts(self) -> dict[str, int]:
        """How many errors there are of each kind."""
        return dict(zip(KINDS, np.bincount(self.kind, minlength=len(KINDS)).tolist()))

    def worst(self, kind: str, image_ids: np.ndarray, most: int = 12) -> list[int]:
        """The images with the most errors of a kind, which weigh by their scores, worst first."""
        rows = self.kind == KINDS.index(kind)
        weight = np.bincount(self.image[rows], self.weight[rows], minlength=len(image_ids))
        order = np.argsort(-weight, kind="stable")[:most]
        return [int(image_ids[position]) for position in order if weight[position] > 0]


def find_errors(evaluation: Evaluation, matches: Matches, min_score: float) -> Errors:
    """Name the errors of detections of boxes that have `min_score` or more."""
    wrong = np.flatnonzero((matches.score >= min_score) & (matches.status[0] == FALSE))
    kinds = np.full(len(wrong), KINDS.index("background"))
    missed = ~found_objects(evaluation, matches, min_score)
    for found, truth, iou, same in _overlaps(evaluation, matches, wrong):
        kinds[found], about = _kinds(iou, same)
        missed[truth[about]] = False
    lost = np.flatnonzero(missed)
    return Errors(
        np.concatenate([matches.image[wrong], matches.object_image[lost]]),
        np.concatenate([kinds, np.full(len(lost), KINDS.index("missed"))]),
        np.concatenate([matches.score[wrong], np.ones(len(lost))]),
    )


def duplicate_share(evaluation: Evaluation, matches: Matches, min_score: float = 0.5) -> float:
    """Second detections of objects, as a share of the objects; 0 where there are none.

    A second detection has an IoU of at least 0.5 with an object of its class but no match, because detections
    of higher scores are matched with all such objects. TIDE's kind "duplicate" omits those that overlap an
    object of another class as well.

    Args:
        evaluation: of boxes.
        matches: of it.
        min_score: of the detections that count.
    """
    wrong = np.flatnonzero((matches.score >= min_score) & (matches.status[0] == FALSE))
    second = sum(
        np.count_nonzero((same & (iou >= OVERLAP)).any(axis=1))
        for _, _, iou, same in _overlaps(evaluation, matches, wrong)
    )
    return second / max(len(matches.object_row), 1)


def found_objects(evaluation: Evaluation, matches: Matches, min_score: float) -> np.ndarray:
    """Whether a detection with `min_score` or more has the object at IoU 0.5: bool [objects]."""
    found_by = matches.found_by[0]
    scores = np.append(evaluation.found["score"], -np.inf)
    return (found_by >= 0) & (scores[found_by] >= min_score)


def _kinds(iou: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kinds of wrong detections of an image, and the objects that localisation and classification errors are about.

    Args:
        iou: float64 [n, objects], objects at least 1.
        same: bool [n, objects], whether the classes are the same.
    """
    of_class, of_others = np.where(same, iou, 0), np.where(same, 0, iou)
    overlap, other_overlap = of_class.max(axis=1), of_others.max(axis=1)
    tests = (
        ("localisation", (overlap >= TOUCH) & (overlap < OVERLAP)),
        ("classification", other_overlap >= OVERLAP),
        ("duplicate", overlap >= OVERLAP),
        ("background", iou.max(axis=1) < TOUCH),
    )
    kinds = np.select(
        [test for _, test in tests], [KINDS.index(kind) for kind, _ in tests], KINDS.index("both")
    )
    about = np.concatenate(
        [
            of_class.argmax(axis=1)[kinds == KINDS.index("localisation")],
            of_others.argmax(axis=1)[kinds == KINDS.index("classification")],
        ]
    )
    return kinds, about


def _overlaps(
    evaluation: Evaluation, matches: Matches, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Detections and objects of each image that has both.

    Args:
        evaluation: of boxes.
        matches: of it.
        rows: int64 [n], of `matches`, the detections.

    Yields:
        Positions in `rows` [d], objects of `matches` [o], their IoU float64 [d, o], and bool [d, o],
        whether they have the same class.
    """
    detections = _by_image(matches.image[rows], matches.num_images)
    objects = _by_image(matches.object_image, matches.num_images)
    boxes, true_boxes = evaluation.found["bbox"][matches.row], evaluation.objects["bbox"][matches.object_row]
    for found, truth in zip(detections, objects, strict=True):
        if len(found) and len(truth):
            iou = coco_mask.bbox_iou(boxes[rows[found]], true_boxes[truth], np.zeros(len(truth), bool))
            same = matches.category[rows[found]][:, None] == matches.object_category[truth]
            yield found, truth, iou, same


def _by_image(image: np.ndarray, num_images: int) -> list[np.ndarray]:
    """The rows of each image."""
    order = np.argsort(image, kind="stable")
    return np.split(order, np.searchsorted(image[order], np.arange(1, num_images)))


def confident(
    truth: Mapping[str, Any], evaluation: Evaluation, matches: Matches, min_score: float
) -> Evaluation:
    """The same evaluation without crowds, detections matched with them, and detections below `min_score`.

    Args:
        truth: what `evaluation` was made of.
        evaluation: of boxes.
        matches: of it.
        min_score: of the detections that are kept.
    """
    rows = np.sort(matches.row[(matches.score >= min_score) & (matches.status[0] != IGNORED)])
    objects = [item for item in truth.get("annotations", ()) if not item.get("iscrowd")]
    found = {name: column[rows] for name, column in evaluation.found.items()}
    return evaluate_detections({**truth, "annotations": objects}, found)


def error_costs(chosen: Evaluation) -> tuple[dict[str, float], float]:
    """How much higher AP50 would be without the errors of each kind, and AP50.

    Args:
        chosen: from `confident`.
    """
    tide = chosen.coco.tide_errors(pos_thr=OVERLAP, bg_thr=TOUCH)
    return {kind: float(tide["delta_ap"][name]) for kind, name in _TIDE.items()}, float(tide["ap_base"])
