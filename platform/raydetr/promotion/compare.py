"""Two models on the same data set: what is better, what is worse, and whether that is more than chance.

The comparison is paired: both are scored on the same resamples of the images, so that what makes an image hard for both
does not blur the difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from detr.metrics.bootstrap import interval, unbiased
from detr.metrics.coco_matching import FALSE, TRUE, Evaluation, Matches, matches_of
from raydetr.evaluation.analysis import MIN_SCORE, class_figures, class_names, count_panoptic
from raydetr.evaluation.figures import Evaluations, evaluate_predictions, figures_of
from raydetr.evaluation.ground_truth import Truth
from raydetr.evaluation.intervals import CONFIDENCE, RESAMPLES, Resampled, resample
from raydetr.evaluation.panoptic_quality import PanopticCounts, class_qualities

_MOST_IMAGES = 12
_BOX_FIGURES = ("AP", "AP50", "AP75")


def compare(
    truth: Truth,
    old: pa.Table,
    new: pa.Table,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Compare the predictions of two models; equal input gives an equal result.

    Args:
        truth: of the data set that both predicted.
        old, new: of `PREDICTION_SCHEMA`.
        seed: of the resamples.
        resamples: of the images.

    Returns:
        A dict that JSON can hold; a figure is in 0..1, or -1 where the truth has nothing to score:

        - figures: `AP`, `AP50`, `AP75`, `mask_AP`, `PQ` → old, new, delta, low, high (of the delta), and
          probability_better, the share of resamples in which the delta is above 0; those that both sides have
        - deltas: every figure of both sides → new less old, 0 where the truth has nothing to score
        - classes: each of `figures` → of each category with objects that it counts, ascending by id: id, name, objects
          (of `PQ` segments, of `mask_AP` those with a mask), and old, new, delta, low, high
        - images, resamples, confidence
        - changed: better and worse → at most 12 image ids, the largest change first. An image is better where the F1
          of its detections of a score of 0.3 or more, the mean over the IoU thresholds, is higher.

    Raises:
        DataError, ValueError: as `analyse`.
    """
    before, after = [_side(truth, table, seed, resamples) for table in (old, new)]
    common = [name for name in before.drawn.figures if name in after.drawn.figures]
    gain = _image_scores(after.matches) - _image_scores(before.matches)
    return {
        "figures": {
            name: _figure(
                before.figures[name],
                after.figures[name],
                after.drawn.figures[name] - before.drawn.figures[name],
            )
            for name in common
        },
        "deltas": {
            name: after.figures[name] - value
            for name, value in before.figures.items()
            if name in after.figures
        },
        "classes": {name: _classes(name, before, after, class_names(truth)) for name in common},
        "images": len(before.image_ids),
        "resamples": resamples,
        "confidence": CONFIDENCE,
        "changed": {
            "better": _largest(gain, before.image_ids),
            "worse": _largest(-gain, before.image_ids),
        },
    }


@dataclass(frozen=True)
class _Side:
    """One model.

    image_ids: int64 [images].
    matches: of its boxes.
    figures: all of them.
    drawn: those of the resamples.
    classes: each of `drawn` → the figure of each category, ascending by id.
    objects: each of `drawn` → int64 [categories], how many objects of the truth it counts.
    """

    image_ids: np.ndarray
    matches: Matches
    figures: Mapping[str, float]
    drawn: Resampled
    classes: Mapping[str, Sequence[float]]
    objects: Mapping[str, np.ndarray]


def _side(truth: Truth, predictions: pa.Table, seed: int, resamples: int) -> _Side:
    evaluations = evaluate_predictions(truth.coco(), predictions)
    matches = matches_of(evaluations.boxes)
    panoptic = count_panoptic(truth, predictions)
    return _Side(
        evaluations.boxes.image_ids,
        matches,
        figures_of(evaluations, panoptic),
        resample(evaluations, matches, panoptic, seed, resamples),
        *_of_classes(evaluations, panoptic),
    )


def _of_classes(
    evaluations: Evaluations, panoptic: PanopticCounts | None
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """`classes` and `objects` of a side."""
    rows = class_figures(evaluations.boxes)
    classes = {name: [row[name] for row in rows] for name in _BOX_FIGURES}
    objects = dict.fromkeys(_BOX_FIGURES, _count_objects(evaluations.boxes))
    if evaluations.masks is not None:
        classes["mask_AP"] = [row["AP"] for row in class_figures(evaluations.masks)]
        objects["mask_AP"] = _count_objects(evaluations.masks)
    if panoptic is not None:
        classes["PQ"] = [row["PQ"] for row in class_qualities(panoptic).values()]
        _, matched, _, missed = panoptic.counts.sum(axis=0).T
        objects["PQ"] = (matched + missed).astype(np.int64)
    return classes, objects


def _count_objects(evaluation: Evaluation) -> np.ndarray:
    """Objects of each category without crowds, int64 [categories]."""
    counted = evaluation.objects["category_id"][evaluation.objects["iscrowd"] == 0]
    return np.bincount(
        np.searchsorted(evaluation.category_ids, counted), minlength=len(evaluation.category_ids)
    )


def _classes(figure: str, before: _Side, after: _Side, names: Mapping[int, str]) -> list[dict[str, Any]]:
    change = after.drawn.classes[figure] - before.drawn.classes[figure]
    return [
        {"id": category_id, "name": names[category_id], "objects": int(before.objects[figure][index])}
        | _change(before.classes[figure][index], after.classes[figure][index], change[:, index])
        for index, category_id in enumerate(sorted(names))
        if before.objects[figure][index]
    ]


def _change(old: float, new: float, drawn: np.ndarray) -> dict[str, float]:
    low, high = interval(new - old, drawn, CONFIDENCE, least=-1.0)
    return {"old": old, "new": new, "delta": new - old, "low": low, "high": high}


def _figure(old: float, new: float, drawn: np.ndarray) -> dict[str, float]:
    drawn_again = unbiased(new - old, drawn)
    better = float((drawn_again > 0).mean()) if len(drawn_again) else 0.0
    return _change(old, new, drawn) | {"probability_better": better}


def _image_scores(matches: Matches) -> np.ndarray:
    """F1 of each image over its detections of `MIN_SCORE` or more, the mean over the IoU thresholds: [images]."""
    chosen = matches.score >= MIN_SCORE
    count = matches.num_images
    objects = np.bincount(matches.object_image, minlength=count)
    scores = np.zeros(count)
    for status in matches.status:
        true = np.bincount(matches.image[chosen & (status == TRUE)], minlength=count)
        counted = true + np.bincount(matches.image[chosen & (status == FALSE)], minlength=count)
        total = counted + objects
        scores += np.where(total > 0, 2 * true / np.maximum(total, 1), 1) / len(matches.status)
    return scores


def _largest(gain: np.ndarray, image_ids: np.ndarray) -> list[int]:
    order = np.argsort(-gain, kind="stable")[:_MOST_IMAGES]
    return [int(image_ids[position]) for position in order if gain[position] > 1e-9]
