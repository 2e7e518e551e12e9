"""A data set on storage: Parquet shards, and the manifest that lists them.

A folder of shards holds `shard-000000.parquet …` (row groups of 32 records of `schema.SCHEMA`), `faults.parquet`
and `manifest.json`. The manifest is written last, so its presence means that the data set is complete. Nothing in
these files depends on when or where they were written.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NotRequired, TypedDict, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydetr import storage
from raydetr.data.fault_codes import Fault, is_trained
from raydetr.data.schema import SCHEMA_VERSION, Category, ObjectRow, Record, Segmentation
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

GROUND_TRUTH_COLUMNS = [
    "image_id",
    "file_name",
    "height",
    "width",
    *(f"objects.list.element.{name}" for name in ("id", "category_id", "bbox", "area", "iscrowd")),
]


class Target(TypedDict):
    """An object that `is_target` accepts: ingest has checked its category id and box."""

    category_id: int
    bbox: list[float]


class GroundTruthAnnotation(TypedDict):
    """A COCO annotation for evaluation, with the stored columns of the object."""

    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int
    segmentation: NotRequired[Segmentation | None]
    fault: NotRequired[str | None]


@dataclass(frozen=True)
class Shard:
    """One file of a data set."""

    file: str
    num_images: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json, and `root`, which is not stored."""

    root: str
    """URI of the folder."""
    schema_version: int
    digest: str
    """SHA-256 over the categories and the checksums of all shards. Equal digests mean equal data in equal order."""
    categories: tuple[Category, ...]
    """COCO categories in the order of the JSON file."""
    shards: tuple[Shard, ...]
    num_images: int
    num_objects: int
    num_faulty_images: int
    num_faulty_objects: int
    max_objects_per_image: int
    """Maximum number of training targets (see `training_targets`) in an image."""
    row_group_size: int
    faults: dict[str, int]
    """Fault code → rows of faults.parquet."""
    seed: int
    """Seed of the record order."""
    parent: str
    """Digest of the data set before the last append; empty if nothing was appended."""
    source: str
    """Fingerprint of the input and the ingest settings; empty for shards that were not ingested from files."""

    @classmethod
    def load(cls, uri: str) -> "Manifest":
        """Read the manifest of a folder of shards.

        Raises:
            DataError: the manifest is missing, damaged or of another schema version.
        """
        file = storage.join(uri, MANIFEST)
        if not storage.exists(file):
            raise DataError(
                f"{uri}: no {MANIFEST}: not a folder of shards, or its ingest did not finish: "
                f"run pipelines/ingest.py --output {shlex.quote(uri)}."
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
                f"{file}: damaged: the keys {sorted(set(content) ^ expected)} are missing or unexpected: "
                "delete the folder and ingest the data again."
            )
        content["categories"] = tuple(content["categories"])
        content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
        return cls(root=storage.absolute(uri), **content)

    @cached_property
    def category_ids(self) -> list[int]:
        """Label → category id, in ascending order of the category ids."""
        return sorted(category["id"] for category in self.categories)

    @cached_property
    def labels(self) -> dict[int, int]:
        """Category id → contiguous label 0..n-1, in ascending order of the category ids."""
        return {category_id: label for label, category_id in enumerate(self.category_ids)}

    @cached_property
    def id2label(self) -> dict[int, str]:
        """Label → category name."""
        names = {category["id"]: category["name"] for category in self.categories}
        return {label: names[category_id] for label, category_id in enumerate(self.category_ids)}


