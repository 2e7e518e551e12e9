"""Two models on the same data set: what is better, what is worse, and whether that is more than chance.

The comparison is paired: both are scored on the same resamples of the images, so that what makes an image hard for both
does not blur the difference.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from detr.metrics.bootstrap import interval, unbiased
from detr.metrics.coco_matching import FALSE, TRUE, Matches, matches_of
from raydetr.evaluation.analysis import MIN_SCORE, class_figures, class_names, count_panoptic
from raydetr.evaluation.figures import Evaluations, evaluate_predictions, figures_of
from raydetr.evaluation.intervals import CONFIDENCE, RESAMPLES, Resampled, resample
from raydetr.evaluation.panoptic_quality import PanopticCounts
from raydetr.evaluation.truth import Truth

_MOST_IMAGES = 12


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
        - classes: of each category with objects, ascending by id: id, name, objects, and AP: old, new, delta, low, high
        - images, resamples, confidence
        - changed: better and worse → at most 12 image ids, the largest change first. An image is better where the F1
          of its detections of a score of 0.3 or more, the mean over the IoU thresholds, is higher.

    Raises:
        DataError, ValueError: as `analyse`.
    """
    sides = [_side(truth, table, seed, resamples) for table in (old, new)]
    (before, matches, figures_before, drawn_before), (after, matches_after, figures_after, drawn_after) = (
        sides
    )
    names = class_names(truth)
    classes = []
    pairs = zip(class_figures(before.boxes), class_figures(after.boxes), strict=True)
    for index, (of_old, of_new) in enumerate(pairs):
        category_id = int(before.boxes.category_ids[index])
        objects = int((matches.object_category == index).sum())
        if objects:
            change = drawn_after.class_ap[:, index] - drawn_before.class_ap[:, index]
            row = {"id": category_id, "name": names[category_id], "objects": objects}
            classes.append(row | _change(of_old["AP"], of_new["AP"], change))
    common = [name for name in drawn_before.figures if name in drawn_after.figures]
    image_ids = before.boxes.image_ids
    gain = _image_scores(matches_after) - _image_scores(matches)
    return {
        "figures": {
            name: _figure(
                figures_before[name],
                figures_after[name],
                drawn_after.figures[name] - drawn_before.figures[name],
            )
            for name in common
        },
        "deltas": {
            name: figures_after[name] - value
            for name, value in figures_before.items()
            if name in figures_after
        },
        "classes": classes,
        "images": len(image_ids),
        "resamples": resamples,
        "confidence": CONFIDENCE,
        "changed": {"better": _largest(gain, image_ids), "worse": _largest(-gain, image_ids)},
    }


def _side(
    truth: Truth, predictions: pa.Table, seed: int, resamples: int
) -> tuple[Evaluations, Matches, dict[str, float], Resampled]:
    evaluations = evaluate_predictions(truth.coco(), predictions)
    matches = matches_of(evaluations.boxes)
    panoptic: PanopticCounts | None = count_panoptic(truth, predictions)
    drawn = resample(evaluations, matches, panoptic, seed, resamples)
    return evaluations, matches, figures_of(evaluations, panoptic), drawn


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
