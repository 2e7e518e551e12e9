"""Metrics of a model on a data set, computed in the calling process; training uses them for validation.

`evaluate` scores a registered model with Ray Data actors and stores every prediction. Here each process scores a share
of the images with the same preparation and the same metrics, and nothing is stored.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from detr.image_processing.decode import ImageError
from detr.inference.detector import ObjectDetector, PreparedImage
from raydetr.data.pixels import decode_record
from raydetr.data.shards import Manifest, read_records
from raydetr.data.stream.mask_targets import MaskKind
from raydetr.evaluation.ground_truth import GroundTruth, truth_columns
from raydetr.evaluation.score import compute_metrics
from raydetr.prediction.coco_files import CocoResult, coco_results
from raydetr.prediction.predictions import PredictionRow, PredictionSettings, Predictor, error_row, table

BATCH_SIZE = 8


@dataclass
class Share:
    """Ground truth and predictions of some images. `join` combines the shares of several processes.

    truth: ground truth of the images.
    rows: predictions as rows of `PREDICTION_SCHEMA`.
    """

    truth: GroundTruth
    rows: list[PredictionRow] = field(default_factory=list)

    def results(self) -> Iterator[CocoResult]:
        """Yield the detections in COCO's results format."""
        return coco_results(table(self.rows))


def predict_share(
    detector: ObjectDetector,
    manifest: Manifest,
    kind: MaskKind,
    number: int = 0,
    of: int = 1,
    images: int = 0,
) -> Share:
    """Predict every `of`-th image of a data set, starting with image `number`.

    Args:
        detector: the model.
        manifest: manifest of the data set.
        kind: masks to score.
        number: index of this process.
        of: number of processes.
        images: number of images that all processes score together, taken from the start of the data set; 0: all.
    """
    masks = kind if kind in ("instance", "panoptic") else "none"
    predictor = Predictor(detector, manifest.categories, PredictionSettings(masks))
    share = Share(GroundTruth([dict(category) for category in manifest.categories]))
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
        batch = waiting[prepared.shape]
        batch.append((record["image_id"], prepared))
        if len(batch) == BATCH_SIZE:
            share.rows += predictor.rows(*zip(*waiting.pop(prepared.shape)))
    for batch in waiting.values():
        share.rows += predictor.rows(*zip(*batch))
    return share


def join(shares: Sequence[Share]) -> Share:
    """Combine the shares of several processes."""
    whole = Share(GroundTruth(shares[0].truth.categories))
    for share in shares:
        whole.truth.extend(share.truth)
        whole.rows += share.rows
    return whole


def score_share(share: Share) -> dict[str, float]:
    """Compute the metrics of boxes (`AP`, `AP50`, …), instance masks (`mask_AP`, …) and panoptic segments (`PQ`, …)."""
    return compute_metrics(share.truth, table(share.rows))
