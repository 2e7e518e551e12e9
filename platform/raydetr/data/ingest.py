"""COCO JSON and images to shards, by Ray Data.

The driver reads the JSON and the sizes of the image files, and decides from them alone which record goes where;
one task a shard then reads the images, checks them and writes the shard. So the result is a function of the input
and the seed, and the driver never holds an image.
"""

import hashlib
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from raydetr import cluster, storage
from raydetr.config import FaultPolicy
from raydetr.data.coco import CocoIndex, read_coco
from raydetr.data.record import Entry, make_record
from raydetr.data.report import fault_lines
from raydetr.data.schema import SCHEMA_VERSION, Fault
from raydetr.data.shard_writer import ShardSummary, write_manifest, write_shard
from raydetr.data.shards import FAULTS, MANIFEST, ROW_GROUP_SIZE, Manifest
from raydetr.errors import ConfigError, DataError, RaydetrError

_OWN_FILES = re.compile(rf"(shard-\d{{6,}}\.parquet|{re.escape(FAULTS)})(\.[0-9a-f]{{32}}\.partial)?")


@dataclass(frozen=True)
class IngestResult:
    """What an ingest made, or found made."""

    manifest: Manifest
    written: bool
    """False: the output was complete before, from the same input; nothing was written."""
    num_images_skipped: int
    """Images left out by on_fault="skip-image"."""


@dataclass(frozen=True)
class _ShardResult:
    summary: ShardSummary | None
    faults: list[Fault]
    num_images: int
    error: RaydetrError | None = None


def ingest(
    annotations: str,
    images: str,
    output: str,
    *,
    on_fault: FaultPolicy = "keep",
    seed: int = 0,
    shard_bytes: int = 128 * 1024 * 1024,
    progress: Callable[[int, int], None] | None = None,
) -> IngestResult:
    """Write a COCO detection data set as shards with a manifest, unless the output holds them already.

    Connects to Ray when there is something to do (a job that needs more CPUs later has to connect before). The same input, seed, shard size and policy give the same bytes
    in every file of the output, whatever the number of CPUs.

    Args:
        annotations: address of the COCO detection JSON.
        images: address of the folder that its file names refer to.
        output: address of the folder to write.
        on_fault: keep marks and reports faults; skip-image leaves images out that have a fault or whose objects
            have one; fail stops at the first.
        seed: of the order of the records.
        shard_bytes: size at which a shard is closed, in bytes of image files.
        progress: called with (images done, images in all).

    Raises:
        ConfigError: shard_bytes is not positive.
        StorageError: something cannot be read or written.
        DataError: the JSON is not COCO detection, the images are not in the folder, the output holds other data,
            or on_fault stops the ingest.
    """
    if shard_bytes < 1:
        raise ConfigError(f"--shard-bytes is {shard_bytes}; expected a positive number of bytes.")
    index = read_coco(annotations)
    sizes = _image_sizes(index, annotations, images)
    source = _fingerprint(index.digest, sizes, [on_fault, seed, shard_bytes])
    if storage.exists(storage.join(output, MANIFEST)):
        return _finished(output, source)
    _check_policy(list(index.faults), on_fault)
    _delete_leftovers(output)

    shards = plan_shards(index.entries, sizes, seed, shard_bytes)
    cluster.connect(cpus=1)
    cluster.require_shared(images=images, output=output)
    work = partial(
        _work,
        images=storage.absolute(images),
        output=storage.absolute(output),
        category_ids=frozenset(category["id"] for category in index.categories),
        skip=on_fault == "skip-image",
    )
    results: dict[int, _ShardResult] = {}
    for number, result in _run(work, shards, sizes):
        if result.error is not None:
            raise result.error
        _check_policy(result.faults, on_fault)
        results[number] = result
        if progress is not None:
            progress(sum(done.num_images for done in results.values()), len(index.entries))
    ordered = [results[number] for number in sorted(results)]
    summaries = [result.summary for result in ordered if result.summary is not None]
    if not summaries:
        raise DataError(f"{annotations}: every image has a fault, so --on-fault skip-image leaves none.")
    faults = [*index.faults, *(fault for result in ordered for fault in result.faults)]
    manifest = write_manifest(output, summaries, index.categories, faults, seed=seed, source=source)
    return IngestResult(manifest, True, len(index.entries) - manifest.num_images)


