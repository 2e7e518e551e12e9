"""COCO's detection figures: average precision and recall, as pycocotools computes them.

The matching is done by hotcoco, a port in Rust that is about 50 times as fast; the tests compare every precision and
recall with pycocotools'. The one known difference is that an annotation with id 0 counts like any other: pycocotools
takes a match with it for no match.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import torch

logger = logging.getLogger(__name__)

_Columns = dict[str, np.ndarray]

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
"""In the order of pycocotools' `COCOeval.stats`."""


def coco_detection_metrics(
    truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """COCO's 12 figures for boxes, of detections in all images of a data set.

    Args:
        truth: a COCO dict: `images`, `categories`, and `annotations` with `image_id`, `category_id`, `bbox` (x, y,
            width, height), `area`, and `iscrowd` where it is not 0.
        detections: COCO results: `image_id`, `category_id`, `bbox` (x, y, width, height) and `score`. Those of
            categories that the truth does not have are left out, as in pycocotools.

    Returns:
        `METRIC_NAMES` to figures in 0..1; -1 where the truth has no objects of that kind.

    Raises:
        ValueError: an annotation or a detection lacks a field, is not finite, or a detection is in an image that
            the truth does not have. The message names the first one.
    """
    found = _columns(detections, "detection", {"category_id": np.int64, "score": np.float64})
    evaluation = _evaluate_boxes(truth, found)
    evaluation.summary_lines()  # computes the figures; summarize() would print them too
    return dict(zip(METRIC_NAMES, map(float, evaluation.stats)))


class CocoEvaluator:
    """Collects detections batch by batch and computes COCO's figures, in the interface of the original DETR.

    Only images that were given to `update` are evaluated, so that a part of a data set can be. Nothing is printed:
    `summarize` returns the figures and logs pycocotools' lines.

    Args:
        coco_gt: the truth: a COCO dict, the path of a COCO JSON file, or pycocotools' `COCO`.
        iou_types: "bbox", or a list of it.

    Attributes:
        coco_eval: after `accumulate`, "bbox" to an object with pycocotools' `eval`; after `summarize` with `stats`,
            float64 [12] in the order of `METRIC_NAMES`.

    Raises:
        ValueError: another type of IoU.
    """

    def __init__(self, coco_gt: Any, iou_types: str | Sequence[str] = "bbox") -> None:
        self.iou_types = [iou_types] if isinstance(iou_types, str) else list(iou_types)
        if self.iou_types != ["bbox"]:
            raise ValueError(f"iou_types is {iou_types!r}: expected 'bbox'")
        self.truth = _read_truth(coco_gt)
        self.coco_eval: dict[str, Any] = {}
        self._found: dict[int, _Columns] = {}

    def update(self, predictions: Mapping[int, Mapping[str, Any]]) -> None:
        """Add the detections of some images; those of an image given before are replaced.

        Args:
            predictions: image id to `boxes` float [n, 4] (corners in pixels of the original image), `scores` float
                [n] and `labels` int [n] (category ids of the truth), as tensors, arrays or lists.

        Raises:
            ValueError: the three have different lengths, or something is not finite.
        """
        for image_id, found in predictions.items():
            boxes, scores, labels = (_array(found[name]) for name in ("boxes", "scores", "labels"))
            boxes = boxes.reshape(-1, 4).astype(np.float64)
            if not len(boxes) == len(scores) == len(labels):
                raise ValueError(
                    f"image {image_id}: {len(boxes)} boxes, {len(scores)} scores and {len(labels)} labels: expected "
                    "one of each for a detection"
                )
            if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
                raise ValueError(f"image {image_id}: boxes or scores are not finite")
            self._found[int(image_id)] = {
                "image_id": np.full(len(boxes), image_id, np.int64),
                "bbox": np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1),
                "category_id": labels.astype(np.int64),
                "score": scores.astype(np.float64),
            }

    def synchronize_between_processes(self) -> None:
        """Give every process of `torch.distributed` the detections of all; an image that several have counts once."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, self._found)
        self._found = {}
        for found in gathered:
            self._found = found | self._found

    def accumulate(self) -> None:
        """Match detections with the truth and compute precision and recall."""
        images = [image for image in self.truth["images"] if image["id"] in self._found]
        parts = [self._found[image_id] for image_id in sorted(self._found)]
        parts.append(_columns([], "detection", {"category_id": np.int64, "score": np.float64}))
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[-1]}
        self.coco_eval["bbox"] = _evaluate_boxes({**self.truth, "images": images}, found)

    def summarize(self) -> dict[str, dict[str, float]]:
        """The 12 figures: "bbox" to `METRIC_NAMES` to values in 0..1, -1 where the truth has no such objects.

        Raises:
            RuntimeError: `accumulate` was not called.
        """
        if not self.coco_eval:
            raise RuntimeError("there is nothing to summarize: call accumulate() first")
        for line in self.coco_eval["bbox"].summary_lines():
            logger.info(line)
        return {"bbox": dict(zip(METRIC_NAMES, map(float, self.coco_eval["bbox"].stats)))}


def _evaluate_boxes(truth: Mapping[str, Any], found: _Columns) -> Any:
    """Match detections with a COCO dict and accumulate.

    Image ids become positions, since hotcoco reads them as float64, in which large ids are not distinct.

    Returns:
        `hotcoco.COCOeval`, accumulated; its figures are there after `summary_lines()`.
    """
    image_ids = np.unique(np.array([image["id"] for image in truth["images"]], np.int64))
    category_ids = np.unique(np.array([category["id"] for category in truth["categories"]], np.int64))
    unknown = np.setdiff1d(found["image_id"], image_ids)
    if len(unknown):
        raise ValueError(
            f"there are detections in {len(unknown)} images that the truth does not have, such as image_id {unknown[0]}"
        )
    fields = {"category_id": np.int64, "area": np.float64, "iscrowd": np.int64}
    objects = _columns(truth.get("annotations", ()), "annotation", fields)
    objects = _select(objects, "image_id", image_ids)
    objects = _select(objects, "category_id", category_ids)
    found = _select(found, "category_id", category_ids)

    coco_truth = hotcoco.COCO.from_arrays(
        [{"id": position} for position in range(len(image_ids))],
        [{"id": int(category_id), "name": str(category_id)} for category_id in category_ids],
        np.searchsorted(image_ids, objects["image_id"]),
        objects["category_id"],
        objects["bbox"],
        ids=np.arange(1, len(objects["image_id"]) + 1),
        area=objects["area"],
        iscrowd=objects["iscrowd"],
    )
    positions = np.searchsorted(image_ids, found["image_id"])
    results = np.column_stack([positions, found["bbox"], found["score"], found["category_id"]])
    evaluation = hotcoco.COCOeval(coco_truth, coco_truth.load_res(results.astype(np.float64)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _columns(records: Sequence[Mapping[str, Any]], kind: str, fields: Mapping[str, type]) -> _Columns:
    """COCO records as arrays: `image_id` int64 [n], `bbox` float64 [n, 4], and each field; no `iscrowd` is 0."""
    try:
        columns: _Columns = {"image_id": np.array([record["image_id"] for record in records], np.int64)}
        columns["bbox"] = np.array([record["bbox"] for record in records], np.float64).reshape(
            len(records), 4
        )
        for name, dtype in fields.items():
            values = [record.get(name, 0) if name == "iscrowd" else record[name] for record in records]
            columns[name] = np.array(values, dtype)
    except (KeyError, TypeError, ValueError) as error:
        for index, record in enumerate(records if len(records) > 1 else []):
            _columns([record], f"{kind} {index}", fields)
        raise ValueError(
            f"{kind} needs image_id, bbox (x, y, width, height), {', '.join(fields)}; found {str(records[0])[:300]}"
        ) from error
    finite = np.isfinite(columns["bbox"]).all(axis=1)
    for name in fields:
        finite &= np.isfinite(columns[name])
    if not finite.all():
        index = int(np.argmin(finite))
        raise ValueError(f"{kind} {index} is not finite: {str(records[index])[:300]}")
    return columns


def _select(columns: _Columns, name: str, wanted: np.ndarray) -> _Columns:
    """The rows whose `name` is one of the wanted values."""
    rows = np.isin(columns[name], wanted)
    return {key: column[rows] for key, column in columns.items()}


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _read_truth(coco_gt: Any) -> Mapping[str, Any]:
    if isinstance(coco_gt, str | Path):
        return json.loads(Path(coco_gt).read_text(encoding="utf-8"))
    return coco_gt if isinstance(coco_gt, Mapping) else coco_gt.dataset