def read_rows(
    root: str, shard_file: str, row_groups: Sequence[int] | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read row groups of a shard in the given order, opening the file once.

    Args:
        root: URI of the folder of shards.
        shard_file: `Shard.file`.
        row_groups: indices of row groups; group g holds the records 32 g … 32 g + 31 of the shard. None reads all.
        columns: column names, including nested ones such as `objects.list.element.bbox`. None reads all.

    Returns:
        A table with the requested columns of `schema.SCHEMA`, in the order of the schema.

    Raises:
        StorageError: the shard cannot be opened.
        DataError: the shard is damaged.
    """
    uri = storage.join(root, shard_file)
    try:
        return storage.read(uri, lambda stream: _read_row_groups(stream, row_groups, columns))
    except (pa.ArrowException, OSError, IndexError) as error:
        which = "its row groups" if row_groups is None else f"row groups {list(row_groups)}"
        raise DataError(
            f"{uri}: {which} cannot be read ({error}): the shard is damaged; "
            "delete the folder and ingest the data again."
        ) from error


def _read_row_groups(
    stream: pa.NativeFile, row_groups: Sequence[int] | None, columns: Sequence[str] | None
) -> pa.Table:
    # pre_buffer: adjacent columns and row groups are fetched in one request.
    with pq.ParquetFile(stream, pre_buffer=True) as file:
        groups = range(file.num_row_groups) if row_groups is None else row_groups
        names = None if columns is None else list(columns)
        return file.read_row_groups(list(groups), columns=names, use_threads=False)


def read_records(manifest: Manifest, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """Iterate over the records of a data set in storage order, with one row group in memory at a time."""
    for shard in manifest.shards:
        for group in range(-(-shard.num_images // manifest.row_group_size)):
            yield from read_rows(manifest.root, shard.file, [group], columns).to_pylist()


def read_image_hashes(root: str, shard: Shard) -> list[tuple[int, str, int | None]]:
    """Read image id, file name and perceptual hash (see `duplicates.image_hash`) of the records of a shard."""
    table = read_rows(root, shard.file, None, ["image_id", "file_name", "image_hash"])
    return list(zip(*(table[name].to_pylist() for name in ("image_id", "file_name", "image_hash"))))


def read_faults(root: str) -> Iterator[Fault]:
    """Iterate over the rows of faults.parquet in a folder of shards, with one row group in memory at a time."""
    groups = storage.read(storage.join(root, FAULTS), lambda stream: pq.ParquetFile(stream).num_row_groups)
    for group in range(groups):
        for row in read_rows(root, FAULTS, [group]).drop_columns("level").to_pylist():
            yield Fault(**row)


def training_targets(
    record: Record, labels: Mapping[int, int]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Select the training targets of a record: its objects without crowds and without those that a fault excludes.

    Args:
        record: a row with `TARGET_COLUMNS`.
        labels: `Manifest.labels`.

    Returns:
        boxes_xyxy float64 [n, 4] in pixels, clipped to the image, each with a positive area; labels int64 [n],
        contiguous.
    """
    targets = [item for item in record["objects"] or () if is_target(item)]
    return target_arrays(targets, (record["height"], record["width"]), labels)


def target_arrays(
    targets: Sequence[Target], size: tuple[int, int], labels: Mapping[int, int]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Convert targets to the arrays of `training_targets`. `size`: height and width of their image in pixels."""
    height, width = size
    boxes = np.array([item["bbox"] for item in targets], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = np.clip(boxes, 0, np.array([width, height] * 2, dtype=np.float64))
    return boxes, np.array([labels[item["category_id"]] for item in targets], dtype=np.int64)


def ground_truth_annotations(record: Record) -> Iterator[GroundTruthAnnotation]:
    """Convert the objects of a record to COCO annotations for evaluation.

    pycocotools computes the same metrics on them as on the original JSON. Faulty objects are included, but for those
    without a readable id, category id or box, on which pycocotools stops, and those with NaN or infinity in the box,
    which cannot be matched. A missing or non-finite area is replaced by the area of the box, and a missing iscrowd by
    0. Segmentations are not included.

    Args:
        record: a record with at least `GROUND_TRUTH_COLUMNS`.
    """
    for item in record["objects"] or ():
        box = item["bbox"]
        if item["id"] is None or item["category_id"] is None or box is None or not np.isfinite(box).all():
            continue
        area = item["area"]
        if area is None or not math.isfinite(area):
            area = box[2] * box[3]
        annotation: Any = {
            **item,
            "image_id": record["image_id"],
            "area": area,
            "iscrowd": item["iscrowd"] or 0,
        }
        yield annotation


def is_target(item: ObjectRow) -> TypeGuard[Target]:
    """Whether an object is a training target: it is not a crowd, and it has no fault that excludes it."""
    return not item.get("iscrowd") and is_trained(item.get("fault"))
