"""The work of an ingest on the cluster: a task a shard, which reads images, checks them and writes the shard."""

import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby, islice
from typing import Any, TypeVar

import ray

from raydetr import storage
from raydetr.data.ingest.box_statistics import BoxStatistics
from raydetr.data.ingest.classes import ClassMap
from raydetr.data.ingest.index import read_entry
from raydetr.data.ingest.json_stream import read_elements
from raydetr.data.ingest.record import Reading, make_record
from raydetr.data.ingest.shard_writer import ShardSummary, write_shard
from raydetr.data.names import normal
from raydetr.data.schema import Fault, without_notes
from raydetr.data.shards import ROW_GROUP_SIZE, Shard
from raydetr.data.usable import Usable
from raydetr.errors import RaydetrError
from raydetr.lease import Held

Item = TypeVar("Item")

WORK = ".ingest"
"""Folder, beside the shards, of what each is made of and what was found in each finished one."""


@dataclass(frozen=True)
class ShardResult:
    """What became of a shard; no summary: no record was left for it."""

    summary: ShardSummary | None
    faults: list[Fault]
    num_images: int
    boxes: BoxStatistics = field(default_factory=BoxStatistics)
    usable: Usable = field(default_factory=Usable)
    error: RaydetrError | None = None


def plan_shards(items: Iterable[tuple[Item, int]], shard_bytes: int) -> Iterator[tuple[int, list[Item]]]:
    """Cut what is to be written into shards, which are closed after whole row groups only.

    Args:
        items: each with the bytes of its image file, in the order of the records.
        shard_bytes: a shard is closed when its image files have as many bytes.

    Yields:
        The row groups: which shard it is of, from 0, and its items.
    """
    remaining = iter(items)
    number = filled = 0
    while group := list(islice(remaining, ROW_GROUP_SIZE)):
        if filled >= shard_bytes:
            number, filled = number + 1, 0
        yield number, [item for item, _ in group]
        filled += sum(size for _, size in group)


def record_order(seed: int) -> Callable[[int], bytes]:
    """What image ids are sorted by: a keyed hash, so the order is random and the same however the JSON is sorted."""
    return lambda image_id: hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=16).digest()


def write_work(output: str, items: Iterable[tuple[str, int]], shard_bytes: int, first: int) -> range:
    """Write what each task has to do, beside the shards: a driver that held it would grow with the data set.

    Args:
        output: address of the folder of shards.
        items: texts of `Index.texts`, in the order of the records.
        shard_bytes: see `plan_shards`.
        first: number of the first shard.

    Returns:
        The numbers of the shards.
    """
    there = set(storage.list_names(storage.join(output, WORK)))
    number = first - 1
    for number, groups in groupby(plan_shards(items, shard_bytes), lambda each: first + each[0]):
        if there.isdisjoint((_entries_file(number), _result_file(number))):
            with storage.open_output(storage.join(output, WORK, _entries_file(number))) as stream:
                stream.write(b'{"images": [')
                for place, (_, texts) in enumerate(groups):
                    stream.write((",\n" if place else "").encode() + ",\n".join(texts).encode())
                stream.write(b"]}")
    return range(first, number + 1)


def read_found(output: str, numbers: Iterable[int]) -> Iterator[Fault]:
    """The faults that were found in finished shards."""
    for number in numbers:
        content = storage.read_json(storage.join(output, WORK, _result_file(number)))
        yield from (Fault(**fault) for fault in content["faults"])


def run(work: Callable[[int], ShardResult], numbers: Sequence[int]) -> Iterator[tuple[int, ShardResult]]:
    """Do the work of each shard in a Ray Data task of its own; results come as they are ready."""
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
    """Read, check and write one shard, unless `.ingest/` says that it was.

    An error is returned: raised in a task it would arrive as Ray's.

    A task can outlive a killed driver by some seconds. Once another ingest has taken the lease it writes nothing, or
    its files would appear next to a finished data set.

    Args:
        number: of the shard.
        images: addresses of the folders of images.
        masks: address of the folder of panoptic PNGs.
        output: address of the folder of shards.
        category_ids: of the data set.
        class_map: what becomes of the categories.
        skip: leave out images with a fault that is not repaired.
        reading: how records are read.
        held: the lease of the output.
    """
    faults: list[Fault] = []
    boxes = BoxStatistics()
    usable = Usable()
    count = 0

    def records() -> Iterator[dict[str, Any]]:
        nonlocal boxes, count, usable
        for element in read_elements(storage.join(output, WORK, _entries_file(number))):
            work = read_entry(element.value, class_map)
            entry, panoptic = work.entry, work.entry.panoptic
            data = None
            if work.file is not None:
                data = storage.read_bytes(storage.join(images[work.file[0]], work.file[1]))
            png = None
            if work.has_mask and panoptic:
                png = storage.read_bytes(storage.join(masks, normal(panoptic.file_name)))
            record, found = make_record(entry, data, category_ids, png, reading)
            count += 1
            faults.extend(found)
            boxes = boxes.add(record)
            usable = usable.add(record)
            if not (skip and any(not fault.is_repaired for fault in without_notes(found))):
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
