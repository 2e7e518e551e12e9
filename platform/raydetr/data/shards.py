"""A data set on storage: Parquet shards, and the manifest that makes them one.

A folder of shards holds `shard-000000.parquet …` (row groups of 32 records of `schema.SCHEMA`), `faults.parquet`
and `manifest.json`. The manifest is written last: its presence means that the data set is complete. Nothing in
these files depends on the time or the place of writing.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydetr import storage
from raydetr.data.schema import SCHEMA_VERSION, Fault, is_trained
from raydetr.errors import DataError

ROW_GROUP_SIZE = 32
MANIFEST = "manifest.json"
FAULTS = "faults.parquet"

TARGET_COLUMNS = [
    "height",
    "width",
    "objects.list.element.category_id",
    "objects.list.element.bbox",
    "objects.list.element.iscrowd",
    "objects.list.element.fault",
]
"""Columns that `training_targets` needs."""

TRUTH_COLUMNS = [
    "image_id",
    "file_name",
    "height",
    "width",
    *(f"objects.list.element.{name}" for name in ("id", "category_id", "bbox", "area", "iscrowd")),
]


@dataclass(frozen=True)
class Shard:
    """One file of a data set."""

    file: str
    num_images: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds; manifest.json without `root`."""

    root: str
    """Address of the folder."""
    schema_version: int
    digest: str
    """SHA-256 over the categories and the checksums of all shards: equal digests, equal data in equal order."""
    categories: tuple[dict[str, Any], ...]
    """COCO categories in the order of the JSON file."""
    shards: tuple[Shard, ...]
    num_images: int
    num_objects: int
    num_faulty_images: int
    num_faulty_objects: int
    max_objects_per_image: int
    """Most trained objects (see `training_targets`) of an image."""
    row_group_size: int
    faults: dict[str, int]
    """Fault code → rows of faults.parquet."""
    seed: int
    """Seed of the order of the records."""
    parent: str
    """Digest of the data set that this one was appended to; empty for one written at once."""
    source: str
    """Fingerprint of what was ingested and how; empty for shards that were not ingested from files."""

    @classmethod
    def load(cls, address: str) -> "Manifest":
        """Read the manifest of a folder of shards.

        Raises:
            DataError: there is none, it is damaged, or another version wrote it.
        """
        file = storage.join(address, MANIFEST)
        if not storage.exists(file):
            raise DataError(
                f"{address}: no {MANIFEST}, so not a (complete) folder of shards: "
                f"make one with pipelines/ingest.py --output {shlex.quote(address)}."
            )
        content = storage.read_json(file)
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{file}: schema version {version!r}; this version of raydetr reads {SCHEMA_VERSION}: "
                "ingest the data again."
            )
        expected = {field.name for field in fields(cls)} - {"root"}
        if set(content) != expected:
            raise DataError(
                f"{file}: damaged: the keys {sorted(set(content) ^ expected)} are missing or surplus: "
                "delete the folder and ingest the data again."
            )
        content["categories"] = tuple(content["categories"])
        content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
        return cls(root=storage.absolute(address), **content)

    @cached_property
    def category_ids(self) -> list[int]:
        """Label → category id: ascending category ids."""
        return sorted(category["id"] for category in self.categories)

    @cached_property
    def labels(self) -> dict[int, int]:
        """Category id → contiguous label 0..n-1, by ascending category id."""
        return {category_id: label for label, category_id in enumerate(self.category_ids)}

    @cached_property
    def id2label(self) -> dict[int, str]:
        """Label → category name."""
        names = {category["id"]: category["name"] for category in self.categories}
        return {label: names[category_id] for label, category_id in enumerate(self.category_ids)}


