"""Predicted masks and segments made from the truth: as well placed, class by class, as a test wants."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import ndimage

from detr.image_processing.panoptic_png import read_panoptic_png, write_panoptic_png
from detr.metrics.masks import encode_masks
from raydetr.data.ingest.inputs import Addresses
from raydetr.data.shards import Manifest, read_records, truth_annotations
from raydetr.data.stream.mask_targets import decode_mask
from raydetr.data.synthetic.dataset import generate
from tests.raydetr.data.stream.test_mask_targets import shards
from tests.raydetr.evaluation.tables import table_of

Blur = float | Mapping[str, float]


def scenes(folder: Path) -> Manifest:
    """Shards of 40 generated images: four classes of things with masks, three of stuff."""
    generate(str(folder / "coco"), 40, seed=2, size=96)
    notes = folder / "coco/annotations"
    panoptic = str(notes / "panoptic.json"), str(notes / "panoptic")
    addresses = Addresses(str(notes / "instances.json"), str(folder / "coco/images"), *panoptic)
    return shards(folder / "shards", addresses)


def outlines(manifest: Manifest, blur: Blur, boxes: float, seed: int = 0) -> pa.Table:
    """A detection for each object: its mask moved by about `blur` of its size, of all classes or by name, and its box by
    about `boxes`."""
    rng = np.random.default_rng(seed)
    results = []
    for record in read_records(manifest):
        for item in truth_annotations(record):
            mask = decode_mask(item["segmentation"], record["height"], record["width"])
            moved = _moved(mask, item, _blur(manifest, blur, item), rng.normal(size=2))
            results.append(
                _detection(record, item, boxes, rng) | {"segmentation": encode_masks(moved[None])[0]}
            )
    return table_of({"images": list(_images(manifest))}, results)


def segmented(manifest: Manifest, blur: Blur, boxes: float, seed: int = 0) -> pa.Table:
    """A map of the segments of each image, moved by about `blur` of their size, and their boxes by about `boxes`."""
    rng = np.random.default_rng(seed)
    results, panoptic = [], {}
    for record in read_records(manifest):
        truth = read_panoptic_png(record["panoptic_image"])
        found = np.zeros_like(truth)
        for item in record["segments"]:  # stuff before things, which lie on it
            moved = _moved(truth == item["id"], item, _blur(manifest, blur, item), rng.normal(size=2))
            found[moved] = item["id"]
            results.append(_detection(record, item, boxes, rng))
        there = set(np.unique(found).tolist())
        segments = [
            {"id": item["id"], "category_id": item["category_id"], "score": 0.9}
            for item in record["segments"]
            if item["id"] in there
        ]
        panoptic[record["image_id"]] = write_panoptic_png(found), segments
    return table_of({"images": list(_images(manifest))}, results, panoptic)


def _images(manifest: Manifest) -> Iterator[dict[str, Any]]:
    for record in read_records(manifest, ["image_id", "height", "width"]):
        yield {"id": record["image_id"], "height": record["height"], "width": record["width"]}


def _blur(manifest: Manifest, blur: Blur, item: Mapping[str, Any]) -> float:
    if isinstance(blur, float):
        return blur
    return blur[next(each["name"] for each in manifest.categories if each["id"] == item["category_id"])]


def _moved(mask: np.ndarray, item: Mapping[str, Any], blur: float, direction: np.ndarray) -> np.ndarray:
    """A mask moved by so much of its object's height and width, without its pixels that leave the image."""
    _, _, width, height = item["bbox"]
    return ndimage.shift(mask.astype(np.uint8), direction * blur * (height, width), order=0) > 0


def _detection(
    record: Mapping[str, Any], item: Mapping[str, Any], off: float, rng: np.random.Generator
) -> dict[str, Any]:
    _, _, width, height = item["bbox"]
    box = np.array(item["bbox"]) + rng.normal(size=4) * off * np.array([width, height, width, height])
    return {
        "image_id": record["image_id"],
        "category_id": item["category_id"],
        "score": float(rng.uniform(0.3, 1)),
        "bbox": [*box[:2], max(box[2], 1.0), max(box[3], 1.0)],
    }
