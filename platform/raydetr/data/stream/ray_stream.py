"""Run the plan as one Ray Data execution for the whole job, from windows to micro-batches for W workers.

A generator task iterates over the plan and yields one small row per window. Map tasks read, decode and augment, and
yield rows of a few micro-batches (see `assign_to_ranks`). `preserve_order` keeps the rows in the plan's order and makes
Ray Train's split assign them round-robin: row i goes to rank i mod W. Since micro-batch p of a step belongs to rank
p mod W whatever W is, every step has the same records for any number of workers, and all ranks step together.

Ray Train calls `PlanDataConfig.configure` whenever a worker group starts, so a restart with a different number of
workers continues the stream from the last committed step.
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
from raydetr.data.fault_codes import is_trained
from raydetr.data.pixels import decode_record
from raydetr.data.schema import Record
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
    """The input of a training job.

    source: the records.
    plan: their order.
    last_step: one past the last step of the job.
    first_step: returns the step to start from (`checkpoint.last_committed_step`); called whenever workers start.
    masks: which masks the labels have, see `mask_targets`.
    """

    source: Source
    plan: Plan
    last_step: int
    first_step: Callable[[], int]
    masks: MaskKind = "none"


def build_plan(manifest: Manifest, spec: PlanSpec, repeat_threshold: float = 0.0) -> Plan:
    """Create the plan of a data set.

    Args:
        manifest: manifest of its shards.
        spec: settings that determine the order.
        repeat_threshold: threshold of `balance.repeat_factors`. 0: use every record exactly once per epoch.
    """
    repeats = repeat_factors(manifest, repeat_threshold) if repeat_threshold else None
    return Plan(layout(manifest), spec, repeats)


def dataset(stream: Stream, world_size: int, first_step: int) -> Dataset:
    """Create the lazy Ray Dataset of steps `first_step` to `last_step` − 1 for `world_size` workers.

    Raises:
        ConfigError: there are more workers than micro-batches in a step.
    """
    if world_size > stream.plan.spec.micro_batches:
        raise ConfigError(
            f"--workers is {world_size}, but a step has only {stream.plan.spec.micro_batches} micro-batches: "
            "raise --micro-batches or lower --workers."
        )
    context = DataContext.get_current().copy()
    # One row per block, so that rows leave a task as soon as they are built and are assigned to ranks one by one.
    context.target_max_block_size = 1
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # The detectors would warn about the generator task, which runs for the whole job and is large because it imports
    # torch. Both are intended.
    context.issue_detectors_config.detectors = []
    context.custom_execution_callback_classes = [_ThrottleScheduler]
    context.set_config(
        ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, WindowBackpressure]
    )
    previous = DataContext.get_current()
    DataContext._set_current(context)
    try:
        in_flight = fit_cluster(stream.plan.spec, world_size)
        # num_cpus=0: this task runs as long as the job. With a fraction of a CPU it would keep map tasks off that CPU.
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
    """Split a `Stream`, passed as `datasets={"train": stream}`, among the workers of Ray Train."""

    def configure(  # type: ignore[override]  # a Stream instead of a Dataset
        self,
        datasets: dict[str, Stream],
        world_size: int,
        *args: Any,  # noqa: ARG002  # handles and nodes of the workers: the order must not depend on them
        **kwargs: Any,  # noqa: ARG002
    ) -> list[dict[str, DataIterator]]:
        """Build the execution for this number of workers, starting after the last committed step.

        Raises:
            ClusterError: the workers reserve all CPUs, so that the stream would wait forever.
        """
        cpus = ray.cluster_resources().get("CPU", 0)
        if cpus <= world_size:
            raise ClusterError(
                f"The {world_size} training workers reserve all {cpus:g} CPUs of the cluster and leave none for the "
                "data stream: add a node with CPUs, or lower --workers."
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
    """Iterate over this worker's micro-batches, one list per step.

    Args:
        shard: this worker's split, from `ray.train.get_dataset_shard`.
        micro_batch_size: B.
        per_step: number of this worker's micro-batches in each step, ⌈M / W⌉.
        prefetch: number of rows to prefetch.

    Raises:
        DataError: the rows do not contain one complete step after the other.
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
                    f"The stream is out of order: it has a micro-batch of step {batch.step} within step "
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
    """Group micro-batches into rows such that row i belongs to rank i mod W, and each rank gets its own in order.

    With W workers a step has ⌈M / W⌉ · W micro-batches, of which those beyond M are empty. Micro-batch p of a step
    belongs to rank p mod W. Steps that are complete in `micro_batches` are packed several at a time, one row per rank.
    Each micro-batch of a partial step gets a row of its own.

    Args:
        micro_batches: consecutive micro-batches of the plan, such as those of a window.
        spec: spec of the plan.
        world_size: W.
        row_bytes: approximate bytes of pixels in a row.
    """
    # Row i goes to rank i mod W, counted over the whole run and over all tasks. Each task sees only its own window, so
    # the assignment relies on an invariant: at every step boundary the number of rows so far is a multiple of W.
    # - Complete steps, however many are packed together, are W rows: row r has the positions r, r + W, … of each step.
    # - The parts of a step that spans windows come from several tasks. With one row per micro-batch they add up to
    #   ⌈M / W⌉ · W rows, and the row of position p is number p after the boundary, so it goes to rank p mod W too.
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
    """Return the bytes of pixels in micro-batches."""
    sizes = (slot.augmentation.output_size for batch in step for slot in batch.slots)
    return sum(3 * height * width for height, width in sizes)


