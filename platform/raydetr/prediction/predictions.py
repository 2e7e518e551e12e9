"""The table format in which predictions are stored and scored, and the predictor that fills it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa

from detr.config import EngineName
from detr.image_processing.decode import Orientation
from detr.image_processing.panoptic_png import write_panoptic_png
from detr.inference.detector import Detections, ObjectDetector, PreparedImage
from detr.metrics.masks import encode_masks
from detr.metrics.panoptic_matching import VOID
from detr.postprocess import SegmentedImage, post_process_panoptic_segmentation
from detr.postprocess.view import image_views
from raydetr.data.schema import Category
from raydetr.errors import DataError
from raydetr.prediction.categories import UNKNOWN, match_categories

PREDICTION_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("height", pa.int32()),  # of the decoded image, in pixels; null if `error` is set
        ("width", pa.int32()),
        ("category_id", pa.list_(pa.int64())),  # ids of the data set, not the model's labels
        ("score", pa.list_(pa.float32())),  # descending, 0..1
        ("bbox", pa.list_(pa.list_(pa.float32()))),  # x, y, width, height in pixels of the stored image
        (
            "mask",
            pa.list_(pa.binary()),
        ),  # COCO's compressed run lengths at the image's size; null: not requested
        ("panoptic", pa.binary()),  # PNG whose colors encode segment ids as COCO does; null: not requested
        (
            "segments",
            pa.list_(pa.struct([("id", pa.int64()), ("category_id", pa.int64()), ("score", pa.float32())])),
        ),
        ("error", pa.string()),  # why the image cannot be decoded; such a row has no detections
    ]
)
"""One row per image of the data set, ascending by id, with the detections of all queries."""


class PredictedSegment(TypedDict):
    """An element of the column `segments`."""

    id: int
    category_id: int
    score: float


class PredictionRow(TypedDict, total=False):
    """A row of `PREDICTION_SCHEMA`; an absent key means null. Only a row with an error has no height and width."""

    image_id: int
    height: int
    width: int
    category_id: Sequence[int] | np.ndarray  # pyarrow converts an array faster than a list
    score: Sequence[float] | np.ndarray
    bbox: Sequence[Sequence[float] | np.ndarray]
    mask: list[bytes] | None
    panoptic: bytes | None
    segments: list[PredictedSegment] | None
    error: str | None


Masks = Literal["none", "instance", "panoptic"]


@dataclass(frozen=True)
class PredictionSettings:
    """Everything that a prediction depends on in addition to the model and the image."""

    masks: Masks = "none"
    """instance: one mask per detection; panoptic: one segment map per image. Both need a model with a mask head."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: bfloat16 except in the heads; with torch on a CPU through autocast."""
    engine: EngineName = "torch"
    """Inference engine; see `detr.inference.optimize.optimized`."""
    segment_threshold: float = 0.5
    """Minimum score of a query that becomes a panoptic segment."""
    orientation: Orientation = "ignore"
    """apply: rotate images upright by their EXIF orientation. Annotations usually refer to the stored pixels."""


