"""COCO's 12 detection figures of a file of predictions."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from detr.metrics.coco import coco_detection_metrics
from raydetr.data.shards import Manifest, coco_truth
from raydetr.evaluation.predict import check_complete, read_predictions

SETTINGS: dict[str, Any] = {"iou_type": "bbox", "max_detections": 100, "dtype": "float32"}
"""What, besides model and data, the figures depend on. No threshold: the detections of all queries count."""


@dataclass(frozen=True)
class Score:
    """What an evaluation found."""

    figures: dict[str, float]
    """AP, AP50, AP75, AP_small, … in 0..1; -1 where the data set has no object of that kind."""
    images: int
    """Images scored: all of the data set."""
    undecodable: dict[int, str]
    """Image id → reason, of the images without detections because they cannot be decoded. Their objects count
    as missed."""


def score(predictions: str, manifest: Manifest) -> Score:
    """Score predictions against all objects of a data set, as pycocotools does with the original annotations.

    Args:
        predictions: address of a file that `predict` wrote.
        manifest: of the shards.

    Raises:
        DataError: the predictions are not those of each image once; nothing is computed then.
    """
    table = read_predictions(predictions)
    check_complete(table.column("image_id").to_pylist(), manifest)
    undecodable = {row["image_id"]: row["error"] for row in table.to_pylist() if row["error"] is not None}
    figures = coco_detection_metrics(coco_truth(manifest), coco_results(table))
    return Score(figures, len(table), undecodable)


def coco_results(predictions: pa.Table) -> list[dict[str, Any]]:
    """Predictions in COCO's results form: image_id, category_id, bbox (x, y, width, height), score."""
    return [
        {"image_id": row["image_id"], "category_id": category, "bbox": box, "score": confidence}
        for row in predictions.to_pylist()
        for category, box, confidence in zip(row["category_id"], row["bbox"], row["score"], strict=True)
    ]
