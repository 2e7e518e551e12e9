"""The plan as one Ray Data execution for the whole job: windows in, ready micro-batches out, dealt to W workers.

A generator task walks the plan and yields one small row per window; map tasks read, decode, augment and pad, and
yield rows of a few micro-batches (see `assign_to_ranks`). `preserve_order` keeps the rows in the plan's order and makes the
split of Ray Train deal them out strictly in turn: row i goes to rank i mod W.

Ray Train calls `PlanDataConfig.configure` whenever a worker group starts, so that a restart with another number of
workers streams on from the last committed step.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import DataContext, DataIterator, Dataset
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.train import DataConfig

from detr.image_processing.augment import apply, apply_masks
from detr.image_processing.decode import ImageError
from raydetr.data.pixels import decode_record
from raydetr.data.schema import is_trained
from raydetr.data.shards import Manifest, training_targets
from raydetr.data.stream.balance import repeat_factors
from raydetr.data.stream.in_flight import ROW_BYTES, WindowBackpressure, fit_cluster
from raydetr.data.stream.mask_targets import MASK_COLUMNS, MaskKind, mask_targets
from raydetr.data.stream.micro_batch import Example, TrainingBatch, pack, unpack
from raydetr.data.stream.plan import MicroBatch, Plan, PlanSpec, Slot, WindowTask
from raydetr.data.stream.source import RECORD_COLUMNS, Source, layout, to_sizes
from raydetr.errors import ClusterError, ConfigError, DataError
from raydetr.ray_internals.data import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    ExecutionCallback,
)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What is streamed.

    source: the records.
    plan: their order.
    last_step: one past the last step of the job.
    first_step: looked up whenever workers start: the step after the last committed one.
    masks: which masks the labels have, see `mask_targets`.
    """

    source: Source
    plan: Plan
    last_step: int
    first_step: Callable[[], int]
    masks: MaskKind = "none"


def build_plan(manifest: Manifest, spec: PlanSpec, repeat_threshold: float = 0.0) -> Plan:
    """The plan of a data set.

    Args:
        manifest: of its shards.
        spec: what decides the order.
        repeat_threshold: of `balance.repeat_factors`; 0: every record exactly once per epoch.
    """
    repeats = repeat_factors(manifest, repeat_threshold) if repeat_threshold else None
    return Plan(layout(manifest), spec, repeats)


def dataset(stream: Stream, world_size: int, first_step: int) -> Dataset:
    """The lazy Ray Data set of steps `first_step` to `last_step` − 1 for `world_size` workers.

    Raises:
        ConfigError: there are more workers than micro-batches in a step.
    """
    if world_size > stream.plan.spec.micro_batches:
        raise ConfigError(
            f"--workers is {world_size}, but a step has only {stream.plan.spec.micro_batches} micro-batches: "
            "raise --micro-batches or lower --workers."
        )
    context = DataContext.get_current().copy()
    # One row a block, so that rows leave a task as they are made and are dealt out one by one.
    context.target_max_block_size = 1
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # They report what is meant so: one generator task for the whole job, which importing torch makes large.
    context.issue_detectors_config.detectors = []
    context.custom_execution_callback_classes = [_ThrottleScheduler]
    context.set_config(
        ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, WindowBackpressure]
    )
    previous = DataContext.get_current()
    DataContext._set_current(context)
    try:
        in_flight = fit_cluster(stream.plan.spec, world_size)
        # No CPU for it: it lives as long as the run, and would keep a task of the map from the CPU it has a part of.
        source = ray.data.read_datasource(_Windows(stream, first_step), override_num_blocks=1, num_cpus=0)
        return source.map_batches(
            build_micro_batches,
            fn_kwargs={"stream": stream, "world_size": world_size, "row_bytes": in_flight.row_bytes},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            concurrency=in_flight.tasks,
        )
    finally:
        DataContext._set_current(previous)


