"""The tasks of an ingest on the cluster: one task per shard reads the images, checks them and writes the shard."""

import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby, islice
from typing import Any, TypeVar

import ray

from raydetr import storage
from raydetr.data.fault_codes import Fault, without_notes
from raydetr.data.ingest.box_statistics import BoxStatistics
from raydetr.data.ingest.classes import ClassMap
from raydetr.data.ingest.index import read_entry
from raydetr.data.ingest.json_stream import read_elements
from raydetr.data.ingest.record import Reading, make_record
from raydetr.data.ingest.shard_writer import ShardSummary, write_shard
from raydetr.data.names import normalize_name
from raydetr.data.schema import Record
from raydetr.data.shards import ROW_GROUP_SIZE, Shard
from raydetr.data.usable import Usable
from raydetr.errors import RaydetrError
from raydetr.lease import Held

Item = TypeVar("Item")

WORK = ".ingest"
"""Folder next to the shards with the input of each shard and the result of each finished one."""


@dataclass(frozen=True)
class ShardResult:
    """The result of a task.

    summary: the written shard; None if all its images were skipped, or if there is an error.
    faults: faults found in its images.
    num_images: number of images read.
    boxes: statistics of their boxes.
    usable: counts of trainable images and objects.
    error: why the task failed.
    """

    summary: ShardSummary | None
    faults: list[Fault]
    num_images: int
    boxes: BoxStatistics = field(default_factory=BoxStatistics)
    usable: Usable = field(default_factory=Usable)
    error: RaydetrError | None = None


def plan_shards(items: Iterable[tuple[Item, int]], shard_bytes: int) -> Iterator[tuple[int, list[Item]]]:
    """Divide items into shards. A shard is closed only after a complete row group.

    Args:
        items: each item with the bytes of its image file, in record order.
        shard_bytes: a shard is closed when its image files reach this number of bytes.

    Yields:
        (number of the shard, from 0; items) of each row group.
    """
    remaining = iter(items)
    number = filled = 0
    while group := list(islice(remaining, ROW_GROUP_SIZE)):
        if filled >= shard_bytes:
            number, filled = number + 1, 0
        yield number, [item for item, _ in group]
        filled += sum(size for _, size in group)


def record_order(seed: int) -> Callable[[int], bytes]:
    """Return the sort key of image ids: a keyed hash, so the order is random and independent of the JSON's order."""
    return lambda image_id: hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=16).digest()


def write_task_inputs(output: str, items: Iterable[tuple[str, int]], shard_bytes: int, first: int) -> range:
    """Write the input of each task to a file, so that the driver's memory does not grow with the data set.

    Args:
        output: URI of the folder of shards.
        items: texts of `Index.texts`, in record order.
        shard_bytes: see `plan_shards`.
        first: number of the first shard.

    Returns:
        The numbers of the shards.
    """
    existing = set(storage.list_names(storage.join(output, WORK)))
    number = first - 1
    for number, groups in groupby(plan_shards(items, shard_bytes), lambda each: first + each[0]):
        if existing.isdisjoint((_entries_file(number), _result_file(number))):
            with storage.open_output(storage.join(output, WORK, _entries_file(number))) as stream:
                stream.write(b'{"images": [')
                for index, (_, texts) in enumerate(groups):
                    stream.write((",\n" if index else "").encode() + ",\n".join(texts).encode())
                stream.write(b"]}")
    return range(first, number + 1)


def read_shard_faults(output: str, numbers: Iterable[int]) -> Iterator[Fault]:
    """Iterate over the faults of finished shards."""
    for number in numbers:
        content = storage.read_json(storage.join(output, WORK, _result_file(number)))
        yield from (Fault(**fault) for fault in content["faults"])


def run_tasks(
    work: Callable[[int], ShardResult], numbers: Sequence[int]
) -> Iterator[tuple[int, ShardResult]]:
    """Run one Ray Data task per shard, and yield the results as they are ready."""
    rows = [{"shard": number} for number in numbers]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    for row in dataset.map(partial(_task, work=work)).iter_rows():
        yield row["shard"], pickle.loads(row["result"])


def _task(row: dict[str, Any], work: Callable[[int], ShardResult]) -> dict[str, Any]:
    return {"shard": row["shard"], "result": pickle.dumps(work(row["shard"]))}


def write_checked(
    number: int,
    *,
    images: Sequence[str],
    masks: str,
    output: str,
    category_ids: frozenset[int],
    class_map: ClassMap | None,
    skip: bool,
    reading: Reading,
    held: Held,
) -> ShardResult:
    """Read, check and write one shard, unless `.ingest/` has its result.

    Errors are returned and not raised: the driver would get an exception from a task wrapped in one of Ray's.

    A task can outlive a killed driver by a few seconds. Once another ingest has taken the lease, the task must not
    write anything, or its files would appear next to a finished data set. So the lease is verified before and after the
    records are read, and before the result is written.

    Args:
        number: number of the shard.
        images: URIs of the image folders.
        masks: URI of the folder of panoptic PNGs.
        output: URI of the folder of shards.
        category_ids: category ids of the data set.
        class_map: map of the categories; None: they are unchanged.
        skip: skip images with a fault that is not repaired.
        reading: how to read the records.
        held: the lease of the output folder.
    """
    faults: list[Fault] = []
    boxes = BoxStatistics()
    usable = Usable()
    count = 0

    def records() -> Iterator[Record]:
        nonlocal boxes, count, usable
        for element in read_elements(storage.join(output, WORK, _entries_file(number))):
            work = read_entry(element.value, class_map)
            entry, panoptic = work.entry, work.entry.panoptic
            data = None
            if work.file is not None:
                data = storage.read_bytes(storage.join(images[work.file[0]], work.file[1]))
            png = None
            if work.has_mask and panoptic:
                png = storage.read_bytes(storage.join(masks, normalize_name(panoptic.file_name)))
            record, record_faults = make_record(entry, data, category_ids, png, reading)
            count += 1
            faults.extend(record_faults)
            boxes = boxes.add(record)
            usable = usable.add(record)
            if not (skip and any(not fault.is_repaired for fault in without_notes(record_faults))):
                yield record
        held.verify()

    done = storage.join(output, WORK, _result_file(number))
    try:
        if storage.exists(done):
            return _from_json(storage.read_json(done))
        held.verify()
        summary = write_shard(output, number, records())
        result = ShardResult(summary, faults, count, boxes, usable)
        held.verify()
        storage.write_json(done, {**asdict(result), "error": None})
    except RaydetrError as error:
        return ShardResult(None, [], 0, error=error)
    return result


def _entries_file(number: int) -> str:
    return f"entries-{number:06d}.json"


def _result_file(number: int) -> str:
    return f"shard-{number:06d}.json"


def _from_json(content: Mapping[str, Any]) -> ShardResult:
    summary = content["summary"]
    return ShardResult(
        None if summary is None else ShardSummary(**{**summary, "shard": Shard(**summary["shard"])}),
        [Fault(**fault) for fault in content["faults"]],
        content["num_images"],
        BoxStatistics(**content["boxes"]),
        Usable(**content["usable"]),
    )
