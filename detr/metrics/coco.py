"""COCO's detection figures: average precision and recall of boxes and masks, as pycocotools computes them.

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

from detr.metrics.masks import encode_masks

logger = logging.getLogger(__name__)

_Columns = dict[str, np.ndarray]

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
    evaluation = _evaluate(truth, found)
    evaluation.summary_lines()  # computes the figures; summarize() would print them too
    return dict(zip(METRIC_NAMES, map(float, evaluation.stats)))


class CocoEvaluator:
    """Collects detections batch by batch and computes COCO's figures, in the interface of the original DETR.

    Only images that were given to `update` are evaluated, so that a part of a data set can be. Nothing is printed:
    `summarize` returns the figures and logs pycocotools' lines. Masks are kept run-length encoded.

    Args:
        coco_gt: the truth: a COCO dict, the path of a COCO JSON file, or pycocotools' `COCO`. For "segm", its
            annotations have a `segmentation` (polygons or RLE of any form) and its images `height` and `width`.
        iou_types: "bbox", "segm", or a list of these.

    Attributes:
        coco_eval: after `accumulate`, each type of IoU to an object with pycocotools' `eval`; after `summarize` with
            `stats`, float64 [12] in the order of `METRIC_NAMES`.

    Raises:
        ValueError: another type of IoU.
    """

    def __init__(self, coco_gt: Any, iou_types: str | Sequence[str] = "bbox") -> None:
        self.iou_types = [iou_types] if isinstance(iou_types, str) else list(iou_types)
        if not self.iou_types or not set(self.iou_types) <= set(IOU_TYPES):
            raise ValueError(f"iou_types is {iou_types!r}: expected 'bbox', 'segm' or a list of these")
        self.truth = _read_truth(coco_gt)
        self.coco_eval: dict[str, Any] = {}
        self._found: dict[int, _Columns] = {}

    def update(self, predictions: Mapping[int, Mapping[str, Any]]) -> None:
        """Add the detections of some images; those of an image given before are replaced.

        Args:
            predictions: image id to `scores` float [n] and `labels` int [n] (category ids of the truth), as tensors,
                arrays or lists; for "bbox" `boxes` float [n, 4] (corners in pixels of the original image); for
                "segm" `masks` at the size of the original image, in one of the forms of
                `detr.metrics.masks.encode_masks`: [n, H, W] or [n, 1, H, W], on above 0.5, or RLE dicts.

        Raises:
            ValueError: what belongs to one image has different lengths, or something is not finite.
        """
        for image_id, found in predictions.items():
            self._found[int(image_id)] = _detections_of_image(int(image_id), found, self.iou_types)

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
        """Match detections with the truth and compute precision and recall.

        Raises:
            ValueError: the truth lacks what a type of IoU needs.
        """
        images = [image for image in self.truth["images"] if image["id"] in self._found]
        nothing: dict[str, Any] = {"boxes": [], "masks": [], "scores": [], "labels": []}
        parts = [self._found[image_id] for image_id in sorted(self._found)]
        parts.append(_detections_of_image(0, nothing, self.iou_types))
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[-1]}
        for iou_type in self.iou_types:
            self.coco_eval[iou_type] = _evaluate({**self.truth, "images": images}, found, iou_type)

    def summarize(self) -> dict[str, dict[str, float]]:
        """The 12 figures: each type of IoU to `METRIC_NAMES` to values in 0..1, -1 where the truth has no such objects.

        Raises:
            RuntimeError: `accumulate` was not called.
        """
        if not self.coco_eval:
            raise RuntimeError("there is nothing to summarize: call accumulate() first")
        figures = {}
        for iou_type, evaluation in self.coco_eval.items():
            logger.info("IoU metric: %s", iou_type)
            for line in evaluation.summary_lines():
                logger.info(line)
            figures[iou_type] = dict(zip(METRIC_NAMES, map(float, evaluation.stats)))
        return figures


def _detections_of_image(image_id: int, found: Mapping[str, Any], iou_types: Sequence[str]) -> _Columns:
    """The rows of an image; `rle` is an object array of RLE dicts."""
    scores, labels = _array(found["scores"]), _array(found["labels"])
    columns: _Columns = {
        "image_id": np.full(len(scores), image_id, np.int64),
        "category_id": labels.astype(np.int64),
        "score": scores.astype(np.float64),
    }
    given = {"scores": scores, "labels": labels}
    if "bbox" in iou_types:
        given["boxes"] = _array(found["boxes"]).reshape(-1, 4).astype(np.float64)
        corners, opposite = np.split(given["boxes"], 2, axis=1)
        columns["bbox"] = np.concatenate([corners, opposite - corners], axis=1)
    if "segm" in iou_types:
        rles = encode_masks(found["masks"])
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


def _evaluate(truth: Mapping[str, Any], found: _Columns, iou_type: str = "bbox") -> Any:
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
    annotations = truth.get("annotations", ())
    objects = _columns(annotations, "annotation", fields)
    if iou_type == "segm":
        objects["segmentation"] = _segmentations(annotations)
    objects = _select(objects, "image_id", image_ids)
    objects = _select(objects, "category_id", category_ids)
    found = _select(found, "category_id", category_ids)

    coco_truth = hotcoco.COCO.from_arrays(
        _images(truth["images"], image_ids, with_sizes=iou_type == "segm"),
        [{"id": int(category_id), "name": str(category_id)} for category_id in category_ids],
        np.searchsorted(image_ids, objects["image_id"]),
        objects["category_id"],
        objects["bbox"],
        ids=np.arange(1, len(objects["image_id"]) + 1),
        area=objects["area"],
        iscrowd=objects["iscrowd"],
        segmentation=objects["segmentation"].tolist() if iou_type == "segm" else None,
    )
    positions = np.searchsorted(image_ids, found["image_id"])
    results: Any
    if iou_type == "segm":  # as dicts: of an array hotcoco takes the area of the boxes, not of the masks
        results = [
            {"image_id": image, "category_id": category, "segmentation": rle, "score": score}
            for image, category, rle, score in zip(
                positions.tolist(), found["category_id"].tolist(), found["rle"], found["score"].tolist()
            )
        ]
    else:
        results = np.column_stack([positions, found["bbox"], found["score"], found["category_id"]])
        results = results.astype(np.float64)
    evaluation = hotcoco.COCOeval(coco_truth, coco_truth.load_res(results), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def _images(
    images: Sequence[Mapping[str, Any]], image_ids: np.ndarray, with_sizes: bool
) -> list[dict[str, int]]:
    """The images as positions in `image_ids`, with the sizes that polygons are drawn at."""
    if not with_sizes:
        return [{"id": position} for position in range(len(image_ids))]
    sizes = {image["id"]: image for image in images}
    for image_id, image in sizes.items():
        if not {"height", "width"} <= image.keys():
            raise ValueError(
                f"image {image_id} of the truth has no height and width, which iou_types 'segm' needs"
            )
    return [
        {"id": position, "height": int(sizes[image_id]["height"]), "width": int(sizes[image_id]["width"])}
        for position, image_id in enumerate(image_ids.tolist())
    ]


def _segmentations(annotations: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Polygons or RLE of each annotation, object [n]."""
    segmentations = np.empty(len(annotations), object)
    for index, annotation in enumerate(annotations):
        if not annotation.get("segmentation"):
            raise ValueError(
                f"annotation {index} has no segmentation, which iou_types 'segm' needs: {str(annotation)[:300]}"
            )
        segmentations[index] = annotation["segmentation"]
    return segmentations


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