class PlanDataConfig(DataConfig):
    """Gives Ray Train's workers their shares of a `Stream` passed as `datasets={"train": stream}`."""

    def configure(  # type: ignore[override]  # a Stream instead of a Dataset
        self,
        datasets: dict[str, Stream],
        world_size: int,
        *args: Any,  # noqa: ARG002  # handles and nodes of the workers: the order must not depend on them
        **kwargs: Any,  # noqa: ARG002
    ) -> list[dict[str, DataIterator]]:
        """Build the execution for this number of workers, from the last committed step on.

        Raises:
            ClusterError: the workers have all CPUs, so that the stream would wait for ever.
        """
        cpus = ray.cluster_resources().get("CPU", 0)
        if cpus <= world_size:
            raise ClusterError(
                f"The {world_size} training workers hold all {cpus:g} CPUs of the cluster and leave none to the data "
                "stream: add a node with CPUs, or lower --workers."
            )
        shares: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, stream in datasets.items():
            rows = dataset(stream, world_size, stream.first_step())
            for share, split in zip(shares, rows.streaming_split(world_size, equal=False), strict=True):
                share[name] = split
        return shares


def steps(
    shard: DataIterator, micro_batch_size: int, per_step: int, prefetch: int = 2
) -> Iterator[list[TrainingBatch]]:
    """This worker's micro-batches, step by step.

    Args:
        shard: its share, from `ray.train.get_dataset_shard`.
        micro_batch_size: B.
        per_step: its micro-batches of each step, ⌈M / W⌉.
        prefetch: micro-batches to fetch ahead.

    Raises:
        DataError: the rows are not those of one step after the other.
    """
    gathered: list[TrainingBatch] = []
    for table in shard.iter_batches(
        batch_size=None,  # type: ignore[arg-type]  # Ray: whole blocks
        batch_format="pyarrow",
        prefetch_batches=prefetch,
    ):
        for batch in unpack(table, micro_batch_size):
            if gathered and batch.step != gathered[0].step:
                raise DataError(
                    f"The stream broke its order: a micro-batch of step {batch.step} within step "
                    f"{gathered[0].step}."
                )
            gathered.append(batch)
            if len(gathered) == per_step:
                yield gathered
                gathered = []
    if gathered:
        raise DataError(f"The stream ended within step {gathered[0].step}.")


