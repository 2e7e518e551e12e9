"""Count the contents of shards, and check their files against the manifest."""

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
    """Counts over one or more shards.

    problems: problems with files; each starts with the file name.
    shards: number of shards that were read completely.
    categories: category id → number of objects, including faulty ones.
    segment_categories: category id → number of panoptic segments.
    masks: number of objects with a segmentation.
    panoptic: number of images with a panoptic PNG.
    max_segments: maximum number of segments per image.
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
        """Add the counts of another shard."""
        self.problems += other.problems
        self.shards += other.shards
        self.images += other.images
        self.categories += other.categories
        self.segment_categories += other.segment_categories
        self.masks += other.masks
        self.panoptic += other.panoptic
        self.max_segments = max(self.max_segments, other.max_segments)


def survey(manifest: Manifest, count: int) -> Contents:
    """Check that all shard files are present with the right size, and read some of them completely.

    Each shard is read by a task on any node of the cluster, or by this process if no CPU is free.

    Args:
        manifest: manifest to compare with.
        count: number of shards to read, chosen at random but the same each time; 0: all.
    """
    total = Contents(problems=_files(manifest))
    damaged = {problem.split(" ", 1)[0] for problem in total.problems}
    shards = list(manifest.shards)
    if 0 < count < len(shards):
        shards = random.Random(manifest.digest).sample(shards, count)
    shards = [shard for shard in shards if shard.file not in damaged]
    if ray.is_initialized() and ray.available_resources().get("CPU", 0) >= 1:
        task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(examine_shard)
        contents = ray.get([task.remote(manifest.root, shard) for shard in shards])
    else:
        contents = [examine_shard(manifest.root, shard) for shard in shards]
    for each in contents:
        total.add(each)
    return total


def examine_shard(root: str, shard: Shard) -> Contents:
    """Compare a shard file with the manifest, and count its contents."""
    contents = Contents()
    try:
        checksum = hashlib.sha256()
        for chunk in storage.read_chunks(storage.join(root, shard.file)):
            checksum.update(chunk)
        if checksum.hexdigest() != shard.sha256:
            contents.problems.append(f"{shard.file} has a checksum that differs from the manifest")
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
            f"{shard.file} has {table.num_rows} images, but {shard.num_images} in the manifest"
        )
    return contents


def _files(manifest: Manifest) -> list[str]:
    """List missing files and files of another size than in the manifest; each entry starts with the file name."""
    names = [shard.file for shard in manifest.shards]
    sizes = storage.file_sizes(manifest.root, names)
    return [
        f"{shard.file} is missing"
        if shard.file not in sizes
        else f"{shard.file} has {sizes[shard.file]:,} bytes, but {shard.num_bytes:,} in the manifest"
        for shard in manifest.shards
        if sizes.get(shard.file) != shard.num_bytes
    ]


def _flat(column: pa.ChunkedArray) -> Any:
    return compute.list_flatten(column).combine_chunks()


def _counts(values: pa.Array) -> Counter[int]:
    counts = compute.value_counts(values.drop_null())
    return Counter({each["values"]: each["counts"] for each in counts.to_pylist()})
