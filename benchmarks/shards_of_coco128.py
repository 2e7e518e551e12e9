"""Shards for the benchmarks: the records of coco128, repeated with unique ids."""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from raydetr import storage
from raydetr.data.ingest.coco import read_coco
from raydetr.data.ingest.index import Index
from raydetr.data.ingest.record import Entry, make_record
from raydetr.data.ingest.shard_writer import ShardSummary, write_manifest, write_shard
from raydetr.data.shards import MANIFEST, Manifest

SOURCE = Path(__file__).parents[2] / "shared" / "data" / "coco128"
RECORDS_PER_SHARD = 512


def coco128_shards(root: str, num_images: int, side: int | None = None) -> Manifest:
    """Make a folder of shards with `num_images` records, once; `side` is the images' longer side in pixels."""
    folder = os.path.join(root, f"coco128-{num_images}" + (f"-{side}" if side else ""))
    if not storage.exists(storage.join(folder, MANIFEST)):
        index = Index()
        file = read_coco(str(SOURCE / "annotations" / "instances_train2017.json"), index)
        index.join_files()
        category_ids = frozenset(category["id"] for category in file.categories)
        originals = [_record(entry, category_ids, side) for entry in index.entries()]

        def records(start: int) -> Iterator[dict[str, Any]]:
            for number in range(start, min(start + RECORDS_PER_SHARD, num_images)):
                yield {**originals[number % len(originals)], "image_id": number}

        summaries: list[ShardSummary] = []
        for number, start in enumerate(range(0, num_images, RECORDS_PER_SHARD)):
            summary = write_shard(folder, number, records(start))
            assert summary is not None
            summaries.append(summary)
        write_manifest(folder, summaries, file.categories)
    return Manifest.load(folder)


def _record(entry: Entry, category_ids: frozenset[int], side: int | None) -> dict[str, Any]:
    data = (SOURCE / "train2017" / entry.file_name).read_bytes()
    if side is not None:
        image = Image.open(io.BytesIO(data))
        factor = side / max(image.size)
        image = image.resize((round(factor * image.width), round(factor * image.height)))
        file = io.BytesIO()
        image.convert("RGB").save(file, "JPEG")
        data = file.getvalue()
        entry = replace(
            entry,
            height=image.height,
            width=image.width,
            annotations=tuple(
                replace(each, fields={**each.fields, "bbox": [factor * v for v in each.fields["bbox"]]})
                for each in entry.annotations
            ),
        )
    return make_record(entry, data, category_ids)[0]


if __name__ == "__main__":
    print(json.dumps({"images": coco128_shards("runs/benchmarks", 1024).num_images}))
