"""What there is to know about predictions on a data set, as a plain dict: figures, how sure they are, what goes wrong.

`score.score` makes it, `record.keep` writes it as `analysis.json`, and the report is drawn from it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from detr.metrics.coco_matching import TRUE, Evaluation, Matches, matches_of
from raydetr.evaluation.errors_by_kind import KINDS, confident, duplicate_share, error_costs, find_errors
from raydetr.evaluation.figures import Evaluations, evaluate_predictions, figures_of
from raydetr.evaluation.ground_truth import Truth
from raydetr.evaluation.intervals import CONFIDENCE, RESAMPLES, intervals, resample
from raydetr.evaluation.panoptic_quality import PanopticCounts, class_qualities, count_segments
from raydetr.evaluation.slices import score_slices

MIN_SCORE = 0.3
"""Of the detections that the confusion matrix and the kinds of errors are about."""
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # of hotcoco's area ranges
_MOST = -1  # of its numbers of detections: 100


def analyse(
    truth: Truth,
    predictions: pa.Table,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    min_score: float = MIN_SCORE,
) -> dict[str, Any]:
    """Score predictions and look for what is wrong with them; equal input gives an equal result.

    Args:
        truth: of a whole data set. Masks are scored where it and the predictions have them, and so are segments.
        predictions: of `PREDICTION_SCHEMA`, of images of the data set.
        seed: of the resamples.
        resamples: of the images, from which the intervals are made.
        min_score: of the detections that `confusion`, `errors` and `worst` are about.

    Returns:
        A dict that JSON can hold; every figure is in 0..1, or -1 where the truth has nothing to score:

        - figures: `AP`, … (`METRIC_NAMES`), `mask_AP`, …, `PQ`, `SQ`, `RQ`, `PQ_things`, …
        - intervals: `AP`, `AP50`, `AP75`, `mask_AP`, `PQ` → [low, high]; confidence; resamples
        - classes: of each category, ascending by id: id, name, isthing, objects, images, its figures, and the score
          from which on its detections have the best F1 at IoU 0.5
        - curves: recall [101]; all: "0.50", "0.75", "mean" → precision [101]; classes: id → precision at IoU 0.5
        - confusion: names, with "background" last; counts [row of the truth][column of the prediction]
        - calibration: ece, mce and bins of all detections, of which those at IoU 0.5 are true
        - errors: counts and cost (AP50 points) of each of `KINDS`, and the AP50 they are lost from
        - duplicates: second detections at score 0.5 as a share of the objects, see `duplicate_share`
        - slices: by what → name, images, objects, AP, AP50
        - worst: kind of error → image ids, worst first
        - images, undecodable: how many

    Raises:
        DataError: masks or maps of the predictions do not fit.
        ValueError: the predictions have images that the truth does not have.
    """
    evaluations = evaluate_predictions(truth.coco(), predictions)
    boxes = evaluations.boxes
    matches = matches_of(boxes)
    panoptic = count_panoptic(truth, predictions)
    figures = figures_of(evaluations, panoptic)
    resampled = resample(evaluations, matches, panoptic, seed, resamples)
    errors = find_errors(boxes, matches, min_score)
    chosen = confident(truth.coco(), boxes, matches, min_score)
    costs, ap50 = error_costs(chosen)
    kinds = [kind for kind in KINDS if kind != "both"]
    return {
        "figures": figures,
        "intervals": intervals(figures, resampled),
        "confidence": CONFIDENCE,
        "resamples": resamples,
        "classes": _classes(truth, evaluations, matches, panoptic),
        "curves": _curves(boxes),
        "confusion": _confusion(truth, chosen, min_score),
        "calibration": _calibration(boxes),
        "errors": {"counts": errors.counts(), "cost": costs, "AP50": ap50, "min_score": min_score},
        "duplicates": duplicate_share(boxes, matches),
        "slices": score_slices(truth, boxes),
        "worst": {kind: errors.worst(kind, boxes.image_ids) for kind in kinds},
        "images": len(boxes.image_ids),
        "undecodable": len(predictions) - predictions.column("error").null_count,
    }


def count_panoptic(truth: Truth, predictions: pa.Table) -> PanopticCounts | None:
    """The segments of predictions matched with the truth's; None where either has none."""
    column = predictions.column("panoptic") if "panoptic" in predictions.column_names else None
    if not truth.panoptic or column is None or column.null_count == len(predictions):
        return None
    return count_segments(truth.panoptic, predictions, truth.categories)


