"""Which record is used when, and how it is augmented: a pure function of (data set, seed, epoch).

Nothing here knows Ray, workers or pixels. The order of an epoch has four levels:

- A **window** is a few consecutive row groups of one shard: what one task reads, once per epoch. Ingest wrote
  the records in random order, so a window is a random sample of the data set.
- An epoch visits the shards in an order permuted by (seed, epoch), 64 at a time, and the windows of these in an
  order permuted by (seed, epoch, bundle): no list of all windows exists, so a million shards cost a few numbers each.
- The records of a window, permuted by (seed, epoch, window), are cut into **micro-batches** of B slots. The last one
  may have empty slots, which weigh nothing.
- A **step** is M consecutive micro-batches. The last step of an epoch is filled up with empty micro-batches: no
  record is dropped, none is borrowed from the next epoch, and the number of steps follows from the manifest.

So step n holds the same records, augmented alike and padded to the same shape, whoever computes it: worker r of
any W ≤ M takes the micro-batches r, r + W, … of each step (`data/stream/ray_stream.py` deals them out).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from detr.image_processing.augment import RANDOM_NUMBERS, Augmentation, AugmentSpec, Draws, draw
from raydetr.data.stream.keyed_random import generator, uniforms
from raydetr.data.stream.layout import Int64Array, Layout, Sizes, Window, Windows
from raydetr.errors import ConfigError

SHARDS_MIXED = 64
"""Shards whose windows are permuted together."""


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """What, besides the data set, decides the order.

    seed: of every random choice.
    micro_batch_size: B, slots of a micro-batch.
    micro_batches: M, micro-batches of a step; the global batch is B · M images.
    augmentation: what each use of a record draws from.
    window_row_groups: row groups of a window; larger shuffles better and takes more memory.
    size_multiple: padded heights and widths are multiples of it, so that few shapes occur.
    group_sizes: put images of like size into the same step, as far as a window has them, to save padding.
    """

    seed: int
    micro_batch_size: int
    micro_batches: int
    augmentation: AugmentSpec
    window_row_groups: int = 4
    size_multiple: int = 32
    group_sizes: bool = False

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "micro_batches", "window_row_groups", "size_multiple"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1."
                )


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
class Visit:
    """A window's turn in an epoch: its index, the number within the epoch of its first micro-batch, how many it has."""

    window: int
    first: int
    count: int


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of a training run.

    repeats: float64 [records], at least 1, in storage order: how often each record is used in an epoch on average;
        None: exactly once. How often a record is used in a certain epoch is one of the two integers next to it.
    """

    layout: Layout
    spec: PlanSpec
    repeats: npt.NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if not np.sum(self.layout.shard_sizes):
            raise ConfigError("The data set has no records: there is nothing to train on.")

    @cached_property
    def windows(self) -> Windows:
        """The windows of the data set, in storage order."""
        return Windows(self.layout, self.spec.window_row_groups)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch: the same for all epochs, a function of the layout, the repeats, B, M and the window."""
        return -(-int(self._shard_counts.sum()) // self.spec.micro_batches)

    def visits(self, epoch: int, start: int = 0) -> Iterator[Visit]:
        """The windows of an epoch in order, from the one that holds micro-batch number `start` on."""
        shards = generator(self.spec.seed, "shards", epoch, 0).permutation(len(self.layout.shard_sizes))
        ends = np.cumsum(self._shard_counts[shards])
        first_shard = int(np.searchsorted(ends, start, side="right")) // SHARDS_MIXED * SHARDS_MIXED
        for begin in range(first_shard, len(shards), SHARDS_MIXED):
            windows = self.windows.of_shards(shards[begin : begin + SHARDS_MIXED])
            order = generator(self.spec.seed, "windows", epoch, begin).permutation(windows)
            counts = self._counts(order)
            firsts = np.cumsum(counts) - counts + (int(ends[begin - 1]) if begin else 0)
            for window, first, count in zip(order.tolist(), firsts.tolist(), counts.tolist(), strict=True):
                if first + count > start:
                    yield Visit(window, first, count)

    def explain(self, step: int, read: Callable[[Window], Sizes]) -> list[MicroBatch]:
        """The micro-batches of a step: which images it holds, how each is augmented, what they are padded to.

        Args:
            step: counted over all epochs.
            read: looks up ids and sizes of a window's records.
        """
        return [
            batch
            for task in self.tasks(step, step + 1, read)
            for batch in self.run(task, read(self.windows[task.window]))
        ]

    def tasks(self, first_step: int, last_step: int, read: Callable[[Window], Sizes]) -> Iterator[WindowTask]:
        """The tasks that yield steps `first_step` to `last_step` − 1, in order, across epochs.

        Args:
            first_step: first step wanted, counted over all epochs.
            last_step: one past the last step wanted.
            read: looks up ids and sizes of a window's records; called for windows in the order of use.
        """
        per_step = self.spec.micro_batches
        total = int(self._shard_counts.sum())
        step = first_step
        while step < last_step:
            epoch, within = divmod(step, self.steps_per_epoch)
            start = within * per_step
            end = min(self.steps_per_epoch, within + last_step - step) * per_step
            shapes = _StepShapes(self, epoch, start, read)
            for visit in self.visits(epoch, start):
                if visit.first >= end:
                    break
                own_end = visit.first + visit.count
                trailing = self.steps_per_epoch * per_step - total if own_end == total else 0
                skip = max(0, start - visit.first)
                stop = min(own_end + trailing, end)
                yield WindowTask(
                    epoch=epoch,
                    window=visit.window,
                    first=visit.first,
                    skip=skip,
                    trailing=trailing,
                    shapes=tuple(shapes(number // per_step) for number in range(visit.first + skip, stop)),
                )
            step += self.steps_per_epoch - within

    def run(self, task: WindowTask, sizes: Sizes) -> list[MicroBatch]:
        """The micro-batches of a task, ready to be filled: those skipped left out, shapes those of their steps."""
        arranged = _arrange(self, task.epoch, task.window, task.first, sizes)
        batches: list[MicroBatch] = []
        for number, shape in enumerate(task.shapes, task.skip):
            step, position = divmod(task.first + number, self.spec.micro_batches)
            own = number < len(arranged.batches)
            slots = arranged.slots(number, sizes) if own else ()
            batches.append(
                MicroBatch(
                    step=task.epoch * self.steps_per_epoch + step,
                    position=position,
                    epoch=task.epoch,
                    window=task.window if own else -1,
                    slots=slots,
                    shape=shape,
                )
            )
        return batches

    def slots_of(self, windows: Int64Array) -> Int64Array:
        """How many slots the records of each window fill in an epoch."""
        return self.windows.sizes(windows) if self._window_slots is None else self._window_slots[windows]

    @cached_property
    def _window_slots(self) -> Int64Array | None:
        if self.repeats is None:
            return None
        sums = [self.repeats[self.windows.records(window)].sum() for window in range(len(self.windows))]
        return np.ceil(np.array(sums) - 1e-6).astype(np.int64)

    def _counts(self, windows: Int64Array) -> Int64Array:
        """Micro-batches of windows."""
        return -(-self.slots_of(windows) // self.spec.micro_batch_size)

    @cached_property
    def _shard_counts(self) -> Int64Array:
        """Micro-batches of each shard."""
        first, batch = self.windows.first, self.spec.micro_batch_size
        if self._window_slots is not None:
            sums = np.concatenate([[0], np.cumsum(self._counts(np.arange(len(self.windows))))])
            return sums[first[1:]] - sums[first[:-1]]
        full = self.windows.full_size
        per_shard = first[1:] - first[:-1]
        last = np.asarray(self.layout.shard_sizes) - (per_shard - 1) * full
        return np.where(per_shard > 0, (per_shard - 1) * -(-full // batch) - (-last // batch), 0)


@dataclass(frozen=True, eq=False)
class _Arranged:
    """A window in an epoch: uses of its records, and which of them each micro-batch holds."""

    rows: Int64Array
    draws: Draws
    batches: list[Int64Array]

    def slots(self, batch: int, sizes: Sizes) -> tuple[Slot, ...]:
        """The slots of a micro-batch."""
        uses = self.batches[batch].tolist()
        return tuple(
            Slot(int(self.rows[use]), int(sizes.image_ids[self.rows[use]]), self.draws[use]) for use in uses
        )

    def shapes(self) -> Int64Array:
        """The largest height and the largest width of each micro-batch, int64 [micro-batches, 2]."""
        return np.array([self.draws.output_sizes[uses].max(axis=0) for uses in self.batches])


def _arrange(plan: Plan, epoch: int, window: int, first: int, sizes: Sizes) -> _Arranged:
    """The micro-batches of a window whose first one has number `first` within the epoch."""
    spec = plan.spec
    random = generator(spec.seed, "rows", epoch, window)
    rows = np.arange(len(sizes.image_ids))
    repetitions = np.zeros_like(rows)
    if plan.repeats is not None:
        total = int(plan.slots_of(np.array([window]))[0])
        counts = _whole(plan.repeats[plan.windows.records(window)], total, random.random())
        repetitions = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = np.repeat(rows, counts)
    # Keyed by the image, so that an image is augmented alike wherever the order puts it.
    numbers = uniforms(spec.seed, "augment", epoch, sizes.image_ids[rows], repetitions, RANDOM_NUMBERS)
    draws = draw(numbers, sizes.heights[rows], sizes.widths[rows], spec.augmentation)
    order = random.permutation(len(rows))
    if not spec.group_sizes:
        return _Arranged(rows, draws, _cut(order, spec.micro_batch_size))
    heights, widths = draws.output_sizes[order].T
    order = order[np.lexsort((heights * widths, heights > widths))]
    batches = _cut(order, spec.micro_batch_size)
    # Steps that are whole in this window change places; what shares a step with a neighbour stays at the ends.
    head = min(-first % spec.micro_batches, len(batches))
    whole = (len(batches) - head) // spec.micro_batches
    steps = [
        batches[start : start + spec.micro_batches]
        for start in range(head, head + whole * spec.micro_batches, spec.micro_batches)
    ]
    shuffled = [batch for index in random.permutation(whole) for batch in steps[index]]
    return _Arranged(rows, draws, batches[:head] + shuffled + batches[head + len(shuffled) :])


def _cut(order: Int64Array, size: int) -> list[Int64Array]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _whole(repeats: npt.NDArray[np.float64], total: int, offset: float) -> Int64Array:
    """Repeats rounded to integers that sum to `total`, their sum rounded up; each is one of the two next to it.

    Systematic sampling (Madow 1949) of the fractions, which are raised in proportion until they sum to a whole number.
    """
    whole = np.floor(repeats + 1e-9)
    chances = np.clip(repeats - whole, 0, 1)
    wanted = total - whole.sum()
    while abs(chances.sum() - wanted) > 1e-9:
        open_ = chances < 1
        factor = (wanted - np.count_nonzero(~open_)) / chances[open_].sum()
        chances[open_] = np.minimum(chances[open_] * factor, 1)
    ends = np.cumsum(chances)
    return (whole + np.diff(np.floor(ends + offset * 0.999999 + 1e-9), prepend=0)).astype(np.int64)


class _StepShapes:
    """Padded shapes of an epoch's steps; looks at each window once, in order, and forgets it."""

    def __init__(self, plan: Plan, epoch: int, start: int, read: Callable[[Window], Sizes]) -> None:
        self.plan, self.epoch, self.read = plan, epoch, read
        self.known: dict[int, tuple[int, int]] = {}
        self.visits = plan.visits(epoch, start)
        self.looked = start

    def __call__(self, step: int) -> tuple[int, int]:
        """(height, width) of step number `step` within the epoch."""
        while self.looked < (step + 1) * self.plan.spec.micro_batches:
            visit = next(self.visits, None)
            if visit is None:
                break
            self._look_at(visit)
        if len(self.known) > 2 * self.plan.spec.micro_batches:
            self.known = {number: shape for number, shape in self.known.items() if number >= step}
        multiple = self.plan.spec.size_multiple
        height, width = self.known[step]
        return -(-height // multiple) * multiple, -(-width // multiple) * multiple

    def _look_at(self, visit: Visit) -> None:
        sizes = self.read(self.plan.windows[visit.window])
        arranged = _arrange(self.plan, self.epoch, visit.window, visit.first, sizes)
        for number, shape in enumerate(arranged.shapes().tolist(), visit.first):
            step = number // self.plan.spec.micro_batches
            height, width = self.known.get(step, (0, 0))
            self.known[step] = (max(height, shape[0]), max(width, shape[1]))
        self.looked = visit.first + visit.count
