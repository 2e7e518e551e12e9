"""The figures of predictions on a data set: COCO's of boxes and masks, and panoptic quality."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from detr.metrics.coco import METRIC_NAMES, coco_figures
from detr.metrics.coco_matching import Columns, Evaluation, evaluate_detections
from raydetr.errors import DataError
from raydetr.evaluation.panoptic_quality import NAMES, PanopticCounts, panoptic_figures


@dataclass(frozen=True)
class Evaluations:
    """Predictions of a data set matched with its truth.

    masks: None where the predictions or the truth have none. Objects without a mask are left out of it.
    """

    boxes: Evaluation
    masks: Evaluation | None


def evaluate_predictions(truth: Mapping[str, Any], predictions: pa.Table) -> Evaluations:
    """Match predictions with all objects of a data set.

    Args:
        truth: a COCO dict; an annotation that has a mask has it as `segmentation`.
        predictions: of `PREDICTION_SCHEMA`; objects of images that it does not have count as missed.

    Raises:
        DataError: an image has other numbers of masks and detections.
        ValueError: the truth lacks a field, or does not have an image of the predictions.
    """
    boxes = evaluate_detections(truth, detection_columns(predictions))
    with_masks = [item for item in truth.get("annotations", ()) if item.get("segmentation")]
    if not with_masks or not has_masks(predictions):
        return Evaluations(boxes, None)
    found = mask_columns(predictions)
    return Evaluations(boxes, evaluate_detections({**truth, "annotations": with_masks}, found, "segm"))


def figures_of(evaluations: Evaluations, panoptic: PanopticCounts | None = None) -> dict[str, float]:
    """All figures by name: `AP`, …, with masks `mask_AP`, …, and with segments `PQ`, …; -1 where the truth has none."""
    figures = coco_figures(evaluations.boxes)
    if evaluations.masks is not None:
        figures |= {f"mask_{name}": value for name, value in coco_figures(evaluations.masks).items()}
    return figures if panoptic is None else figures | panoptic_figures(panoptic)


def figure_names(masks: bool, panoptic: bool) -> list[str]:
    """The names that `figures_of` gives, in its order."""
    names = [*METRIC_NAMES, *(f"mask_{name}" for name in METRIC_NAMES if masks)]
    groups = ("", "_things", "_stuff") if panoptic else ()
    return names + [f"{name}{group}" for group in groups for name in NAMES]


def has_masks(predictions: pa.Table) -> bool:
    """Whether masks of objects were predicted."""
    return "mask" in predictions.column_names and predictions.column("mask").null_count < len(predictions)


def detection_columns(predictions: pa.Table) -> Columns:
    """Predictions as columns of all detections: `image_id`, `category_id`, `score`, `bbox` (x, y, width, height)."""
    counts = _lengths(predictions, "category_id")
    return {
        "image_id": np.repeat(predictions.column("image_id").to_numpy(), counts),
        "category_id": _flat(predictions, "category_id").to_numpy(zero_copy_only=False),
        "score": _flat(predictions, "score").to_numpy(zero_copy_only=False).astype(np.float64),
        "bbox": _flat(predictions, "bbox").flatten().to_numpy(zero_copy_only=False).reshape(-1, 4),
    }


def mask_columns(predictions: pa.Table) -> Columns:
    """Predictions as columns of all detections: `image_id`, `category_id`, `score`, `rle` (RLE dicts)."""
    columns = detection_columns(predictions)
    del columns["bbox"]
    counts, masks = _lengths(predictions, "category_id"), _lengths(predictions, "mask")
    for row in np.flatnonzero(counts != masks)[:1].tolist():
        image_id = predictions.column("image_id")[row].as_py()
        raise DataError(
            f"image {image_id}: {counts[row]} detections and {masks[row]} masks in the predictions: "
            "expected one for each. Delete them and evaluate again."
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
    """The elements of a column of lists."""
    return pc.list_flatten(predictions.column(name)).combine_chunks()
