"""Comparison of two models on the same data set: differences of metrics and their confidence intervals.

The comparison is paired: both models are scored on the same resamples of the images. So the difficulty of the images,
which affects both models alike, does not widen the interval of the difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from detr.metrics.bootstrap import interval, unbiased
from detr.metrics.coco_matching import FALSE, TRUE, Evaluation, Matches, extract_matches
from raydetr.evaluation.analysis import MIN_SCORE, class_metrics, class_names, count_panoptic
from raydetr.evaluation.ground_truth import GroundTruth
from raydetr.evaluation.intervals import CONFIDENCE, RESAMPLES, Resampled, resample
from raydetr.evaluation.metrics import Evaluations, evaluate_predictions, summarize_metrics
from raydetr.evaluation.panoptic_quality import PanopticCounts, class_qualities
from raydetr.results.comparison import Change, ChangedImages, ClassChange, Comparison

_MAX_IMAGES = 12
_BOX_METRICS = ("AP", "AP50", "AP75")


def compare(
    ground_truth: GroundTruth,
    old: pa.Table,
    new: pa.Table,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compare the predictions of two models. The result is deterministic.

    Args:
        ground_truth: ground truth of the data set that both models predicted.
        old, new: tables of `PREDICTION_SCHEMA`.
        seed: seed of the bootstrap.
        resamples: number of bootstrap resamples of the images.

    Returns:
        The comparison, with at most 12 improved and 12 degraded images. The score of an image is the F1 of its
        detections with a score of at least 0.3, averaged over the IoU thresholds.

    Raises:
        DataError, ValueError: as `analyze`.
    """
    before, after = [_score_model(ground_truth, table, seed, resamples) for table in (old, new)]
    common = [name for name in before.resampled.metrics if name in after.resampled.metrics]
    gain = _image_scores(after.matches) - _image_scores(before.matches)
    return Comparison(
        metrics={
            name: _metric_change(
                before.metrics[name],
                after.metrics[name],
                after.resampled.metrics[name] - before.resampled.metrics[name],
            )
            for name in common
        },
        deltas={
            name: after.metrics[name] - value
            for name, value in before.metrics.items()
            if name in after.metrics
        },
        classes={name: _class_changes(name, before, after, class_names(ground_truth)) for name in common},
        images=len(before.image_ids),
        resamples=resamples,
        confidence=CONFIDENCE,
        changed=ChangedImages(_largest(gain, before.image_ids), _largest(-gain, before.image_ids)),
    )


@dataclass(frozen=True)
class _ModelScores:
    """Metrics of one model.

    image_ids: int64 [images].
    matches: matches of its boxes.
    metrics: name → value on the data set.
    resampled: values on the resamples.
    classes: each name in `resampled` → value of each category, ascending by id.
    objects: each name in `resampled` → int64 [categories], number of ground-truth objects that the metric counts.
    """

    image_ids: np.ndarray
    matches: Matches
    metrics: Mapping[str, float]
    resampled: Resampled
    classes: Mapping[str, Sequence[float]]
    objects: Mapping[str, np.ndarray]


def _score_model(ground_truth: GroundTruth, predictions: pa.Table, seed: int, resamples: int) -> _ModelScores:
    evaluations = evaluate_predictions(ground_truth.coco(), predictions)
    matches = extract_matches(evaluations.boxes)
    panoptic = count_panoptic(ground_truth, predictions)
    return _ModelScores(
        evaluations.boxes.image_ids,
        matches,
        summarize_metrics(evaluations, panoptic),
        resample(evaluations, matches, panoptic, seed, resamples),
        *_class_scores(evaluations, panoptic),
    )


def _class_scores(
    evaluations: Evaluations, panoptic: PanopticCounts | None
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Compute `classes` and `objects` of `_ModelScores`."""
    rows = class_metrics(evaluations.boxes)
    classes = {name: [row[name] for row in rows] for name in _BOX_METRICS}
    objects = dict.fromkeys(_BOX_METRICS, _count_objects(evaluations.boxes))
    if evaluations.masks is not None:
        classes["mask_AP"] = [row["AP"] for row in class_metrics(evaluations.masks)]
        objects["mask_AP"] = _count_objects(evaluations.masks)
    if panoptic is not None:
        classes["PQ"] = [row["PQ"] for row in class_qualities(panoptic).values()]
        _, matched, _, missed = panoptic.counts.sum(axis=0).T
        objects["PQ"] = (matched + missed).astype(np.int64)
    return classes, objects


def _count_objects(evaluation: Evaluation) -> np.ndarray:
    """Count the objects of each category, without crowds: int64 [categories]."""
    category_ids = evaluation.objects["category_id"][evaluation.objects["iscrowd"] == 0]
    return np.bincount(
        np.searchsorted(evaluation.category_ids, category_ids), minlength=len(evaluation.category_ids)
    )


def _class_changes(
    metric: str, before: _ModelScores, after: _ModelScores, names: Mapping[int, str]
) -> tuple[ClassChange, ...]:
    resampled = after.resampled.classes[metric] - before.resampled.classes[metric]
    return tuple(
        ClassChange(
            category_id,
            names[category_id],
            int(before.objects[metric][index]),
            _change(before.classes[metric][index], after.classes[metric][index], resampled[:, index]),
        )
        for index, category_id in enumerate(sorted(names))
        if before.objects[metric][index]
    )


def _change(old: float, new: float, resampled: np.ndarray) -> Change:
    low, high = interval(new - old, resampled, CONFIDENCE, least=-1.0)
    return Change(old, new, new - old, low, high)


def _metric_change(old: float, new: float, resampled: np.ndarray) -> Change:
    centered = unbiased(new - old, resampled)
    better = float((centered > 0).mean()) if len(centered) else 0.0
    return replace(_change(old, new, resampled), probability_better=better)


def _image_scores(matches: Matches) -> np.ndarray:
    """Compute the F1 of each image over its detections with at least `MIN_SCORE`, averaged over the IoU thresholds."""
    chosen = matches.score >= MIN_SCORE
    count = matches.num_images
    objects = np.bincount(matches.object_image, minlength=count)
    scores = np.zeros(count)
    for status in matches.status:
        true = np.bincount(matches.image[chosen & (status == TRUE)], minlength=count)
        detections = true + np.bincount(matches.image[chosen & (status == FALSE)], minlength=count)
        total = detections + objects
        scores += np.where(total > 0, 2 * true / np.maximum(total, 1), 1) / len(matches.status)
    return scores


def _largest(gain: np.ndarray, image_ids: np.ndarray) -> tuple[int, ...]:
    """Return the ids of the images with the largest positive gain, at most `_MAX_IMAGES`."""
    order = np.argsort(-gain, kind="stable")[:_MAX_IMAGES]
    return tuple(int(image_ids[position]) for position in order if gain[position] > 1e-9)
