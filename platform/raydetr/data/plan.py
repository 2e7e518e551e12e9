"""Which record is used when, and how it is augmented: a pure function of (data set, seed, epoch).

Nothing here knows Ray, workers or pixels. The order of an epoch has three levels:

- A **window** is a few consecutive row groups of one shard: what one task reads, once per epoch. Ingest wrote
  the records in random order, so a window is a random sample of the data set.
- An epoch visits all windows in an order permuted by (seed, epoch), the records of each in an order permuted by
  (seed, epoch, window), and cuts them into **micro-batches** of B slots. The last one of a window may have
  empty slots, which weigh nothing.
- A **step** is M consecutive micro-batches. The last step of an epoch is filled up with empty micro-batches: no
  record is dropped, none is borrowed from the next epoch, and the number of steps follows from the manifest.

So step n holds the same records, augmented alike and padded to the same shape, whoever computes it: worker r of
any W ≤ M takes the micro-batches r, r + W, … of each step (`data/stream.py` deals them out).
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from detr.augment import Augmentation, AugmentSpec, draw
from raydetr.errors import ConfigError

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """What, besides the data set, decides the order.

    seed: of every random choice.
    micro_batch_size: B, slots of a micro-batch.
    micro_batches: M, micro-batches of a step; the global batch is B · M images.
    augmentation: what each use of a record draws from.
    window_row_groups: row groups of a window; larger shuffles better and takes more memory.
    size_multiple: padded heights and widths are multiples of it, so that few shapes occur.
    """

    seed: int
    micro_batch_size: int
    micro_batches: int
    augmentation: AugmentSpec
    window_row_groups: int = 4
    size_multiple: int = 32

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "micro_batches", "window_row_groups", "size_multiple"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1."
                )


@dataclass(frozen=True)
class Layout:
    """The shape of the data set that the plan needs: records per shard and per row group."""

    shard_sizes: tuple[int, ...]
    row_group_size: int


@dataclass(frozen=True)
class Window:
    """Consecutive row groups of one shard.

    shard: index of the shard.
    row_groups: first and one past the last row group.
    size: records in them.
    """

    shard: int
    row_groups: tuple[int, int]
    size: int


@dataclass(frozen=True)
class Sizes:
    """Ids and image sizes of the records of a window, in the order they are stored."""

    image_ids: Int64Array
    heights: Int64Array
    widths: Int64Array


@dataclass(frozen=True)
class Slot:
    """One use of a record: its row in the window, its id and how it is augmented."""

    row: int
    image_id: int
    augmentation: Augmentation


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of the plan.

    step, position: it is number `position` (0 … M − 1) of step `step`, counted over all epochs.
    epoch: it belongs to.
    window: index of its window; −1 for an empty one that fills up the last step of an epoch.
    slots: at most B; the missing ones weigh nothing.
    shape: (height, width) that its images are padded to, the same for all micro-batches of a step.
    """

    step: int
    position: int
    epoch: int
    window: int
    slots: tuple[Slot, ...]
    shape: tuple[int, int]


