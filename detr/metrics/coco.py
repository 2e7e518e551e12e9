"""COCO detection metrics: average precision and recall of boxes and masks, as pycocotools computes them.

The matching is done by hotcoco, a port to Rust that is about 50 times as fast. The tests compare every precision and
recall with those of pycocotools. There is one known difference: here an annotation with id 0 counts like any other,
while pycocotools treats a match with it as no match.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detr.metrics.coco_matching import Columns, Evaluation, columns_of_records, evaluate_detections
from detr.metrics.masks import encode_masks

logger = logging.getLogger(__name__)

IOU_TYPES = ("bbox", "segm")

_PARTS = ("boxes", "masks", "scores", "labels")

METRIC_NAMES = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_1",
    "AR_10",
    "AR_100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
"""Names of the 12 COCO metrics, in the order of pycocotools' `COCOeval.stats`."""


def coco_detection_metrics(
    ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Compute COCO's 12 metrics of boxes, for detections in all images of a data set.

    Args:
        ground_truth: a COCO dict: `images`, `categories`, and `annotations` with `image_id`, `category_id`, `bbox` (x,
            y, width, height), `area`, and `iscrowd` if it is not 0.
        detections: COCO results: `image_id`, `category_id`, `bbox` (x, y, width, height) and `score`. Detections of
            categories that the ground truth does not have are ignored, as in pycocotools.

    Returns:
        `METRIC_NAMES` to values in 0..1; -1 if the ground truth has no objects of that kind.

    Raises:
        ValueError: an annotation or a detection lacks a field or has a value that is not finite, or a detection is in
            an image that the ground truth does not have. The message names the first one.
    """
    columns = columns_of_records(detections, "detection", {"score": np.float64})
    return coco_metrics(evaluate_detections(ground_truth, columns))


def coco_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return `METRIC_NAMES` to values in 0..1; -1 if the ground truth has no objects of that kind."""
    evaluation.coco.summary_lines()  # computes the metrics; summarize() would print them too
    return dict(zip(METRIC_NAMES, map(float, evaluation.coco.stats)))


class CocoEvaluator:
    """Collect detections batch by batch and compute COCO's metrics, with the interface of the original DETR.

    Only images that were passed to `update` are evaluated, so a part of a data set can be evaluated. Nothing is
    printed: `summarize` returns the metrics and logs the lines of pycocotools. Masks are stored as RLE.

    Args:
        coco_gt: the ground truth: a COCO dict, the path of a COCO JSON file, or pycocotools' `COCO`. For "segm", its
            annotations have a `segmentation` (polygons or RLE of any form) and its images `height` and `width`.
        iou_types: "bbox", "segm", or a list of these.

    Attributes:
        coco_eval: after `accumulate`, each IoU type to an object with pycocotools' `eval`; after `summarize` also with
            `stats`, float64 [12] in the order of `METRIC_NAMES`.

    Raises:
        ValueError: an IoU type is unknown.
    """

    def __init__(self, coco_gt: Any, iou_types: str | Sequence[str] = "bbox") -> None:
        self.iou_types = [iou_types] if isinstance(iou_types, str) else list(iou_types)
        if not self.iou_types or not set(self.iou_types) <= set(IOU_TYPES):
            raise ValueError(f"iou_types is {iou_types!r}: expected 'bbox', 'segm' or a list of these")
        self.ground_truth = _read_ground_truth(coco_gt)
        self.coco_eval: dict[str, Any] = {}
        self._detections: dict[int, Columns] = {}

    def update(self, predictions: Mapping[int, Mapping[str, Any]]) -> None:
        """Add the detections of some images; detections added before for the same image are replaced.

        Args:
            predictions: image id to `scores` float [n] and `labels` int [n] (category ids of the ground truth), as
                tensors, arrays or lists; for "bbox" `boxes` float [n, 4] (corners in pixels of the original image); for
                "segm" `masks` at the size of the original image, in one of the forms of
                `detr.metrics.masks.encode_masks`: [n, H, W] or [n, 1, H, W], thresholded at 0.5, or RLE dicts.

        Raises:
            ValueError: the entries of an image have different lengths, or a value is not finite.
        """
        for image_id, prediction in predictions.items():
            self._detections[int(image_id)] = _detections_of_image(int(image_id), prediction, self.iou_types)

    def synchronize_between_processes(self) -> None:
        """Gather the detections of all `torch.distributed` processes; an image that several processes have counts once."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, self._detections)
        self._detections = {}
        for detections in gathered:
            self._detections = detections | self._detections

    def accumulate(self) -> None:
        """Match detections with the ground truth and compute precision and recall.

        Raises:
            ValueError: the ground truth lacks a field that an IoU type needs.
        """
        images = [image for image in self.ground_truth["images"] if image["id"] in self._detections]
        nothing: dict[str, Any] = {"boxes": [], "masks": [], "scores": [], "labels": []}
        parts = [self._detections[image_id] for image_id in sorted(self._detections)]
        parts.append(_detections_of_image(0, nothing, self.iou_types))
        detections = {name: np.concatenate([part[name] for part in parts]) for name in parts[-1]}
        for iou_type in self.iou_types:
            self.coco_eval[iou_type] = evaluate_detections(
                {**self.ground_truth, "images": images}, detections, iou_type
            ).coco

    def summarize(self) -> dict[str, dict[str, float]]:
        """Return the 12 metrics of each IoU type: `METRIC_NAMES` to values in 0..1, -1 if there are no such objects.

        Raises:
            RuntimeError: `accumulate` was not called.
        """
        if not self.coco_eval:
            raise RuntimeError("there is nothing to summarize: call accumulate() first")
        metrics = {}
        for iou_type, evaluation in self.coco_eval.items():
            logger.info("IoU metric: %s", iou_type)
            for line in evaluation.summary_lines():
                logger.info(line)
            metrics[iou_type] = dict(zip(METRIC_NAMES, map(float, evaluation.stats)))
        return metrics


def _detections_of_image(image_id: int, prediction: Mapping[str, Any], iou_types: Sequence[str]) -> Columns:
    """Convert the prediction for an image to rows; `rle` is an object array of RLE dicts."""
    scores, labels = _array(prediction["scores"]), _array(prediction["labels"])
    columns: Columns = {
        "image_id": np.full(len(scores), image_id, np.int64),
        "category_id": labels.astype(np.int64),
        "score": scores.astype(np.float64),
    }
    given = {"scores": scores, "labels": labels}
    if "bbox" in iou_types:
        given["boxes"] = _array(prediction["boxes"]).reshape(-1, 4).astype(np.float64)
        corners, opposite = np.split(given["boxes"], 2, axis=1)
        columns["bbox"] = np.concatenate([corners, opposite - corners], axis=1)
    if "segm" in iou_types:
        rles = encode_masks(prediction["masks"])
        columns["rle"] = given["masks"] = np.empty(len(rles), object)
        columns["rle"][:] = rles
    if len({len(values) for values in given.values()}) > 1:
        *others, last = [f"{len(given[name])} {name}" for name in _PARTS if name in given]
        raise ValueError(
            f"image {image_id}: {', '.join(others)} and {last}: expected one of each for a detection"
        )
    if not all(np.isfinite(given[name]).all() for name in ("boxes", "scores") if name in given):
        raise ValueError(f"image {image_id}: boxes or scores are not finite")
    return columns


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16
        return (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _read_ground_truth(coco_gt: Any) -> Mapping[str, Any]:
    if isinstance(coco_gt, str | Path):
        return json.loads(Path(coco_gt).read_text(encoding="utf-8"))
    return coco_gt if isinstance(coco_gt, Mapping) else coco_gt.dataset