def assign_to_ranks(
    micro_batches: Sequence[MicroBatch], spec: PlanSpec, world_size: int, row_bytes: int = ROW_BYTES
) -> Iterator[list[MicroBatch]]:
    """Rows of micro-batches such that row i is for rank i mod W, and each rank finds its own in order.

    A step is ⌈M / W⌉ · W micro-batches for W workers, the surplus being empty; micro-batch p of it is for rank
    p mod W. Steps that are whole in `micro_batches` are dealt out several at a time, a row a rank; a step of which
    there is only a part is dealt out by single micro-batches.

    Args:
        micro_batches: consecutive ones of the plan, such as those of a window.
        spec: of the plan.
        world_size: W.
        row_bytes: pixels of a row, about.
    """
    share = -(-spec.micro_batches // world_size)
    whole: list[list[MicroBatch]] = []

    def rows() -> Iterator[list[MicroBatch]]:
        for rank in range(world_size if whole else 0):
            yield [batch for step in whole for batch in step[rank::world_size]]
        whole.clear()

    for _, group in itertools.groupby(micro_batches, key=lambda batch: batch.step):
        step = list(group)
        last = step[-1]
        if last.position == spec.micro_batches - 1:
            step += [
                replace(last, position=position, window=-1, slots=())
                for position in range(spec.micro_batches, share * world_size)
            ]
        if len(step) < share * world_size:
            yield from rows()
            yield from ([batch] for batch in step)
            continue
        if whole and sum(map(_pixels, [*whole, step])) > row_bytes * world_size:
            yield from rows()
        whole.append(step)
    yield from rows()


def _pixels(step: Sequence[MicroBatch]) -> int:
    """Bytes of the images of micro-batches."""
    sizes = (slot.augmentation.output_size for batch in step for slot in batch.slots)
    return sum(3 * height * width for height, width in sizes)


class _ThrottleScheduler(ExecutionCallback):
    """A pause in Ray Data's scheduling loop.

    While the workers are slower than the data tasks, as they should be, output is always ready and held back; the
    loop of Ray 2.60 then spins without a pause and takes 0.4 of a core from the workers.
    """

    def on_execution_step(self, executor: Any) -> None:  # noqa: ARG002
        """Sleep 10 ms; one step deals out all rows that are ready."""
        time.sleep(0.01)


class _Windows(Datasource):
    """One read task that walks the plan. An ordinary read would put every task of the job in the store first."""

    def __init__(self, stream: Stream, first_step: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stream = stream
        self.first_step = first_step

    def estimate_inmemory_data_size(self) -> None:
        """Unknown, and not needed: the parallelism is fixed."""
        return

    def get_read_tasks(self, *args: Any, **kwargs: Any) -> list[ReadTask]:  # noqa: ARG002
        """The one task."""
        stream, first_step = self.stream, self.first_step
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(lambda: list_windows(stream, first_step), metadata)]


def list_windows(stream: Stream, first_step: int) -> Iterator[pa.Table]:
    """The windows of the plan from a step on, one small table each."""
    for task in stream.plan.tasks(first_step, stream.last_step, stream.source.sizes):
        yield pa.table(
            {
                "epoch": [task.epoch],
                "window": [task.window],
                "first": [task.first],
                "skip": [task.skip],
                "trailing": [task.trailing],
                "shapes": [[list(shape) for shape in task.shapes]],
            }
        )


def build_micro_batches(
    table: pa.Table, stream: Stream, world_size: int, row_bytes: int = ROW_BYTES
) -> Iterator[pa.Table]:
    """The micro-batches of the window that `table`'s one row names, in rows as `assign_to_ranks` makes them."""
    named = table.to_pylist()[0]
    task = WindowTask(**{**named, "shapes": tuple(map(tuple, named["shapes"]))})
    plan, labels = stream.plan, stream.source.labels
    records = stream.source.records(plan.windows[task.window], [*RECORD_COLUMNS, *MASK_COLUMNS[stream.masks]])

    def filled(batch: MicroBatch) -> tuple[MicroBatch, list[Example]]:
        rows = (records.slice(slot.row, 1).to_pylist()[0] for slot in batch.slots)
        return batch, [
            _example(row, slot, labels, stream.masks) for row, slot in zip(rows, batch.slots, strict=True)
        ]

    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    for row in assign_to_ranks(plan.run(task, to_sizes(records)), plan.spec, world_size, row_bytes):
        yield pack([filled(batch) for batch in row], node, masks=stream.masks in ("instance", "panoptic"))


def _example(record: dict[str, Any], slot: Slot, labels: dict[int, int], kind: MaskKind = "none") -> Example:
    nothing = np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.int64)
    if not is_trained(record["fault"]):  # ingest found and reported it
        return Example(slot.image_id, None, *nothing)
    try:
        image = decode_record(record)
    except ImageError as error:
        return Example(slot.image_id, None, *nothing, skipped=str(error))
    if kind == "none":
        boxes_xyxy, class_labels = training_targets(record, labels)
        pixels, boxes, kept = apply(image, boxes_xyxy, slot.augmentation)
        return Example(slot.image_id, pixels, boxes, class_labels[kept])
    boxes_xyxy, class_labels, masks = mask_targets(record, labels, kind)
    pixels, boxes, kept = apply(image, boxes_xyxy, slot.augmentation)
    if kind == "panoptic-boxes":
        return Example(slot.image_id, pixels, boxes, class_labels[kept])
    augmented = apply_masks(torch.from_numpy(masks[kept]), slot.augmentation).numpy()
    return Example(slot.image_id, pixels, boxes, class_labels[kept], masks=augmented)