def class_figures(evaluation: Evaluation) -> list[dict[str, float]]:
    """`AP`, `AP50`, `AP75`, `AP_small`, … and `AR_100` of each category, ascending by id."""
    precision, recall = evaluation.coco.eval["precision"], evaluation.coco.eval["recall"]
    return [
        {
            "AP": _mean(precision[:, :, index, _ALL, _MOST]),
            "AP50": _mean(precision[0, :, index, _ALL, _MOST]),
            "AP75": _mean(precision[5, :, index, _ALL, _MOST]),
            "AP_small": _mean(precision[:, :, index, _SMALL, _MOST]),
            "AP_medium": _mean(precision[:, :, index, _MEDIUM, _MOST]),
            "AP_large": _mean(precision[:, :, index, _LARGE, _MOST]),
            "AR_100": _mean(recall[:, index, _ALL, _MOST]),
        }
        for index in range(len(evaluation.category_ids))
    ]


def class_names(truth: Truth) -> dict[int, str]:
    """Category id → name."""
    return {int(category["id"]): str(category["name"]) for category in truth.categories}


def _mean(values: np.ndarray) -> float:
    """Of what pycocotools computed: -1 is no value."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _classes(
    truth: Truth, evaluations: Evaluations, matches: Matches, panoptic: PanopticCounts | None
) -> list[dict[str, Any]]:
    names = class_names(truth)
    things = {int(category["id"]): bool(category.get("isthing", 1)) for category in truth.categories}
    masks = None if evaluations.masks is None else class_figures(evaluations.masks)
    qualities = {} if panoptic is None else class_qualities(panoptic)
    rows = []
    for index, figures in enumerate(class_figures(evaluations.boxes)):
        category_id = int(evaluations.boxes.category_ids[index])
        images = matches.object_image[matches.object_category == index]
        row = {
            "id": category_id,
            "name": names[category_id],
            "isthing": things[category_id],
            "objects": len(images),
            "images": len(np.unique(images)),
            **figures,
        }
        if masks is not None:
            row |= {f"mask_{name}": masks[index][name] for name in ("AP", "AP50")}
        row |= qualities.get(category_id, {})
        row["best_threshold"], row["best_f1"] = _best_threshold(matches, index)
        rows.append(row)
    return rows


def _best_threshold(matches: Matches, category: int) -> tuple[float, float]:
    """The score from which on detections have the best F1 at IoU 0.5, the highest such one, and this F1; -1 for none."""
    rows = slice(*np.searchsorted(matches.category, [category, category + 1]))
    counted = matches.status[0, rows] >= 0
    scores, true = matches.score[rows][counted], matches.status[0, rows][counted] == TRUE
    objects = int((matches.object_category == category).sum())
    if not objects or not len(scores):
        return -1.0, 0.0 if objects else -1.0
    f1 = 2 * np.cumsum(true) / (np.arange(1, len(scores) + 1) + objects)
    f1[:-1][scores[:-1] == scores[1:]] = -1  # a threshold cannot part equal scores
    best = int(np.argmax(f1))
    return float(scores[best]), float(f1[best])


def _curves(evaluation: Evaluation) -> dict[str, Any]:
    precision = evaluation.coco.eval["precision"][:, :, :, _ALL, _MOST]
    scored = np.flatnonzero(precision[0, 0] > -1)
    of_scored = precision[:, :, scored]
    means = of_scored.mean(axis=2) if len(scored) else np.full(precision.shape[:2], -1.0)
    return {
        "recall": [float(recall) for recall in evaluation.coco.params.rec_thrs],
        "all": {
            "0.50": means[0].tolist(),
            "0.75": means[5].tolist(),
            "mean": means.mean(axis=0).tolist(),
        },
        "classes": {str(evaluation.category_ids[index]): precision[0, :, index].tolist() for index in scored},
    }


def _confusion(truth: Truth, chosen: Evaluation, min_score: float) -> dict[str, Any]:
    names = class_names(truth)
    return {
        "names": [*(names[int(category_id)] for category_id in chosen.category_ids), "background"],
        "counts": chosen.coco.confusion_matrix(iou_thr=0.5)["matrix"].astype(int).tolist(),
        "iou": 0.5,
        "min_score": min_score,
    }


def _calibration(evaluation: Evaluation) -> dict[str, Any]:
    found: Mapping[str, Any] = evaluation.coco.calibration(n_bins=10, iou_threshold=0.5)
    names = {
        "low": "bin_lower",
        "high": "bin_upper",
        "confidence": "avg_confidence",
        "accuracy": "avg_accuracy",
    }
    bins = [
        {**{name: float(each[key]) for name, key in names.items()}, "count": int(each["count"])}
        for each in found["bins"]
    ]
    return {"ece": float(found["ece"]), "mce": float(found["mce"]), "bins": bins}
