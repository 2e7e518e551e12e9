"""Analysis of predictions: metrics, confidence intervals, error breakdown.

`score.score` computes it, `evaluate` stores it as `analysis.json`, and `reports.page` renders it.
"""

import numpy as np
import pyarrow as pa

from detr.metrics.coco_matching import TRUE, Evaluation, Matches, extract_matches
from raydetr.evaluation.errors_by_kind import (
    KINDS,
    duplicate_share,
    error_costs,
    filter_by_score,
    find_errors,
)
from raydetr.evaluation.ground_truth import GroundTruth
from raydetr.evaluation.intervals import CONFIDENCE, RESAMPLES, intervals, resample
from raydetr.evaluation.metrics import Evaluations, evaluate_predictions, summarize_metrics
from raydetr.evaluation.panoptic_quality import PanopticCounts, class_qualities, count_segments
from raydetr.evaluation.slices import score_slices
from raydetr.results.analysis import (
    Analysis,
    Calibration,
    CalibrationBin,
    ClassMetrics,
    Confusion,
    Curves,
    ErrorBreakdown,
)

MIN_SCORE = 0.3
"""Minimum score of the detections in the confusion matrix and the error breakdown."""
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # indices into hotcoco's area ranges
_MAX_DETECTIONS = -1  # index into hotcoco's detection limits: 100 per image


def analyze(
    ground_truth: GroundTruth,
    predictions: pa.Table,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    min_score: float = MIN_SCORE,
) -> Analysis:
    """Compute metrics, intervals and the error breakdown of predictions. The result is deterministic.

    Args:
        ground_truth: ground truth of a whole data set. Masks and segments are scored if both it and the predictions
            have them.
        predictions: table of `PREDICTION_SCHEMA` for images of the data set.
        seed: seed of the bootstrap.
        resamples: number of bootstrap resamples of the images.
        min_score: minimum score of the detections in `confusion`, `errors` and `worst`.

    Raises:
        DataError: masks or panoptic maps of the predictions are inconsistent.
        ValueError: the predictions contain images that the ground truth does not have.
    """
    evaluations = evaluate_predictions(ground_truth.coco(), predictions)
    boxes = evaluations.boxes
    matches = extract_matches(boxes)
    panoptic = count_panoptic(ground_truth, predictions)
    metrics = summarize_metrics(evaluations, panoptic)
    resampled = resample(evaluations, matches, panoptic, seed, resamples)
    errors = find_errors(boxes, matches, min_score)
    filtered = filter_by_score(ground_truth.coco(), boxes, matches, min_score)
    costs, ap50 = error_costs(filtered)
    return Analysis(
        metrics=metrics,
        images=len(boxes.image_ids),
        undecodable=len(predictions) - predictions.column("error").null_count,
        intervals=intervals(metrics, resampled),
        confidence=CONFIDENCE,
        resamples=resamples,
        classes=_classes(ground_truth, evaluations, matches, panoptic),
        curves=_curves(boxes),
        confusion=_confusion(ground_truth, filtered, min_score),
        calibration=_calibration(boxes),
        errors=ErrorBreakdown(errors.counts(), costs, ap50, min_score),
        duplicates=duplicate_share(boxes, matches),
        slices=score_slices(ground_truth, boxes),
        worst={kind: errors.worst(kind, boxes.image_ids) for kind in KINDS if kind != "both"},
    )


def count_panoptic(ground_truth: GroundTruth, predictions: pa.Table) -> PanopticCounts | None:
    """Match predicted segments with those of the ground truth; None if either has no segments."""
    column = predictions.column("panoptic") if "panoptic" in predictions.column_names else None
    if not ground_truth.panoptic or column is None or column.null_count == len(predictions):
        return None
    return count_segments(ground_truth.panoptic, predictions, ground_truth.categories)


def class_metrics(evaluation: Evaluation) -> list[dict[str, float]]:
    """Return `AP`, `AP50`, `AP75`, `AP_small`, … and `AR_100` of each category, ascending by id."""
    precision, recall = evaluation.coco.eval["precision"], evaluation.coco.eval["recall"]
    return [
        {
            "AP": _mean(precision[:, :, index, _ALL, _MAX_DETECTIONS]),
            "AP50": _mean(precision[0, :, index, _ALL, _MAX_DETECTIONS]),
            "AP75": _mean(precision[5, :, index, _ALL, _MAX_DETECTIONS]),
            "AP_small": _mean(precision[:, :, index, _SMALL, _MAX_DETECTIONS]),
            "AP_medium": _mean(precision[:, :, index, _MEDIUM, _MAX_DETECTIONS]),
            "AP_large": _mean(precision[:, :, index, _LARGE, _MAX_DETECTIONS]),
            "AR_100": _mean(recall[:, index, _ALL, _MAX_DETECTIONS]),
        }
        for index in range(len(evaluation.category_ids))
    ]