class Predictor:
    """Predicts batches of prepared images as rows of `PREDICTION_SCHEMA`.

    Args:
        detector: detector to run; it needs a mask head if the settings request masks.
        categories: COCO categories of the data set; detections of other labels are dropped. None: without a data set,
            category ids are the model's labels, and its configuration names the stuff classes.
        settings: what to predict.

    Raises:
        DataError: a category has no label of its name.
    """

    def __init__(
        self,
        detector: ObjectDetector,
        categories: Sequence[Category] | None,
        settings: PredictionSettings,
    ) -> None:
        self.detector, self.settings = detector, settings
        id2label = detector.model.config.id2label
        if categories is None:
            self.category_ids = np.array(sorted(id2label))
            stuff = set(getattr(detector.model.config, "stuff_label_ids", ()))
        else:
            self.category_ids = np.array(match_categories(id2label, categories))
            stuff = {category["id"] for category in categories if not category.get("isthing", 1)}
        self._stuff_labels = [label for label, each in enumerate(self.category_ids.tolist()) if each in stuff]

    def rows(self, image_ids: Sequence[int], prepared: Sequence[PreparedImage]) -> list[PredictionRow]:
        """Predict images of one canonical shape and return one row per image.

        Raises:
            DataError: a detection is not finite.
        """
        # Masks are the most expensive output, and queries below the threshold never become a segment.
        panoptic = self.settings.masks == "panoptic"
        outputs = self.detector.run(prepared, self.settings.segment_threshold if panoptic else None)
        rows: list[PredictionRow] = []
        queries: list[list[int]] = []
        for image_id, image, detections in zip(
            image_ids, prepared, self.detector.detections(outputs, prepared), strict=True
        ):
            if not np.isfinite(detections.scores).all() or not np.isfinite(detections.boxes_xyxy).all():
                raise DataError(f"The model's detections on image {image_id} are not finite numbers.")
            known = self.category_ids[detections.labels] != UNKNOWN
            rows.append(self._row(image_id, image, detections, known))
            queries.append(detections.queries[known].tolist())
        if self.settings.masks != "none":
            self._add_masks(rows, queries, outputs, prepared)
        return rows

    def _row(
        self, image_id: int, image: PreparedImage, detections: Detections, known: np.ndarray
    ) -> PredictionRow:
        corners = detections.boxes_xyxy[known]
        height, width = image.original_size
        return {
            "image_id": image_id,
            "height": height,
            "width": width,
            "category_id": self.category_ids[detections.labels[known]],
            "score": detections.scores[known],
            "bbox": list(np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)),
        }

    def _add_masks(
        self,
        rows: list[PredictionRow],
        queries: list[list[int]],
        outputs: Any,
        prepared: Sequence[PreparedImage],
    ) -> None:
        sizes, processed = [image.original_size for image in prepared], [image.size for image in prepared]
        if self.settings.masks == "instance":
            views = image_views(outputs.pred_masks, sizes, processed, prepared[0].shape)
            for row, own, view, masks in zip(rows, queries, views, outputs.pred_masks, strict=True):
                # Resize one mask at a time: at full image size, all of them would take gigabytes.
                rles = [encode_masks(view.resize(masks[query][None]) > 0)[0] for query in own]
                row["mask"] = [rle["counts"].encode() for rle in rles]
            return
        maps = post_process_panoptic_segmentation(
            outputs,
            self.settings.segment_threshold,
            label_ids_to_fuse=self._stuff_labels,
            target_sizes=sizes,
            processed_sizes=processed,
            padded_size=prepared[0].shape,
            integer_maps=True,
            merge_fused=True,
        )
        for row, panoptic in zip(rows, maps, strict=True):
            row["panoptic"], row["segments"] = self._segments(panoptic)

    def _segments(self, panoptic: SegmentedImage) -> tuple[bytes, list[PredictedSegment]]:
        """Encode a panoptic map as PNG and list its segments; segments of unknown categories become void."""
        # The map is -1 outside of all segments.
        ids = np.maximum(panoptic["segmentation"].cpu().numpy().astype(np.int64), VOID)
        segments: list[PredictedSegment] = []
        for item in panoptic["segments_info"]:
            category_id = int(self.category_ids[item["label_id"]])
            if category_id == UNKNOWN:
                ids[ids == item["id"]] = 0
            else:
                segments.append({"id": item["id"], "category_id": category_id, "score": item["score"]})
        return write_panoptic_png(ids), segments


def error_row(image_id: int, reason: str) -> PredictionRow:
    """Return the row of an image that cannot be decoded."""
    return {"image_id": image_id, "category_id": [], "score": [], "bbox": [], "error": reason}


def table(rows: Sequence[PredictionRow]) -> pa.Table:
    """Convert rows to a table of `PREDICTION_SCHEMA`."""
    return pa.Table.from_pylist(list(rows), schema=PREDICTION_SCHEMA)
