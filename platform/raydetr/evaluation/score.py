"""Scoring of a file of predictions against the ground truth of a whole data set."""

from dataclasses import dataclass

import pyarrow as pa

from raydetr.data.shards import Manifest
from raydetr.data.stream.mask_targets import MaskKind
from raydetr.evaluation.analysis import analyze, count_panoptic
from raydetr.evaluation.ground_truth import GroundTruth, read_ground_truth
from raydetr.evaluation.metrics import evaluate_predictions, summarize_metrics
from raydetr.prediction.predict import check_complete, read_predictions
from raydetr.results.analysis import Analysis


@dataclass(frozen=True)
class Score:
    """Result of `score`."""

    analysis: Analysis
    images: int
    """Number of images scored, which is the size of the data set."""
    undecodable: dict[int, str]
    """Image id → reason, for images that cannot be decoded. Their objects count as missed."""

    @property
    def metrics(self) -> dict[str, float]:
        """AP, AP50, AP75, AP_small, … in 0..1; -1 if the data set has no object of that kind."""
        return dict(self.analysis.metrics)


def score(predictions: str, manifest: Manifest, kind: MaskKind = "none") -> Score:
    """Score predictions against all objects of a data set, as pycocotools does with the original annotations.

    Args:
        predictions: URI of a file written by `predict`.
        manifest: manifest of the data set.
        kind: masks of the ground truth.

    Raises:
        DataError: the predictions do not contain each image exactly once.
    """
    table = read_predictions(predictions)
    check_complete(table.column("image_id").to_pylist(), manifest)
    errors = table.select(["image_id", "error"]).to_pylist()
    undecodable = {row["image_id"]: row["error"] for row in errors if row["error"] is not None}
    return Score(analyze(read_ground_truth(manifest, kind), table), len(table), undecodable)


def compute_metrics(ground_truth: GroundTruth, predictions: pa.Table) -> dict[str, float]:
    """Compute the metrics without the rest of the analysis.

    Args:
        ground_truth: ground truth of some images.
        predictions: table of `PREDICTION_SCHEMA` for the same images.
    """
    return summarize_metrics(
        evaluate_predictions(ground_truth.coco(), predictions), count_panoptic(ground_truth, predictions)
    )