def class_names(ground_truth: GroundTruth) -> dict[int, str]:
    """Return category id → name."""
    return {int(category["id"]): str(category["name"]) for category in ground_truth.categories}


def _mean(values: np.ndarray) -> float:
    """Average values of pycocotools' result arrays, in which -1 means missing."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _classes(
    ground_truth: GroundTruth, evaluations: Evaluations, matches: Matches, panoptic: PanopticCounts | None
) -> tuple[ClassMetrics, ...]:
    names = class_names(ground_truth)
    things = {int(category["id"]): bool(category.get("isthing", 1)) for category in ground_truth.categories}
    masks = None if evaluations.masks is None else class_metrics(evaluations.masks)
    qualities = {} if panoptic is None else class_qualities(panoptic)
    rows = []
    for index, metrics in enumerate(class_metrics(evaluations.boxes)):
        category_id = int(evaluations.boxes.category_ids[index])
        images = matches.object_image[matches.object_category == index]
        if masks is not None:
            metrics |= {f"mask_{name}": masks[index][name] for name in ("AP", "AP50")}
        best_threshold, best_f1 = _best_threshold(matches, index)
        rows.append(
            ClassMetrics(
                id=category_id,
                name=names[category_id],
                objects=len(images),
                images=len(np.unique(images)),
                metrics=metrics | qualities.get(category_id, {}),
                isthing=things[category_id],
                best_threshold=best_threshold,
                best_f1=best_f1,
            )
        )
    return tuple(rows)


def _best_threshold(matches: Matches, category: int) -> tuple[float, float]:
    """Return the score threshold with the best F1 at IoU 0.5 and this F1; -1 if there is none.

    Of several thresholds with the best F1, the highest is returned.
    """
    rows = slice(*np.searchsorted(matches.category, [category, category + 1]))
    valid = matches.status[0, rows] >= 0
    scores, true = matches.score[rows][valid], matches.status[0, rows][valid] == TRUE
    objects = int((matches.object_category == category).sum())
    if not objects or not len(scores):
        return -1.0, 0.0 if objects else -1.0
    # F1 = 2 TP / (detections + objects) for each prefix of the detections, which are sorted by descending score.
    f1 = 2 * np.cumsum(true) / (np.arange(1, len(scores) + 1) + objects)
    f1[:-1][scores[:-1] == scores[1:]] = -1  # no threshold separates equal scores
    best = int(np.argmax(f1))
    return float(scores[best]), float(f1[best])


def _curves(evaluation: Evaluation) -> Curves:
    precision = evaluation.coco.eval["precision"][:, :, :, _ALL, _MAX_DETECTIONS]
    scored = np.flatnonzero(precision[0, 0] > -1)
    of_scored = precision[:, :, scored]
    means = of_scored.mean(axis=2) if len(scored) else np.full(precision.shape[:2], -1.0)
    lines = {"0.50": means[0], "0.75": means[5], "mean": means.mean(axis=0)}
    return Curves(
        recall=tuple(float(recall) for recall in evaluation.coco.params.rec_thrs),
        overall={name: tuple(line.tolist()) for name, line in lines.items()},
        classes={
            int(evaluation.category_ids[index]): tuple(precision[0, :, index].tolist()) for index in scored
        },
    )


def _confusion(ground_truth: GroundTruth, filtered: Evaluation, min_score: float) -> Confusion:
    names = class_names(ground_truth)
    counts = filtered.coco.confusion_matrix(iou_thr=0.5)["matrix"].astype(int).tolist()
    return Confusion(
        names=(*(names[int(category_id)] for category_id in filtered.category_ids), "background"),
        counts=tuple(map(tuple, counts)),
        iou=0.5,
        min_score=min_score,
    )


def _calibration(evaluation: Evaluation) -> Calibration:
    result = evaluation.coco.calibration(n_bins=10, iou_threshold=0.5)
    bins = tuple(
        CalibrationBin(
            low=float(each["bin_lower"]),
            high=float(each["bin_upper"]),
            confidence=float(each["avg_confidence"]),
            accuracy=float(each["avg_accuracy"]),
            count=int(each["count"]),
        )
        for each in result["bins"]
    )
    return Calibration(float(result["ece"]), float(result["mce"]), bins)
