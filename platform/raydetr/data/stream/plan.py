"""The plan: which record is used when, and how it is augmented, as a pure function of (data set, seed, epoch).

Nothing in this module depends on Ray, workers or pixels. The order of an epoch has four levels:

- A **window** is a few consecutive row groups of one shard: what one task reads, once per epoch. Ingest wrote
  the records in random order, so a window is a random sample of the data set.
- An epoch visits the shards in an order permuted by (seed, epoch), in bundles of 64, and the windows of a bundle in
  an order permuted by (seed, epoch, bundle). No list of all windows exists: a million shards cost a few numbers each.
- The records of a window, permuted by (seed, epoch, window), are cut into **micro-batches** of B slots. The last
  micro-batch of a window may have empty slots, which have weight 0.
- A **step** is M consecutive micro-batches, possibly of several windows. The last step of an epoch is filled up with
  empty micro-batches. No record is dropped or borrowed from the next epoch, and the number of steps follows from the
  manifest.

So step n holds the same records, with the same augmentation and padded shape, for any number of workers: worker r of
W ≤ M gets the micro-batches r, r + W, … of each step (`ray_stream.assign_to_ranks`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from detr.image_processing.augment import RANDOM_NUMBERS, Augmentation, Draws, draw
from detr.image_processing.augment_spec import AugmentSpec
from raydetr.data.stream.keyed_random import generator, uniforms
from raydetr.data.stream.layout import Int64Array, Layout, Sizes, Window, Windows
from raydetr.errors import ConfigError

SHARDS_MIXED = 64
"""Shards whose windows are permuted together."""


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """The settings that determine the order, together with the data set.

    seed: seed of every random choice.
    micro_batch_size: B, slots per micro-batch.
    micro_batches: M, micro-batches per step; the global batch is B · M images.
    augmentation: distribution from which each use of a record draws its augmentation.
    window_row_groups: row groups per window. A larger window shuffles better and takes more memory.
    size_multiple: padded heights and widths are multiples of this, so that few shapes occur.
    group_sizes: put images of similar size of a window into the same step, to reduce padding.
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
    """One use of a record: its row in the window, its image id and its augmentation."""

    row: int
    image_id: int
    augmentation: Augmentation


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of the plan.

    step, position: number `position` (0 … M − 1) of step `step`; steps are counted over all epochs.
    epoch: epoch of the step.
    window: index of its window; −1 for an empty micro-batch that fills up the last step of an epoch.
    slots: at most B; missing slots have weight 0.
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
    """The work of one data task: the micro-batches of one window, and the empty ones that follow it.

    epoch, window: the epoch, and the index of the window.
    first: number of the window's first micro-batch within the epoch.
    skip: number of micro-batches at the start that were trained on before a resume.
    trailing: number of empty micro-batches to append, which fill up the last step of the epoch.
    shapes: padded (height, width) of each micro-batch from `skip` on, including the trailing ones.
    """

    epoch: int
    window: int
    first: int
    skip: int
    trailing: int
    shapes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Visit:
    """A window in the order of an epoch.

    window: index of the window.
    first: number of its first micro-batch within the epoch.
    count: number of its micro-batches.
    """

    window: int
    first: int
    count: int


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of a training run.

    repeats: average number of uses of each record in an epoch, float64 [records], at least 1, in storage order. In a
        given epoch the number is one of the two nearest integers. None: each record is used exactly once.
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
        """Steps per epoch: the same for all epochs, a function of the layout, the repeats, B, M and the window size."""
        return -(-int(self._micro_batches_per_shard.sum()) // self.spec.micro_batches)

    def visits(self, epoch: int, start: int = 0) -> Iterator[Visit]:
        """Iterate over the windows of an epoch in order, starting with the one that holds micro-batch `start`."""
        shards = generator(self.spec.seed, "shards", epoch, 0).permutation(len(self.layout.shard_sizes))
        ends = np.cumsum(self._micro_batches_per_shard[shards])
        # Windows change places only within a bundle of shards, so a resume can skip whole bundles by their counts.
        first_bundle = int(np.searchsorted(ends, start, side="right")) // SHARDS_MIXED * SHARDS_MIXED
        for bundle in range(first_bundle, len(shards), SHARDS_MIXED):
            windows = self.windows.of_shards(shards[bundle : bundle + SHARDS_MIXED])
            order = generator(self.spec.seed, "windows", epoch, bundle).permutation(windows)
            counts = self._count_micro_batches(order)
            firsts = np.cumsum(counts) - counts + (int(ends[bundle - 1]) if bundle else 0)
            for window, first, count in zip(order.tolist(), firsts.tolist(), counts.tolist(), strict=True):
                if first + count > start:
                    yield Visit(window, first, count)

    def explain(self, step: int, read: Callable[[Window], Sizes]) -> list[MicroBatch]:
        """Return the micro-batches of a step: its images, how each is augmented, and the shape they are padded to.

        Args:
            step: number of the step, counted over all epochs.
            read: returns ids and sizes of a window's records.
        """
        return [
            batch
            for task in self.tasks(step, step + 1, read)
            for batch in self.run(task, read(self.windows[task.window]))
        ]

    def tasks(self, first_step: int, last_step: int, read: Callable[[Window], Sizes]) -> Iterator[WindowTask]:
        """Iterate over the tasks that yield steps `first_step` to `last_step` − 1, in order, across epochs.

        Args:
            first_step: first step, counted over all epochs.
            last_step: one past the last step.
            read: returns ids and sizes of a window's records; called for windows in the order of use.
        """
        per_step = self.spec.micro_batches
        total = int(self._micro_batches_per_shard.sum())
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
        """Return the micro-batches of a task without the skipped ones, each with its slots and padded shape."""
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

    def count_slots(self, windows: Int64Array) -> Int64Array:
        """Return the number of slots that the records of each window fill in an epoch."""
        return (
            self.windows.sizes(windows) if self._slots_per_window is None else self._slots_per_window[windows]
        )

    @cached_property
    def _slots_per_window(self) -> Int64Array | None:
        """Slots of each window in any epoch: its repeat factors summed and rounded up; None without repeats."""
        if self.repeats is None:
            return None
        # Rounded per window and not per epoch. So every window fills the same number of slots in all epochs, only the
        # records that get the extra uses change, and the number of steps is a constant of the plan. 1e-6 absorbs the
        # float error of the sum, which could otherwise push a whole number up to the next one.
        sums = [self.repeats[self.windows.records(window)].sum() for window in range(len(self.windows))]
        return np.ceil(np.array(sums) - 1e-6).astype(np.int64)

    def _count_micro_batches(self, windows: Int64Array) -> Int64Array:
        """Return the number of micro-batches of each window. A micro-batch never spans two windows."""
        return -(-self.count_slots(windows) // self.spec.micro_batch_size)

    @cached_property
    def _micro_batches_per_shard(self) -> Int64Array:
        """Number of micro-batches of each shard, int64 [shards]."""
        first, batch = self.windows.first, self.spec.micro_batch_size
        if self._slots_per_window is not None:
            sums = np.concatenate([[0], np.cumsum(self._count_micro_batches(np.arange(len(self.windows))))])
            return sums[first[1:]] - sums[first[:-1]]
        # Without repeats no pass over the windows is needed: all windows of a shard but the last are full.
        full = self.windows.full_size
        per_shard = first[1:] - first[:-1]
        last = np.asarray(self.layout.shard_sizes) - (per_shard - 1) * full
        return np.where(per_shard > 0, (per_shard - 1) * -(-full // batch) - (-last // batch), 0)


@dataclass(frozen=True, eq=False)
class _Arranged:
    """A window in an epoch: the uses of its records, and how micro-batches divide them.

    rows: int64 [uses], row in the window of each use.
    draws: augmentation of each use.
    batches: indices of the uses in each micro-batch.
    """

    rows: Int64Array
    draws: Draws
    batches: list[Int64Array]

    def slots(self, batch: int, sizes: Sizes) -> tuple[Slot, ...]:
        """Return the slots of a micro-batch."""
        uses = self.batches[batch].tolist()
        return tuple(
            Slot(int(self.rows[use]), int(sizes.image_ids[self.rows[use]]), self.draws[use]) for use in uses
        )

    def shapes(self) -> Int64Array:
        """Return the maximum height and the maximum width in each micro-batch, int64 [micro-batches, 2]."""
        return np.array([self.draws.output_sizes[uses].max(axis=0) for uses in self.batches])


def _arrange(plan: Plan, epoch: int, window: int, first: int, sizes: Sizes) -> _Arranged:
    """Divide the uses of a window's records into micro-batches, the first of which is number `first` in the epoch."""
    spec = plan.spec
    random = generator(spec.seed, "rows", epoch, window)
    rows = np.arange(len(sizes.image_ids))
    repetitions = np.zeros_like(rows)
    if plan.repeats is not None:
        total = int(plan.count_slots(np.array([window]))[0])
        counts = _round_repeats(plan.repeats[plan.windows.records(window)], total, random.random())
        # Number the uses of each record 0, 1, …, so that each gets its own augmentation.
        repetitions = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = np.repeat(rows, counts)
    # Keyed by the image id, so that the augmentation of an image does not depend on its place in the order.
    numbers = uniforms(spec.seed, "augment", epoch, sizes.image_ids[rows], repetitions, RANDOM_NUMBERS)
    draws = draw(numbers, sizes.heights[rows], sizes.widths[rows], spec.augmentation)
    order = random.permutation(len(rows))
    if not spec.group_sizes:
        return _Arranged(rows, draws, _cut(order, spec.micro_batch_size))
    # Group by size: sort landscape before portrait and each by area, then cut, so that neighbors have similar sizes.
    heights, widths = draws.output_sizes[order].T
    order = order[np.lexsort((heights * widths, heights > widths))]
    batches = _cut(order, spec.micro_batch_size)
    # Step arrangement. Micro-batches are numbered through the epoch, and each M of them are a step. The numbers of this
    # window start at `first`, so its micro-batches are divided into:
    #
    #     [ head ][ M ][ M ] … [ M ][ tail ]
    #
    # The head (-first mod M micro-batches) completes a step that an earlier window started, and the tail starts a step
    # that later windows complete. Between them are `whole` steps that lie entirely in this window. These are shuffled
    # as units: the images of a step stay similar in size, but the steps of a window do not all go from small landscape
    # to large portrait images. The head and the tail are only parts of steps, so they stay in place.
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


def _round_repeats(repeats: npt.NDArray[np.float64], total: int, offset: float) -> Int64Array:
    """Round repeat factors at random to integers that sum to `total`: each to one of its two neighboring integers.

    Systematic sampling (Madow 1949): factor r_i becomes floor(r_i), plus 1 with a probability p_i near its fraction.

    Args:
        repeats: float64 [records], at least 1.
        total: sum of `repeats`, rounded up.
        offset: uniform random number in [0, 1); the only source of randomness.

    Returns:
        int64 [records].
    """
    whole = np.floor(repeats + 1e-9)
    chances = np.clip(repeats - whole, 0, 1)
    # p_i starts as the fraction of r_i. Because `total` is rounded up, the fractions sum to up to 1 less than `wanted`,
    # the number of extra uses. Raise them in proportion until the sums agree. A p_i that would exceed 1 is capped, and
    # the next pass raises the others further. Each pass reaches the sum or caps one more, so the loop terminates.
    wanted = total - whole.sum()
    while abs(chances.sum() - wanted) > 1e-9:
        open_ = chances < 1
        factor = (wanted - np.count_nonzero(~open_)) / chances[open_].sum()
        chances[open_] = np.minimum(chances[open_] * factor, 1)
    # With c_i = p_1 + … + p_i, record i gets floor(c_i + u) - floor(c_(i-1) + u) extra uses: 0 or 1, and 1 with
    # probability p_i over the offset u. The sum telescopes to `wanted` for every u. 1e-9 absorbs the float error of
    # the cumulative sum, and 0.999999 keeps u + 1e-9 below 1, where floor(u) would no longer be 0.
    ends = np.cumsum(chances)
    return (whole + np.diff(np.floor(ends + offset * 0.999999 + 1e-9), prepend=0)).astype(np.int64)


class _StepShapes:
    """Compute the padded shapes of an epoch's steps in order. Scans each window once and does not retain it."""

    def __init__(self, plan: Plan, epoch: int, start: int, read: Callable[[Window], Sizes]) -> None:
        self.plan, self.epoch, self.read = plan, epoch, read
        self.known: dict[int, tuple[int, int]] = {}
        self.visits = plan.visits(epoch, start)
        self.scanned = start

    def __call__(self, step: int) -> tuple[int, int]:
        """Return the padded (height, width) of step number `step` within the epoch."""
        # A step can span several windows: scan ahead until all of its micro-batches are known.
        while self.scanned < (step + 1) * self.plan.spec.micro_batches:
            visit = next(self.visits, None)
            if visit is None:
                break
            self._scan(visit)
        if len(self.known) > 2 * self.plan.spec.micro_batches:
            self.known = {number: shape for number, shape in self.known.items() if number >= step}
        multiple = self.plan.spec.size_multiple
        height, width = self.known[step]
        return -(-height // multiple) * multiple, -(-width // multiple) * multiple

    def _scan(self, visit: Visit) -> None:
        sizes = self.read(self.plan.windows[visit.window])
        arranged = _arrange(self.plan, self.epoch, visit.window, visit.first, sizes)
        for number, shape in enumerate(arranged.shapes().tolist(), visit.first):
            step = number // self.plan.spec.micro_batches
            height, width = self.known.get(step, (0, 0))
            self.known[step] = (max(height, shape[0]), max(width, shape[1]))
        self.scanned = visit.first + visit.count
