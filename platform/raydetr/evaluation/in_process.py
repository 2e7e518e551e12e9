"""Figures of a model on a data set in the process that calls: what training uses to follow itself.

`evaluate` scores a registered model with actors and keeps every prediction; here some processes score a share of the
images each, by the same preparation and the same metrics, and nothing is kept.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from detr.image_processing.decode import ImageError
from detr.inference.detector import ObjectDetector, PreparedImage
from raydetr.data.pixels import decode_record
from raydetr.data.shards import Manifest, read_records
from raydetr.data.stream.mask_targets import MaskKind
from raydetr.evaluation.ground_truth import Truth, truth_columns
from raydetr.evaluation.score import figures_of_table
from raydetr.prediction.coco_files import coco_results
from raydetr.prediction.predictions import PredictionSettings, Predictor, error_row, table

BATCH_SIZE = 8


@dataclass
class Share:
    """Truth and predictions of some images; shares of several processes are joined by `join`.

    rows: of `PREDICTION_SCHEMA`.
    """

    truth: Truth
    rows: list[dict[str, Any]] = field(default_factory=list)

    def results(self) -> Iterator[dict[str, Any]]:
        """The detections in COCO's results form."""
        return coco_results(table(self.rows))


def predict_share(
    detector: ObjectDetector,
    manifest: Manifest,
    kind: MaskKind,
    number: int = 0,
    of: int = 1,
    images: int = 0,
) -> Share:
    """Predict every `of`-th image of a data set, from image `number` on.

    Args:
        detector: the model.
        manifest: of the shards.
        kind: what is scored.
        number: of this process.
        of: how many processes there are.
        images: of the data set that are scored in all, the first ones; 0: all.
    """
    masks = kind if kind in ("instance", "panoptic") else "none"
    predictor = Predictor(detector, manifest.categories, PredictionSettings(masks))
    share = Share(Truth([dict(category) for category in manifest.categories]))
    waiting: dict[tuple[int, int], list[tuple[int, PreparedImage]]] = defaultdict(list)
    for index, record in enumerate(read_records(manifest, [*truth_columns(kind), "image"])):
        if images and index >= images:
            break
        if index % of != number:
            continue
        share.truth.add(record, manifest, kind)
        try:
            prepared = detector.prepare(decode_record(record))
        except ImageError as error:
            share.rows.append(error_row(record["image_id"], str(error)))  # its objects count as missed
            continue
        like = waiting[prepared.shape]
        like.append((record["image_id"], prepared))
        if len(like) == BATCH_SIZE:
            share.rows += predictor.rows(*zip(*waiting.pop(prepared.shape)))
    for like in waiting.values():
        share.rows += predictor.rows(*zip(*like))
    return share


def join(shares: Sequence[Share]) -> Share:
    """Several shares as one."""
    whole = Share(Truth(shares[0].truth.categories))
    for share in shares:
        whole.truth.extend(share.truth)
        whole.rows += share.rows
    return whole


def figures(share: Share) -> dict[str, float]:
    """AP of boxes (`AP`, `AP50`, …), of masks (`mask_AP`, …) for instances, and PQ, SQ, RQ for panoptic segments."""
    return figures_of_table(share.truth, table(share.rows))
