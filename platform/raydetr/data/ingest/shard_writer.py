"""Write shards and the manifest that completes them."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from raydetr import storage
from raydetr.data.fault_codes import FAULT_SCHEMA, Fault, is_repaired, is_trained
from raydetr.data.schema import SCHEMA, SCHEMA_VERSION, Category, ObjectRow, Record
from raydetr.data.shards import FAULTS, MANIFEST, ROW_GROUP_SIZE, Manifest, Shard, is_target

_FAULT_ROWS = 8192


@dataclass(frozen=True)
class ShardSummary:
    """A written shard, and its counts for the manifest."""

    shard: Shard
    num_objects: int
    num_faulty_images: int
    num_faulty_objects: int
    max_objects_per_image: int


def write_shard(root: str, index: int, records: Iterable[Record]) -> ShardSummary | None:
    """Write records as shard number `index` of a folder, with one row group in memory at a time.

    Args:
        root: URI of the folder.
        index: position of the shard in the data set.
        records: rows of `schema.SCHEMA`; absent columns are null.

    Returns:
        The written shard; None, and no file, if there are no records.

    Raises:
        StorageError: the shard cannot be written.
    """
    file = f"shard-{index:06d}.parquet"
    num_images = num_objects = faulty_images = faulty_objects = max_objects = 0
    remaining = iter(records)
    batch = list(islice(remaining, ROW_GROUP_SIZE))
    if not batch:
        return None
    with storage.open_output(storage.join(root, file)) as stream:
        sink = _HashingSink(stream)
        # Image bytes are already compressed, and dictionaries and statistics for them would only need space.
        with pq.ParquetWriter(
            sink,
            SCHEMA,
            compression=_COMPRESSION,
            use_dictionary=["file_name", "objects.list.element.category_id"],
            write_statistics=["image_id"],
        ) as writer:
            while batch:
                writer.write_table(pa.Table.from_pylist(batch, schema=SCHEMA), row_group_size=ROW_GROUP_SIZE)
                num_images += len(batch)
                for record in batch:
                    objects = record.get("objects") or []
                    num_objects += len(objects)
                    faulty_images += _is_faulty(record)
                    faulty_objects += sum(map(_is_faulty, objects))
                    if is_trained(record.get("fault")):
                        max_objects = max(max_objects, sum(map(is_target, objects)))
                batch = list(islice(remaining, ROW_GROUP_SIZE))
    return ShardSummary(
        shard=Shard(file, num_images, sink.num_bytes, sink.hash.hexdigest()),
        num_objects=num_objects,
        num_faulty_images=faulty_images,
        num_faulty_objects=faulty_objects,
        max_objects_per_image=max_objects,
    )


def write_manifest(
    root: str,
    shards: Sequence[ShardSummary],
    categories: Sequence[Category],
    faults: Iterable[Fault] = (),
    *,
    seed: int = 0,
    source: str = "",
    base: Manifest | None = None,
) -> Manifest:
    """Complete a folder of shards: write faults.parquet, then manifest.json.

    Args:
        root: URI of the folder.
        shards: results of `write_shard`, in the order of the data set.
        categories: COCO categories.
        faults: rows of faults.parquet.
        seed: seed of the record order.
        source: fingerprint of the input.
        base: the data set to which the shards are appended.
    """
    codes: Counter[str] = Counter()
    remaining = iter(faults)
    with (
        storage.open_output(storage.join(root, FAULTS)) as stream,
        pq.ParquetWriter(stream, FAULT_SCHEMA, compression="zstd") as writer,
    ):
        more = True
        while more:
            batch = list(islice(remaining, _FAULT_ROWS))
            more = len(batch) == _FAULT_ROWS
            codes.update(fault.code for fault in batch)
            writer.write_table(pa.Table.from_pylist([fault.row() for fault in batch], schema=FAULT_SCHEMA))
    files = (base.shards if base else ()) + tuple(summary.shard for summary in shards)
    manifest = Manifest(
        root=storage.absolute(root),
        schema_version=SCHEMA_VERSION,
        digest=_digest(categories, files),
        categories=tuple(category.copy() for category in categories),
        shards=files,
        num_images=sum(shard.num_images for shard in files),
        num_objects=sum(summary.num_objects for summary in shards) + (base.num_objects if base else 0),
        num_faulty_images=sum(summary.num_faulty_images for summary in shards)
        + (base.num_faulty_images if base else 0),
        num_faulty_objects=sum(summary.num_faulty_objects for summary in shards)
        + (base.num_faulty_objects if base else 0),
        max_objects_per_image=max(
            [
                *(summary.max_objects_per_image for summary in shards),
                base.max_objects_per_image if base else 0,
            ]
        ),
        row_group_size=ROW_GROUP_SIZE,
        faults=dict(sorted(codes.items())),
        seed=seed,
        parent=base.digest if base else "",
        source=source,
    )
    content = {name: value for name, value in asdict(manifest).items() if name != "root"}
    storage.write_json(storage.join(root, MANIFEST), content)
    return manifest


def _is_faulty(item: Record | ObjectRow) -> bool:
    code = item.get("fault")
    return code is not None and not is_repaired(code)


def _digest(categories: Sequence[Category], shards: Sequence[Shard]) -> str:
    content = [SCHEMA_VERSION, ROW_GROUP_SIZE, list(categories), [shard.sha256 for shard in shards]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _leaf_paths(field: pa.Field, prefix: str = "") -> Iterator[str]:
    """Iterate over the Parquet paths of a field's leaf columns."""
    path = prefix + field.name
    if pa.types.is_struct(field.type):
        for child in field.type:
            yield from _leaf_paths(child, f"{path}.")
    elif pa.types.is_list(field.type):
        yield from _leaf_paths(field.type.value_field.with_name("element"), f"{path}.list.")
    else:
        yield path


_COMPRESSION = {
    path: "none" if path in ("image", "panoptic_image") else "zstd"
    for column in SCHEMA
    for path in _leaf_paths(column)
}


class _HashingSink:
    """A writable file that computes the SHA-256 and the length of what is written through it."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.hash = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self._stream.write(data)
        self.hash.update(data)
        self.num_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        """Do nothing: this sink has no buffer, and the stream is flushed when its owner closes it."""

    def close(self) -> None:
        """Do nothing: the owner of the stream closes it."""
