"""Shards for the benchmarks: coco128's records over and over, under ids of their own."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from raydetr import storage
from raydetr.data.coco import read_coco
from raydetr.data.record import make_record
from raydetr.data.shard_writer import ShardSummary, write_manifest, write_shard
from raydetr.data.shards import MANIFEST, Manifest

SOURCE = Path(__file__).parents[3] / "shared" / "data" / "coco128"
RECORDS_PER_SHARD = 512


def coco128_shards(root: str, num_images: int) -> Manifest:
    """A folder of shards with `num_images` records, made once."""
    folder = os.path.join(root, f"coco128-{num_images}")
    if not storage.exists(storage.join(folder, MANIFEST)):
        index = read_coco(str(SOURCE / "annotations" / "instances_train2017.json"))
        category_ids = frozenset(category["id"] for category in index.categories)

        def records(start: int) -> Iterator[dict[str, Any]]:
            for number in range(start, min(start + RECORDS_PER_SHARD, num_images)):
                entry = replace(index.entries[number % len(index.entries)], image_id=number)
                data = (SOURCE / "train2017" / entry.file_name).read_bytes()
                yield make_record(entry, data, category_ids)[0]

        summaries: list[ShardSummary] = []
        for number, start in enumerate(range(0, num_images, RECORDS_PER_SHARD)):
            summary = write_shard(folder, number, records(start))
            assert summary is not None
            summaries.append(summary)
        write_manifest(folder, summaries, index.categories)
    return Manifest.load(folder)


if __name__ == "__main__":
    print(json.dumps({"images": coco128_shards("runs/benchmarks", 1024).num_images}))
