"""What shards hold, counted from their columns, and whether their files are those of the manifest."""

import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as compute
import ray

from raydetr import storage
from raydetr.data.shards import Manifest, Shard, read_rows
from raydetr.errors import RaydetrError

_COLUMNS = [
    "image_id",
    "objects.list.element.category_id",
    "objects.list.element.segmentation",
    "segments.list.element.category_id",
]


@dataclass
class Contents:
    """Of a shard, or of several.

    problems: what is wrong with a file: each begins with its name.
    shards: how many were read whole.
    categories: category id → objects; those at fault too.
    segment_categories: category id → panoptic segments.
    masks: objects with a segmentation.
    panoptic: images with a panoptic PNG.
    max_segments: most segments of an image.
    """

    problems: list[str] = field(default_factory=list)
    shards: int = 0
    images: int = 0
    categories: Counter[int] = field(default_factory=Counter)
    segment_categories: Counter[int] = field(default_factory=Counter)
    masks: int = 0
    panoptic: int = 0
    max_segments: int = 0

    def add(self, other: "Contents") -> None:
        """Take in another shard's."""
        self.problems += other.problems
        self.shards += other.shards
        self.images += other.images
        self.categories += other.categories
        self.segment_categories += other.segment_categories
        self.masks += other.masks
        self.panoptic += other.panoptic
        self.max_segments = max(self.max_segments, other.max_segments)


def survey(manifest: Manifest, count: int) -> Contents:
    """Look at the files of all shards, and read some of them whole.

    Each is read by a task on some node of the cluster; where none has a CPU free, by this process.

    Args:
        manifest: what the files should be.
        count: shards to read, drawn at random, the same ones each time; 0: all.
    """
    whole = Contents(problems=_files(manifest))
    damaged = {problem.split(" ", 1)[0] for problem in whole.problems}
    shards = list(manifest.shards)
    if 0 < count < len(shards):
        shards = random.Random(manifest.digest).sample(shards, count)
    shards = [shard for shard in shards if shard.file not in damaged]
    if ray.is_initialized() and ray.available_resources().get("CPU", 0) >= 1:
        task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(examine_shard)
        each = ray.get([task.remote(manifest.root, shard) for shard in shards])
    else:
        each = [examine_shard(manifest.root, shard) for shard in shards]
    for found in each:
        whole.add(found)
    return whole


def examine_shard(root: str, shard: Shard) -> Contents:
    """Compare a shard's file with the manifest, count what is in it."""
    contents = Contents()
    try:
        checksum = hashlib.sha256()
        for chunk in storage.read_chunks(storage.join(root, shard.file)):
            checksum.update(chunk)
        if checksum.hexdigest() != shard.sha256:
            contents.problems.append(f"{shard.file} has another checksum than the manifest says")
        table = read_rows(root, shard.file, None, _COLUMNS)
        panoptic = read_rows(root, shard.file, None, ["panoptic_image"])
    except RaydetrError as error:
        contents.problems.append(str(error))
        return contents
    contents.shards, contents.images = 1, table.num_rows
    contents.panoptic = table.num_rows - panoptic["panoptic_image"].null_count
    objects = _flat(table["objects"])
    contents.categories = _counts(objects.field("category_id"))
    contents.masks = len(objects) - objects.field("segmentation").null_count
    contents.segment_categories = _counts(_flat(table["segments"]).field("category_id"))
    contents.max_segments = compute.max(compute.list_value_length(table["segments"])).as_py() or 0
    if table.num_rows != shard.num_images:
        contents.problems.append(
            f"{shard.file} has {table.num_rows} images, {shard.num_images} by the manifest"
        )
    return contents


def _files(manifest: Manifest) -> list[str]:
    """What is wrong with the presence and size of the shards' files: each names one."""
    names = [shard.file for shard in manifest.shards]
    sizes = storage.file_sizes(manifest.root, names)
    return [
        f"{shard.file} is missing"
        if shard.file not in sizes
        else f"{shard.file} has {sizes[shard.file]:,} bytes, {shard.num_bytes:,} by the manifest"
        for shard in manifest.shards
        if sizes.get(shard.file) != shard.num_bytes
    ]


def _flat(column: pa.ChunkedArray) -> Any:
    return compute.list_flatten(column).combine_chunks()


def _counts(values: pa.Array) -> Counter[int]:
    counted = compute.value_counts(values.drop_null())
    return Counter({each["values"]: each["counts"] for each in counted.to_pylist()})