def plan_shards(
    entries: Sequence[Entry], sizes: Mapping[str, int], seed: int, shard_bytes: int
) -> list[list[Entry]]:
    """Which image goes into which shard, and in which order.

    The order is that of a keyed hash of the image ids: random, and the same however the JSON is sorted. Shards are
    closed after whole row groups only.

    Args:
        entries: images of the data set.
        sizes: file name → bytes, of those that exist.
        seed: key of the hash.
        shard_bytes: a shard is closed when its image files have as many bytes.
    """
    ordered = sorted(entries, key=lambda entry: _order(seed, entry.image_id))
    shards: list[list[Entry]] = []
    filled = shard_bytes
    for start in range(0, len(ordered), ROW_GROUP_SIZE):
        if filled >= shard_bytes:
            shards.append([])
            filled = 0
        group = ordered[start : start + ROW_GROUP_SIZE]
        shards[-1] += group
        filled += sum(sizes.get(entry.file_name, 0) for entry in group)
    return shards


def _order(seed: int, image_id: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=16).digest()


def _run(
    work: Callable[[int, list[tuple[Entry, bool]]], _ShardResult],
    shards: Sequence[Sequence[Entry]],
    sizes: Mapping[str, int],
) -> Iterator[tuple[int, _ShardResult]]:
    """Do the work of each shard in a Ray Data task of its own; results come as they are ready."""
    rows = [
        {
            "shard": number,
            "entries": pickle.dumps([(entry, entry.file_name in sizes) for entry in entries]),
        }
        for number, entries in enumerate(shards)
    ]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    for row in dataset.map(partial(_task, work=work)).iter_rows():
        yield row["shard"], pickle.loads(row["result"])


def _task(
    row: dict[str, Any], work: Callable[[int, list[tuple[Entry, bool]]], _ShardResult]
) -> dict[str, Any]:
    return {"shard": row["shard"], "result": pickle.dumps(work(row["shard"], pickle.loads(row["entries"])))}


def _work(
    number: int,
    entries: Sequence[tuple[Entry, bool]],
    *,
    images: str,
    output: str,
    category_ids: frozenset[int],
    skip: bool,
) -> _ShardResult:
    """Read, check and write one shard. An error is returned: raised in a task it would arrive as Ray's."""
    faults: list[Fault] = []

    def records() -> Iterator[dict[str, Any]]:
        for entry, exists in entries:
            data = storage.read_bytes(storage.join(images, entry.file_name)) if exists else None
            record, found = make_record(entry, data, category_ids)
            faults.extend(found)
            if not (skip and found):
                yield record

    try:
        summary = write_shard(output, number, records())
    except RaydetrError as error:
        return _ShardResult(None, [], 0, error)
    return _ShardResult(summary, faults, len(entries))


def _image_sizes(index: CocoIndex, annotations: str, images: str) -> dict[str, int]:
    """File name → bytes, of those that exist."""
    names = [entry.file_name for entry in index.entries]
    sizes = storage.file_sizes(images, names)
    if not sizes:
        there = storage.list_names(images)[:5]
        raise DataError(
            f"{images}: none of the {len(names)} images that {annotations} names is there: it names {names[0]!r}, "
            f"the folder has {there or 'nothing'}. Is --images the folder that the names are relative to?"
        )
    return sizes


def _fingerprint(digest: str, sizes: Mapping[str, int], settings: Sequence[Any]) -> str:
    content = [SCHEMA_VERSION, digest, sorted(sizes.items()), list(settings)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _finished(output: str, source: str) -> IngestResult:
    """The result of an ingest that was completed before."""
    manifest = Manifest.load(output)
    if manifest.source != source:
        raise DataError(
            f"{output}: holds the shards of other input or of other flags: give another --output, or delete it."
        )
    present = storage.file_sizes(output, [shard.file for shard in manifest.shards])
    for shard in manifest.shards:
        if present.get(shard.file) != shard.num_bytes:
            raise DataError(
                f"{output}: {shard.file} has {present.get(shard.file, 0)} bytes instead of {shard.num_bytes}: "
                "delete the folder and run the ingest again."
            )
    return IngestResult(manifest, False, 0)


def _check_policy(faults: Sequence[Fault], on_fault: FaultPolicy) -> None:
    if on_fault == "fail" and faults:
        raise DataError("--on-fault fail:\n" + "\n".join(fault_lines(faults)))


def _delete_leftovers(output: str) -> None:
    """Delete what an ingest that did not come to its end left; nothing that it did not write."""
    for name in storage.list_names(output):
        if _OWN_FILES.fullmatch(name):
            storage.delete_file(storage.join(output, name))
