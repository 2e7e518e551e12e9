"""A file of predictions, scored: every image once, against the whole truth of a data set."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raydetr.data.shards import Manifest
from raydetr.data.stream.mask_targets import MaskKind
from raydetr.evaluation.analysis import analyse, count_panoptic
from raydetr.evaluation.figures import evaluate_predictions, figures_of
from raydetr.evaluation.ground_truth import Truth, read_truth
from raydetr.prediction.predict import check_complete, read_predictions


@dataclass(frozen=True)
class Score:
    """What an evaluation found."""

    analysis: dict[str, Any]
    """See `analysis.analyse`."""
    images: int
    """Images scored: all of the data set."""
    undecodable: dict[int, str]
    """Image id → reason, of the images without detections because they cannot be decoded. Their objects count
    as missed."""

    @property
    def figures(self) -> dict[str, float]:
        """AP, AP50, AP75, AP_small, … in 0..1; -1 where the data set has no object of that kind."""
        return dict(self.analysis["figures"])


def score(predictions: str, manifest: Manifest, kind: MaskKind = "none") -> Score:
    """Score predictions against all objects of a data set, as pycocotools does with the original annotations.

    Args:
        predictions: address of a file that `predict` wrote.
        manifest: of the shards.
        kind: of the truth.

    Raises:
        DataError: the predictions are not those of each image once; nothing is computed then.
    """
    table = read_predictions(predictions)
    check_complete(table.column("image_id").to_pylist(), manifest)
    errors = table.select(["image_id", "error"]).to_pylist()
    undecodable = {row["image_id"]: row["error"] for row in errors if row["error"] is not None}
    return Score(analyse(read_truth(manifest, kind), table), len(table), undecodable)


def figures_of_table(truth: Truth, predictions: pa.Table) -> dict[str, float]:
    """The figures alone.

    Args:
        truth: of some images.
        predictions: of `PREDICTION_SCHEMA`, of the same images.
    """
    return figures_of(evaluate_predictions(truth.coco(), predictions), count_panoptic(truth, predictions))
