"""The work of an ingest on the cluster: a task a shard, which reads images, checks them and writes the shard."""

import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import ray

from raydetr import storage
from raydetr.data.box_statistics import BoxStatistics
from raydetr.data.inputs import Inputs
from raydetr.data.record import Entry, make_record
from raydetr.data.schema import Fault, without_notes
from raydetr.data.shard_writer import ShardSummary, write_shard
from raydetr.data.shards import ROW_GROUP_SIZE, Shard
from raydetr.errors import RaydetrError

WORK = ".ingest"
"""Folder, beside the shards, of what was found in each finished one."""


@dataclass(frozen=True)
class ShardResult:
    """What became of a shard; no summary: no record was left for it."""

    summary: ShardSummary | None
    faults: list[Fault]
    num_images: int
    boxes: BoxStatistics = field(default_factory=BoxStatistics)
    error: RaydetrError | None = None


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


def run(
    work: Callable[[int, list[tuple[Entry, bool, bool]]], ShardResult],
    shards: Sequence[Sequence[Entry]],
    inputs: Inputs,
    first: int,
) -> Iterator[tuple[int, ShardResult]]:
    """Do the work of each shard in a Ray Data task of its own; results come as they are ready."""
    rows = [
        {
            "shard": number,
            "entries": pickle.dumps(
                [
                    (
                        entry,
                        entry.file_name in inputs.sizes,
                        entry.panoptic is not None and entry.panoptic.file_name in inputs.masks,
                    )
                    for entry in entries
                ]
            ),
        }
        for number, entries in enumerate(shards, first)
    ]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    for row in dataset.map(partial(_task, work=work)).iter_rows():
        yield row["shard"], pickle.loads(row["result"])


def _task(
    row: dict[str, Any], work: Callable[[int, list[tuple[Entry, bool, bool]]], ShardResult]
) -> dict[str, Any]:
    return {"shard": row["shard"], "result": pickle.dumps(work(row["shard"], pickle.loads(row["entries"])))}


def write_checked(
    number: int,
    entries: Sequence[tuple[Entry, bool, bool]],
    *,
    images: str,
    masks: str,
    output: str,
    category_ids: frozenset[int],
    skip: bool,
) -> ShardResult:
    """Read, check and write one shard, unless `.ingest/` says that it was.

    An error is returned: raised in a task it would arrive as Ray's.

    Args:
        number: of the shard.
        entries: each with whether its image, and its panoptic PNG, exist.
        images: address of the folder of images.
        masks: address of the folder of panoptic PNGs.
        output: address of the folder of shards.
        category_ids: of the data set.
        skip: leave out images with a fault.
    """
    faults: list[Fault] = []
    boxes = BoxStatistics()

    def records() -> Iterator[dict[str, Any]]:
        nonlocal boxes
        for entry, exists, has_mask in entries:
            data = storage.read_bytes(storage.join(images, entry.file_name)) if exists else None
            png = (
                storage.read_bytes(storage.join(masks, entry.panoptic.file_name))
                if has_mask and entry.panoptic
                else None
            )
            record, found = make_record(entry, data, category_ids, png)
            faults.extend(found)
            boxes = boxes.add(record)
            if not (skip and without_notes(found)):
                yield record

    done = storage.join(output, WORK, f"shard-{number:06d}.json")
    try:
        if storage.exists(done):
            return _from_json(storage.read_json(done))
        summary = write_shard(output, number, records())
        result = ShardResult(summary, faults, len(entries), boxes)
        storage.write_json(done, {**asdict(result), "error": None})
    except RaydetrError as error:
        return ShardResult(None, [], 0, error=error)
    return result


def _from_json(content: Mapping[str, Any]) -> ShardResult:
    summary = content["summary"]
    return ShardResult(
        None if summary is None else ShardSummary(**{**summary, "shard": Shard(**summary["shard"])}),
        [Fault(**fault) for fault in content["faults"]],
        content["num_images"],
        BoxStatistics(**content["boxes"]),
    )
