"""COCO JSON and images to shards, by Ray Data.

The driver reads the JSON and the sizes of the image files, and decides from them alone which record goes where;
one task a shard then reads the images, checks them and writes the shard. So the result is a function of the input
and the seed, and the driver never holds an image.

Beside the shards, until the manifest is there, `.ingest/` holds what was found in each finished one: an ingest that
was killed goes on from these.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from raydetr import cluster, storage
from raydetr.config import FaultPolicy
from raydetr.data.box_statistics import BoxStatistics
from raydetr.data.duplicates import near_duplicates
from raydetr.data.inputs import Addresses, Inputs, read_inputs
from raydetr.data.record import Entry
from raydetr.data.report import fault_lines
from raydetr.data.schema import Fault, without_notes
from raydetr.data.shard_tasks import WORK, ShardResult, plan_shards, run, write_checked
from raydetr.data.shard_writer import write_manifest
from raydetr.data.shards import (
    FAULTS,
    MANIFEST,
    Manifest,
    Shard,
    read_faults,
    read_image_hashes,
)
from raydetr.data.split import Split, split_entries
from raydetr.errors import ConfigError, DataError

_SOURCE = "source.json"
_OWN_FILES = re.compile(rf"(shard-\d{{6,}}\.parquet|{re.escape(FAULTS)})(\.[0-9a-f]{{32}}\.partial)?")
_PARTIAL = re.compile(rf"(shard-\d{{6,}}\.parquet|{re.escape(FAULTS)}|{MANIFEST})\.[0-9a-f]{{32}}\.partial")


@dataclass(frozen=True)
class Options:
    """How to ingest.

    on_fault: keep marks and reports faults; skip-image leaves images out that have a fault or whose objects have
        one; fail stops at the first.
    seed: of the order of the records.
    shard_bytes: size at which a shard is closed, in bytes of image files.
    append: add the images to a data set that is there, as new shards.
    """

    on_fault: FaultPolicy = "keep"
    seed: int = 0
    shard_bytes: int = 128 * 1024 * 1024
    append: bool = False

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise ConfigError(f"--shard-bytes is {self.shard_bytes}; expected a positive number of bytes.")


@dataclass(frozen=True)
class IngestResult:
    """What an ingest made, or found made."""

    manifest: Manifest
    written: bool
    """False: the output was complete before, from the same input; nothing was written."""
    num_images_skipped: int
    """Images left out by on_fault="skip-image"."""


def ingest(
    addresses: Addresses,
    output: str,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> IngestResult:
    """Write a COCO data set as shards with a manifest, unless the output holds them already.

    Connects to Ray when there is something to do (a job that needs more CPUs later has to connect before). The same
    input, seed, shard size and policy give the same bytes in every file of the output, whatever the number of CPUs
    and however often the ingest was ended and started again.

    Args:
        addresses: of what is read.
        output: address of the folder to write.
        options: how.
        progress: called with (images done, images in all).

    Raises:
        ConfigError: addresses that do not go together.
        StorageError: something cannot be read or written.
        DataError: a JSON is not COCO, the images are not in the folder, the output holds other data, images to
            append are there already, or on_fault stops the ingest.
    """
    inputs = read_inputs(addresses)
    return _ingest(inputs, inputs.entries, inputs.faults, output, options or Options(), "", progress)


def ingest_split(
    addresses: Addresses,
    output: str,
    split: Split,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, IngestResult]:
    """As `ingest`, cut into parts: `output`/train, `output`/val and, with three fractions, `output`/test.

    Images that are nearly the same in an earlier part are reported in the fault table of the later one.
    """
    inputs = read_inputs(addresses)
    results: dict[str, IngestResult] = {}
    faults = inputs.faults
    for name, entries in split_entries(inputs.entries, split).items():
        key = json.dumps([name, *asdict(split).values()])
        others = [result.manifest for result in results.values()]
        folder = storage.join(output, name)
        results[name] = _ingest(inputs, entries, faults, folder, options or Options(), key, progress, others)
        faults = ()
    return results


def _ingest(
    inputs: Inputs,
    entries: Sequence[Entry],
    set_faults: Sequence[Fault],
    output: str,
    options: Options,
    part: str,
    progress: Callable[[int, int], None] | None,
    others: Sequence[Manifest] = (),
) -> IngestResult:
    settings = [options.on_fault, options.seed, options.shard_bytes, part, options.append]
    source = hashlib.sha256(json.dumps([inputs.digest, settings]).encode()).hexdigest()
    base: Manifest | None = None
    if storage.exists(storage.join(output, MANIFEST)):
        base = Manifest.load(output)
        if base.source == source or not options.append:
            return _finished(base, source)
        _check_appended(base, inputs, entries)
    elif options.append:
        raise DataError(f"{output}: no {MANIFEST}, so nothing to append to: leave --append out.")
    _check_policy(list(set_faults), options.on_fault)
    earlier = _prepare(output, source, base)

    shards = plan_shards(entries, inputs.sizes, options.seed, options.shard_bytes)
    cluster.connect(cpus=1)
    cluster.require_shared(images=inputs.addresses.images, output=output)
    work = partial(
        write_checked,
        images=storage.absolute(inputs.addresses.images),
        masks=storage.absolute(inputs.addresses.panoptic_masks) if inputs.masks else "",
        output=storage.absolute(output),
        category_ids=frozenset(category["id"] for category in inputs.categories),
        skip=options.on_fault == "skip-image",
    )
    first = 1 + max((int(shard.file[6:-8]) for shard in base.shards), default=-1) if base else 0
    results: dict[int, ShardResult] = {}
    for number, result in run(work, shards, inputs, first):
        if result.error is not None:
            raise result.error
        _check_policy(result.faults, options.on_fault)
        results[number] = result
        if progress is not None:
            progress(sum(done.num_images for done in results.values()), len(entries))
    ordered = [results[number] for number in sorted(results)]
    summaries = [result.summary for result in ordered if result.summary is not None]
    if not summaries:
        name = inputs.addresses.annotations or inputs.addresses.panoptic_annotations
        raise DataError(f"{name}: every image has a fault, so --on-fault skip-image leaves none.")
    boxes = sum((result.boxes for result in ordered), BoxStatistics())
    json_name = inputs.addresses.annotations.rsplit("/", 1)[-1]
    suspected = list(boxes.suspicions(json_name))
    shown = [summary.shard for summary in summaries]
    suspected += [fault for other in others for fault in _alike(storage.absolute(output), shown, other)]
    _check_policy(suspected, options.on_fault)
    found = [fault for result in ordered for fault in result.faults]
    manifest = write_manifest(
        output,
        summaries,
        inputs.categories,
        [*earlier, *set_faults, *suspected, *found],
        seed=options.seed,
        source=source,
        base=base,
    )
    storage.delete_folder(storage.join(output, WORK))
    skipped = len(entries) + (base.num_images if base else 0) - manifest.num_images
    return IngestResult(manifest, True, skipped)


def _prepare(output: str, source: str, base: Manifest | None) -> list[Fault]:
    """Make the output ready for this input: what an ingest of it left is kept, anything else that one left deleted.

    Returns the fault table that an append goes on from.
    """
    begun = storage.join(output, WORK, _SOURCE)
    kept = {shard.file for shard in base.shards} | {FAULTS} if base else set()
    going_on = storage.exists(begun) and storage.read_json(begun).get("source") == source
    for name in storage.list_names(output):
        own = _PARTIAL.fullmatch(name) if going_on else _OWN_FILES.fullmatch(name) or _PARTIAL.fullmatch(name)
        if own and name not in kept:
            storage.delete_file(storage.join(output, name))
    if going_on:
        return [Fault(**fault) for fault in storage.read_json(begun)["faults"]]
    storage.delete_folder(storage.join(output, WORK))
    earlier = read_faults(base) if base else []
    storage.write_json(begun, {"source": source, "faults": [asdict(fault) for fault in earlier]})
    return earlier


def _finished(manifest: Manifest, source: str) -> IngestResult:
    """The result of an ingest that was completed before."""
    output = manifest.root
    if manifest.source != source:
        raise DataError(
            f"{output}: holds the shards of other input or of other flags: give another --output, delete it, or add "
            "to it with --append."
        )
    present = storage.file_sizes(output, [shard.file for shard in manifest.shards])
    for shard in manifest.shards:
        if present.get(shard.file) != shard.num_bytes:
            raise DataError(
                f"{output}: {shard.file} has {present.get(shard.file, 0)} bytes instead of {shard.num_bytes}: "
                "delete the folder and run the ingest again."
            )
    storage.delete_folder(storage.join(output, WORK))
    return IngestResult(manifest, False, 0)


def _check_appended(base: Manifest, inputs: Inputs, entries: Sequence[Entry]) -> None:
    if list(base.categories) != list(inputs.categories):
        raise DataError(
            f"{base.root}: its categories are not those of {inputs.addresses.annotations}: --append needs the same "
            "list (see --classes)."
        )
    there = {image_id for shard in base.shards for image_id, _, _ in read_image_hashes(base.root, shard)}
    if again := sorted(there & {entry.image_id for entry in entries}):
        raise DataError(
            f"{base.root}: has {len(again)} of the images to append already, such as image ids {again[:5]}: give only "
            "new ones, with ids of their own."
        )


def _alike(output: str, shards: Sequence[Shard], other: Manifest) -> Iterator[Fault]:
    """Images of `shards` that are nearly the same as one of another part of the data set."""
    ours = [row for shard in shards for row in read_image_hashes(output, shard) if row[2] is not None]
    theirs = [
        row for shard in other.shards for row in read_image_hashes(other.root, shard) if row[2] is not None
    ]
    for mine, its in near_duplicates(_hashes(ours), _hashes(theirs)).tolist():
        image_id, file, _ = ours[mine]
        reason = f"nearly the same picture as {theirs[its][1]} (image {theirs[its][0]}) of {other.root}"
        yield Fault("near-duplicate", file, image_id, None, reason)


def _hashes(rows: Sequence[tuple[int, str, int | None]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([row[2] for row in rows], dtype=np.int64)


def _check_policy(faults: Sequence[Fault], on_fault: FaultPolicy) -> None:
    if on_fault == "fail" and (found := without_notes(faults)):
        raise DataError("--on-fault fail:\n" + "\n".join(fault_lines(found)))
