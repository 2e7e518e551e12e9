"""A difficult data set: unequal shards, a prime number of records, many sizes, faults, images without objects."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raydetr.data.ingest.shard_writer import write_manifest, write_shard
from raydetr.data.shards import Manifest

CATEGORIES = [{"id": 3, "name": "ant"}, {"id": 7, "name": "bee"}, {"id": 90, "name": "cat"}]


def write_awkward(
    folder: Path,
    shards: tuple[int, ...] = (37, 1, 23),
    empty: float = 0.2,
    seed: int = 0,
    masks: bool = False,
) -> Manifest:
    """Write shards of random images of 40 to 100 pixels a side. A share `empty` of them has no objects.

    One object in twenty is faulty and one object is a crowd. One image is truncated but its record has no fault, and
    one has a fault that ingest would have found. With `masks` the mask of an object is its box without a corner.
    """
    rng = np.random.default_rng(seed)
    number, summaries = 0, []
    for index, size in enumerate(shards):
        records = [record(rng, number + i, empty) for i in range(size)]
        if index == 0:
            records[3]["image"] = records[3]["image"][: len(records[3]["image"]) // 2]
            records[5] |= {"image": None, "fault": "missing-file"}
        for item in (item for each in records for item in each["objects"] if masks):
            x, y, w, h = item["bbox"]
            item["segmentation"] = {"polygons": [[x, y, x + w, y, x + w, y + h / 2, x, y + h]], "rle": None}
        number += size
        summaries.append(write_shard(str(folder), index, records))
    return write_manifest(str(folder), summaries, CATEGORIES)


def write_whole_masks(folder: Path, count: int) -> Manifest:
    """Write shards of images, each with one object whose mask covers the whole image."""
    rng = np.random.default_rng(0)
    records = [record(rng, number, empty=0.0) for number in range(count)]
    for each in records:
        height, width = each["height"], each["width"]
        whole = {"polygons": [[0, 0, width, 0, width, height, 0, height]], "rle": None}
        box = {"bbox": [0.0, 0.0, width, height], "area": width * height, "iscrowd": 0, "fault": None}
        each["objects"] = [{**each["objects"][0], **box, "segmentation": whole}]
    return write_manifest(str(folder), [write_shard(str(folder), 0, records)], CATEGORIES)


def record(rng: np.random.Generator, number: int, empty: float) -> dict[str, Any]:
    """Create a record with noise as pixels and up to six objects."""
    height, width = (int(side) for side in rng.integers(40, 101, 2))
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image.save(file, "JPEG" if number % 2 else "PNG")
    count = 0 if rng.random() < empty else int(rng.integers(1, 7))
    objects = []
    for index in range(count):
        x, y = rng.uniform(0, width - 12), rng.uniform(0, height - 12)
        w, h = rng.uniform(4, width - x), rng.uniform(4, height - y)
        faulty = rng.random() < 0.05
        objects.append(
            {
                "id": number * 10 + index,
                "category_id": int(rng.choice([3, 7, 90])),
                "bbox": [x, y, 0.0 if faulty else w, h],
                "area": w * h,
                "iscrowd": int(number == 11 and index == 0),
                "fault": "empty-box" if faulty else None,
            }
        )
    return {
        "image_id": 1000 + 7 * number,
        "file_name": f"{number}.img",
        "height": height,
        "width": width,
        "image": file.getvalue(),
        "objects": objects,
        "fault": None,
    }