def read_rows(
    root: str, shard_file: str, row_groups: Sequence[int] | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read row groups of a shard, in the order given, with one open.

    Args:
        root: address of the folder of shards.
        shard_file: `Shard.file`.
        row_groups: indices of row groups; group g holds the records 32 g … 32 g + 31 of the shard. None reads all.
        columns: columns, also nested ones (`objects.list.element.bbox`); None reads all.

    Returns:
        A table of `schema.SCHEMA`, with the chosen columns in the schema's order.

    Raises:
        StorageError: the shard cannot be opened.
        DataError: it is damaged.
    """
    address = storage.join(root, shard_file)
    try:
        return storage.read(address, lambda stream: _read_row_groups(stream, row_groups, columns))
    except (pa.ArrowException, OSError, IndexError) as error:
        which = "its row groups" if row_groups is None else f"row groups {list(row_groups)}"
        raise DataError(
            f"{address}: {which} cannot be read ({error}): the shard is damaged; "
            "delete the folder and ingest the data again."
        ) from error


def _read_row_groups(
    stream: pa.NativeFile, row_groups: Sequence[int] | None, columns: Sequence[str] | None
) -> pa.Table:
    # Pre-buffered: neighbouring columns and row groups come in one request.
    with pq.ParquetFile(stream, pre_buffer=True) as file:
        groups = range(file.num_row_groups) if row_groups is None else row_groups
        names = None if columns is None else list(columns)
        return file.read_row_groups(list(groups), columns=names, use_threads=False)


def read_records(manifest: Manifest, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """All records of a data set in their order, one row group in memory at a time."""
    for shard in manifest.shards:
        for group in range(-(-shard.num_images // manifest.row_group_size)):
            yield from read_rows(manifest.root, shard.file, [group], columns).to_pylist()


def read_image_hashes(root: str, shard: Shard) -> list[tuple[int, str, int | None]]:
    """Image id, file name and perceptual hash (see `duplicates.image_hash`) of a shard's records."""
    table = read_rows(root, shard.file, None, ["image_id", "file_name", "image_hash"])
    return list(zip(*(table[name].to_pylist() for name in ("image_id", "file_name", "image_hash"))))


def read_faults(root: str) -> Iterator[Fault]:
    """The rows of faults.parquet in a folder of shards, one row group in memory at a time."""
    groups = storage.read(storage.join(root, FAULTS), lambda stream: pq.ParquetFile(stream).num_row_groups)
    for group in range(groups):
        for row in read_rows(root, FAULTS, [group]).drop_columns("level").to_pylist():
            yield Fault(**row)


def training_targets(
    record: Mapping[str, Any], labels: Mapping[int, int]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The objects of a record that training learns: without crowds and without faults that exclude them.

    Args:
        record: a row with `TARGET_COLUMNS`.
        labels: `Manifest.labels`.

    Returns:
        boxes_xyxy float64 [n, 4] in pixels, clipped to the image, never empty; labels int64 [n], contiguous.
    """
    objects = [item for item in record["objects"] or () if is_target(item)]
    boxes = np.array([item["bbox"] for item in objects], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    size = np.array([record["width"], record["height"]] * 2, dtype=np.float64)
    boxes = np.clip(boxes, 0, size)
    return boxes, np.array([labels[item["category_id"]] for item in objects], dtype=np.int64)


def coco_truth(manifest: Manifest) -> dict[str, Any]:
    """The data set as COCO detection JSON, for evaluation: what pycocotools computes on the original it does here.

    Every annotation of every image is there with its own id, box, area and iscrowd, those at fault too, except the
    ones without a readable id, category id or box, on which pycocotools stops, or with NaN or infinity in the box,
    on which its matching has no meaning. An absent or non-finite area is the box's, an absent iscrowd 0.
    Segmentations are left out.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in read_records(manifest, TRUTH_COLUMNS):
        images.append(
            {"id": record["image_id"], **{name: record[name] for name in ("file_name", "height", "width")}}
        )
        annotations += truth_annotations(record)
    return {
        "images": images,
        "annotations": annotations,
        "categories": [dict(c) for c in manifest.categories],
    }


def truth_annotations(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects of a record with `TRUTH_COLUMNS` (and others) as annotations: see `coco_truth`."""
    for item in record["objects"] or ():
        box = item["bbox"]
        if item["id"] is None or item["category_id"] is None or box is None or not np.isfinite(box).all():
            continue
        area = item["area"]
        if area is None or not math.isfinite(area):
            area = box[2] * box[3]
        yield {**item, "image_id": record["image_id"], "area": area, "iscrowd": item["iscrowd"] or 0}


def is_target(item: Mapping[str, Any]) -> bool:
    """Whether training learns an object: it is no crowd and its fault, if any, does not exclude it."""
    return not item.get("iscrowd") and is_trained(item.get("fault"))