@dataclass(frozen=True)
class WindowTask:
    """What one data task does: the micro-batches of one window, with the empty ones that follow it.

    epoch, window: which window of which epoch.
    first: number, within the epoch, of the window's first micro-batch.
    skip: micro-batches at the start that are already done (the task after a resume).
    trailing: empty micro-batches to add after the window's own: the end of an epoch.
    shapes: padded (height, width) of each micro-batch from `skip` on, trailing ones included.
    """

    epoch: int
    window: int
    first: int
    skip: int
    trailing: int
    shapes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plan:
    """The order of a training run. Lazy: an epoch's windows are permuted when it is reached."""

    layout: Layout
    spec: PlanSpec

    def __post_init__(self) -> None:
        if not sum(self.layout.shard_sizes):
            raise ConfigError("The data set has no records: there is nothing to train on.")

    @property
    def num_windows(self) -> int:
        """Windows of an epoch."""
        return len(self._counts)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch: a closed function of the layout, B, M and the window size."""
        return -(-int(self._counts.sum()) // self.spec.micro_batches)

    def window(self, index: int) -> Window:
        """Window number `index`, in storage order."""
        shard, start, stop, size = (int(column[index]) for column in self._table)
        return Window(shard, (start, stop), size)

    def order(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The windows of an epoch in order, and the number within the epoch of each one's first micro-batch.

        The second array has one more entry: the number of micro-batches of the epoch.
        """
        order = _generator(self.spec.seed, "windows", epoch, 0).permutation(self.num_windows)
        return order, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self._counts[order])])

    def micro_batches(self, epoch: int, window: int, first: int, sizes: Sizes) -> list[MicroBatch]:
        """The micro-batches of a window, with `shape` of each micro-batch alone (a step takes the largest).

        Args:
            epoch: which epoch.
            window: index of the window.
            first: number, within the epoch, of its first micro-batch.
            sizes: ids and image sizes of its records, as stored.
        """
        spec = self.spec
        rows = _generator(spec.seed, "rows", epoch, window).permutation(len(sizes.image_ids))
        slots = [self.slot(epoch, int(row), sizes) for row in rows]
        batches: list[MicroBatch] = []
        for start in range(0, len(slots), spec.micro_batch_size):
            step, position = divmod(first + len(batches), spec.micro_batches)
            chosen = tuple(slots[start : start + spec.micro_batch_size])
            batches.append(
                MicroBatch(
                    step=epoch * self.steps_per_epoch + step,
                    position=position,
                    epoch=epoch,
                    window=window,
                    slots=chosen,
                    shape=_padded(chosen, spec.size_multiple),
                )
            )
        return batches

    def slot(self, epoch: int, row: int, sizes: Sizes) -> Slot:
        """The use of a record in an epoch: its augmentation depends on (seed, epoch, image id) and its size."""
        image_id = int(sizes.image_ids[row])
        generator = _generator(self.spec.seed, "augment", epoch, image_id)
        height, width = int(sizes.heights[row]), int(sizes.widths[row])
        return Slot(row, image_id, draw(generator, height, width, self.spec.augmentation))

    def tasks(self, first_step: int, last_step: int, read: Callable[[Window], Sizes]) -> Iterator[WindowTask]:
        """The tasks that yield steps `first_step` to `last_step` − 1, in order, across epochs.

        Args:
            first_step: first step wanted, counted over all epochs.
            last_step: one past the last step wanted.
            read: looks up ids and sizes of a window's records; called for windows in the order of use.
        """
        per_step = self.spec.micro_batches
        step = first_step
        while step < last_step:
            epoch, within = divmod(step, self.steps_per_epoch)
            order, starts = self.order(epoch)
            shapes = _StepShapes(self, epoch, order, starts, read)
            total = int(starts[-1])
            start = within * per_step
            end = min(self.steps_per_epoch, within + last_step - step) * per_step
            position = bisect_right(starts, start) - 1 if start < total else len(order) - 1
            while position < len(order) and int(starts[position]) < end:
                first, window = int(starts[position]), int(order[position])
                own = int(self._counts[window])
                trailing = self.steps_per_epoch * per_step - total if position == len(order) - 1 else 0
                skip = max(0, start - first)
                stop = min(first + own + trailing, end)
                yield WindowTask(
                    epoch=epoch,
                    window=window,
                    first=first,
                    skip=skip,
                    trailing=trailing,
                    shapes=tuple(shapes(number // per_step) for number in range(first + skip, stop)),
                )
                position += 1
            step += self.steps_per_epoch - within

    def run(self, task: WindowTask, sizes: Sizes) -> list[MicroBatch]:
        """The micro-batches of a task, ready to be filled: those skipped left out, shapes those of their steps."""
        per_step = self.spec.micro_batches
        own = self.micro_batches(task.epoch, task.window, task.first, sizes)
        for number in range(task.first + len(own), task.first + len(own) + task.trailing):
            step, position = divmod(number, per_step)
            step += task.epoch * self.steps_per_epoch
            own.append(MicroBatch(step, position, task.epoch, -1, (), (0, 0)))
        wanted = own[task.skip : task.skip + len(task.shapes)]
        return [
            MicroBatch(each.step, each.position, each.epoch, each.window, each.slots, shape)
            for each, shape in zip(wanted, task.shapes, strict=True)
        ]

    @cached_property
    def _table(self) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
        return _tabulate(self.layout, self.spec.window_row_groups)

    @cached_property
    def _counts(self) -> Int64Array:
        """Micro-batches of each window."""
        return -(-self._table[3] // self.spec.micro_batch_size)


class _StepShapes:
    """Padded shapes of an epoch's steps; looks at each window once, in order, and forgets it."""

    def __init__(
        self, plan: Plan, epoch: int, order: Int64Array, starts: Int64Array, read: Callable[[Window], Sizes]
    ) -> None:
        self.plan, self.epoch, self.order, self.starts, self.read = plan, epoch, order, starts, read
        self.known: dict[int, tuple[int, int]] = {}
        self.next_position: int | None = None

    def __call__(self, step: int) -> tuple[int, int]:
        """(height, width) of step number `step` within the epoch."""
        per_step = self.plan.spec.micro_batches
        if self.next_position is None:
            self.next_position = bisect_right(self.starts, step * per_step) - 1
        while (
            self.next_position < len(self.order) and self.starts[self.next_position] < (step + 1) * per_step
        ):
            self._look_at(self.next_position)
            self.next_position += 1
        self.known = {number: shape for number, shape in self.known.items() if number >= step}
        return self.known[step]

    def _look_at(self, position: int) -> None:
        window, first = int(self.order[position]), int(self.starts[position])
        sizes = self.read(self.plan.window(window))
        for number, batch in enumerate(self.plan.micro_batches(self.epoch, window, first, sizes), first):
            step = number // self.plan.spec.micro_batches
            height, width = self.known.get(step, (0, 0))
            self.known[step] = (max(height, batch.shape[0]), max(width, batch.shape[1]))


def _tabulate(layout: Layout, row_groups: int) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
    """Columns shard, first row group, one past the last, size; one row per window, in storage order."""
    sizes = np.asarray(layout.shard_sizes, dtype=np.int64)
    groups = -(-sizes // layout.row_group_size)
    per_shard = -(-groups // row_groups)
    shard = np.repeat(np.arange(len(sizes)), per_shard)
    number = np.arange(len(shard)) - np.repeat(np.cumsum(per_shard) - per_shard, per_shard)
    start = number * row_groups
    stop = np.minimum(start + row_groups, groups[shard])
    size = np.minimum(stop * layout.row_group_size, sizes[shard]) - start * layout.row_group_size
    return shard, start, stop, size


def _padded(slots: tuple[Slot, ...], multiple: int) -> tuple[int, int]:
    heights, widths = zip(*(slot.augmentation.output_size for slot in slots), strict=True)
    return -(-max(heights) // multiple) * multiple, -(-max(widths) // multiple) * multiple


def _generator(seed: int, purpose: str, epoch: int, item: int) -> np.random.Generator:
    """A generator of its own for each random choice: nothing depends on the order in which they are made."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{epoch}/{item}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
