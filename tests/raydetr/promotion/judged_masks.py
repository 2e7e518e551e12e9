"""Predicted masks and segments derived from the ground truth, with a given displacement per class."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import ndimage

from detr.image_processing.panoptic_png import read_panoptic_png, write_panoptic_png
from detr.metrics.masks import encode_masks
from raydetr.data.ingest.inputs import InputPaths
from raydetr.data.shards import Manifest, ground_truth_annotations, read_records
from raydetr.data.stream.mask_targets import decode_mask
from raydetr.data.synthetic.dataset import generate
from tests.raydetr.data.stream.test_mask_targets import shards
from tests.raydetr.evaluation.tables import table_of

Blur = float | Mapping[str, float]


def scenes(folder: Path) -> Manifest:
    """Write shards of 40 generated images, with four thing classes (with masks) and three stuff classes."""
    generate(str(folder / "coco"), 40, seed=2, size=96)
    annotations = folder / "coco/annotations"
    panoptic = str(annotations / "panoptic.json"), str(annotations / "panoptic")
    paths = InputPaths(str(annotations / "instances.json"), str(folder / "coco/images"), *panoptic)
    return shards(folder / "shards", paths)


def outlines(manifest: Manifest, blur: Blur, boxes: float, seed: int = 0) -> pa.Table:
    """Predict one detection per object with a displaced mask and a displaced box.

    blur: displacement of the mask as a share of the object's size, for all classes or by class name.
    boxes: displacement of the box, in the same unit.
    """
    rng = np.random.default_rng(seed)
    results = []
    for record in read_records(manifest):
        for item in ground_truth_annotations(record):
            mask = decode_mask(item["segmentation"], record["height"], record["width"])
            moved = _move(mask, item, _blur(manifest, blur, item), rng.normal(size=2))
            results.append(
                _detection(record, item, boxes, rng) | {"segmentation": encode_masks(moved[None])[0]}
            )
    return table_of({"images": list(_images(manifest))}, results)


def segmented(manifest: Manifest, blur: Blur, boxes: float, seed: int = 0) -> pa.Table:
    """Predict a panoptic map per image with displaced segments, and their displaced boxes; see `outlines`."""
    rng = np.random.default_rng(seed)
    results, panoptic = [], {}
    for record in read_records(manifest):
        true_map = read_panoptic_png(record["panoptic_image"])
        predicted_map = np.zeros_like(true_map)
        for item in record["segments"]:  # stuff comes before the things that cover it
            moved = _move(true_map == item["id"], item, _blur(manifest, blur, item), rng.normal(size=2))
            predicted_map[moved] = item["id"]
            results.append(_detection(record, item, boxes, rng))
        visible = set(np.unique(predicted_map).tolist())
        segments = [
            {"id": item["id"], "category_id": item["category_id"], "score": 0.9}
            for item in record["segments"]
            if item["id"] in visible
        ]
        panoptic[record["image_id"]] = write_panoptic_png(predicted_map), segments
    return table_of({"images": list(_images(manifest))}, results, panoptic)


def _images(manifest: Manifest) -> Iterator[dict[str, Any]]:
    for record in read_records(manifest, ["image_id", "height", "width"]):
        yield {"id": record["image_id"], "height": record["height"], "width": record["width"]}


def _blur(manifest: Manifest, blur: Blur, item: Mapping[str, Any]) -> float:
    if isinstance(blur, float):
        return blur
    return blur[next(each["name"] for each in manifest.categories if each["id"] == item["category_id"])]


def _move(mask: np.ndarray, item: Mapping[str, Any], blur: float, direction: np.ndarray) -> np.ndarray:
    """Move a mask by a share of its object's height and width; pixels that leave the image are cut off."""
    _, _, width, height = item["bbox"]
    return ndimage.shift(mask.astype(np.uint8), direction * blur * (height, width), order=0) > 0


def _detection(
    record: Mapping[str, Any], item: Mapping[str, Any], blur: float, rng: np.random.Generator
) -> dict[str, Any]:
    _, _, width, height = item["bbox"]
    box = np.array(item["bbox"]) + rng.normal(size=4) * blur * np.array([width, height, width, height])
    return {
        "image_id": record["image_id"],
        "category_id": item["category_id"],
        "score": float(rng.uniform(0.3, 1)),
        "bbox": [*box[:2], max(box[2], 1.0), max(box[3], 1.0)],
    }
