"""Metrics of predictions on a data set: COCO metrics of boxes and masks, and panoptic quality."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from detr.metrics.coco import METRIC_NAMES, coco_metrics
from detr.metrics.coco_matching import Columns, Evaluation, evaluate_detections
from raydetr.errors import DataError
from raydetr.evaluation.panoptic_quality import NAMES, PanopticCounts, panoptic_metrics


@dataclass(frozen=True)
class Evaluations:
    """Predictions of a data set matched with its ground truth.

    boxes: evaluation of all objects.
    masks: evaluation of the objects that have a mask; None if the predictions or the ground truth have no masks.
    """

    boxes: Evaluation
    masks: Evaluation | None


def evaluate_predictions(ground_truth: Mapping[str, Any], predictions: pa.Table) -> Evaluations:
    """Match predictions with all objects of a data set.

    Args:
        ground_truth: ground truth as a COCO dict. Masks are in the field `segmentation` of the annotations.
        predictions: table of `PREDICTION_SCHEMA`. Objects of images that are not in it count as missed.

    Raises:
        DataError: an image has different numbers of masks and detections.
        ValueError: the ground truth lacks a field or an image of the predictions.
    """
    boxes = evaluate_detections(ground_truth, detection_columns(predictions))
    with_masks = [item for item in ground_truth.get("annotations", ()) if item.get("segmentation")]
    if not with_masks or not has_masks(predictions):
        return Evaluations(boxes, None)
    masks = mask_columns(predictions)
    return Evaluations(boxes, evaluate_detections({**ground_truth, "annotations": with_masks}, masks, "segm"))


def summarize_metrics(evaluations: Evaluations, panoptic: PanopticCounts | None = None) -> dict[str, float]:
    """Compute all metrics by name: `AP`, …, with masks `mask_AP`, …, and with segments `PQ`, …

    A metric is -1 if the ground truth has nothing to score.
    """
    metrics = coco_metrics(evaluations.boxes)
    if evaluations.masks is not None:
        metrics |= {f"mask_{name}": value for name, value in coco_metrics(evaluations.masks).items()}
    return metrics if panoptic is None else metrics | panoptic_metrics(panoptic)


def metric_names(masks: bool, panoptic: bool) -> list[str]:
    """Return the names of the metrics of `summarize_metrics`, in its order."""
    names = [*METRIC_NAMES, *(f"mask_{name}" for name in METRIC_NAMES if masks)]
    groups = ("", "_things", "_stuff") if panoptic else ()
    return names + [f"{name}{group}" for group in groups for name in NAMES]


def has_masks(predictions: pa.Table) -> bool:
    """Return whether predictions contain masks of objects."""
    return "mask" in predictions.column_names and predictions.column("mask").null_count < len(predictions)


def detection_columns(predictions: pa.Table) -> Columns:
    """Flatten predictions to columns with one value per detection.

    Returns:
        `image_id`, `category_id`, `score` and `bbox` (x, y, width, height).
    """
    counts = _lengths(predictions, "category_id")
    return {
        "image_id": np.repeat(predictions.column("image_id").to_numpy(), counts),
        "category_id": _flat(predictions, "category_id").to_numpy(zero_copy_only=False),
        "score": _flat(predictions, "score").to_numpy(zero_copy_only=False).astype(np.float64),
        "bbox": _flat(predictions, "bbox").flatten().to_numpy(zero_copy_only=False).reshape(-1, 4),
    }


def mask_columns(predictions: pa.Table) -> Columns:
    """Flatten predictions to columns with one value per detection: `image_id`, `category_id`, `score`, `rle`.

    Raises:
        DataError: an image has different numbers of masks and detections.
    """
    columns = detection_columns(predictions)
    del columns["bbox"]
    counts, masks = _lengths(predictions, "category_id"), _lengths(predictions, "mask")
    for row in np.flatnonzero(counts != masks)[:1].tolist():
        image_id = predictions.column("image_id")[row].as_py()
        raise DataError(
            f"image {image_id}: the predictions have {counts[row]} detections and {masks[row]} masks, expected one "
            "mask per detection. Delete the predictions and evaluate again."
        )
    rows = np.repeat(np.arange(len(predictions)), counts)
    sizes = list(zip(predictions.column("height").to_pylist(), predictions.column("width").to_pylist()))
    texts = _flat(predictions, "mask").cast(pa.string()).to_pylist()
    columns["rle"] = np.empty(len(rows), object)
    columns["rle"][:] = [{"size": sizes[row], "counts": text} for row, text in zip(rows.tolist(), texts)]
    return columns


def _lengths(predictions: pa.Table, name: str) -> np.ndarray:
    lengths = pc.fill_null(pc.list_value_length(predictions.column(name)), 0)
    return lengths.to_numpy().astype(np.int64)


def _flat(predictions: pa.Table, name: str) -> pa.Array:
    """Flatten a column of lists by one level."""
    return pc.list_flatten(predictions.column(name)).combine_chunks()