class _ThrottleScheduler(ExecutionCallback):
    """Throttle Ray Data's scheduling loop.

    As long as the workers are slower than the data tasks, which is the normal case, output is always ready and held
    back by backpressure. The loop of Ray 2.60 then spins without a pause and takes 0.4 of a core from the workers.
    """

    def on_execution_step(self, executor: Any) -> None:  # noqa: ARG002
        """Sleep for 10 ms. One iteration of the loop hands out all rows that are ready."""
        time.sleep(0.01)


class _Windows(Datasource):
    """A datasource with one read task that iterates over the plan.

    An ordinary read would put all tasks of the job into the object store first.
    """

    def __init__(self, stream: Stream, first_step: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stream = stream
        self.first_step = first_step

    def estimate_inmemory_data_size(self) -> None:
        """Return None: the size is unknown, and is not needed since the parallelism is fixed."""
        return

    def get_read_tasks(self, *args: Any, **kwargs: Any) -> list[ReadTask]:  # noqa: ARG002
        """Return the only task."""
        stream, first_step = self.stream, self.first_step
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(lambda: list_windows(stream, first_step), metadata)]


def list_windows(stream: Stream, first_step: int) -> Iterator[pa.Table]:
    """Iterate over the windows of the plan from `first_step` on, as one small table each."""
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
    """Build the micro-batches of the window in the only row of `table`, grouped into rows by `assign_to_ranks`."""
    fields = table.to_pylist()[0]
    task = WindowTask(**{**fields, "shapes": tuple(map(tuple, fields["shapes"]))})
    plan, labels = stream.plan, stream.source.labels
    records = stream.source.records(plan.windows[task.window], [*RECORD_COLUMNS, *MASK_COLUMNS[stream.masks]])

    def fill_slots(batch: MicroBatch) -> tuple[MicroBatch, list[Example]]:
        rows = (records.slice(slot.row, 1).to_pylist()[0] for slot in batch.slots)
        return batch, [
            _example(row, slot, labels, stream.masks) for row, slot in zip(rows, batch.slots, strict=True)
        ]

    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    for row in assign_to_ranks(plan.run(task, to_sizes(records)), plan.spec, world_size, row_bytes):
        yield pack([fill_slots(batch) for batch in row], node, masks=stream.masks in ("instance", "panoptic"))


def _example(record: Record, slot: Slot, labels: dict[int, int], kind: MaskKind = "none") -> Example:
    no_targets = np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.int64)
    if not is_trained(record["fault"]):  # ingest has reported this fault, so it is not counted as skipped
        return Example(slot.image_id, None, *no_targets)
    try:
        image = decode_record(record)
    except ImageError as error:
        return Example(slot.image_id, None, *no_targets, skipped=str(error))
    if kind == "none":
        boxes_xyxy, class_labels = training_targets(record, labels)
        pixels, boxes, remaining = apply(image, boxes_xyxy, slot.augmentation)
        return Example(slot.image_id, pixels, boxes, class_labels[remaining])
    boxes_xyxy, class_labels, masks = mask_targets(record, labels, kind)
    pixels, boxes, remaining = apply(image, boxes_xyxy, slot.augmentation)
    if kind == "panoptic-boxes":
        return Example(slot.image_id, pixels, boxes, class_labels[remaining])
    augmented = apply_masks(torch.from_numpy(masks[remaining]), slot.augmentation).numpy()
    return Example(slot.image_id, pixels, boxes, class_labels[remaining], masks=augmented)
