"""Where records lie: shards, row groups, and the windows that tasks read. Index arithmetic without any list of them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Layout:
    """The shape of a data set: records of each shard, int64 [shards], and of a full row group."""

    shard_sizes: Int64Array
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


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a data set, numbered in storage order; memory is that of a few numbers a shard.

    row_groups: of a window; the last one of a shard may have less.
    """

    layout: Layout
    row_groups: int

    @property
    def full_size(self) -> int:
        """Records of a full window."""
        return self.row_groups * self.layout.row_group_size

    @cached_property
    def first(self) -> Int64Array:
        """Index of the first window of each shard, int64 [shards + 1]; the last entry is the number of windows."""
        return _from_zero(-(-np.asarray(self.layout.shard_sizes, dtype=np.int64) // self.full_size))

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, index: int) -> Window:
        shard = int(np.searchsorted(self.first, index, side="right")) - 1
        start = (index - int(self.first[shard])) * self.row_groups
        groups = -(-int(self.layout.shard_sizes[shard]) // self.layout.row_group_size)
        size = int(self.sizes(np.array([index]))[0])
        return Window(shard, (start, min(start + self.row_groups, groups)), size)

    def of_shards(self, shards: Int64Array) -> Int64Array:
        """The windows of some shards, shard after shard."""
        counts = self.first[shards + 1] - self.first[shards]
        starts = np.repeat(self.first[shards] - _from_zero(counts)[:-1], counts)
        return starts + np.arange(counts.sum())

    def sizes(self, windows: Int64Array) -> Int64Array:
        """Records of windows."""
        shards = np.searchsorted(self.first, windows, side="right") - 1
        before = (windows - self.first[shards]) * self.full_size
        return np.minimum(np.asarray(self.layout.shard_sizes)[shards] - before, self.full_size)

    def records(self, window: int) -> slice:
        """Which records, numbered over the data set in storage order, a window holds."""
        shard = int(np.searchsorted(self.first, window, side="right")) - 1
        start = int(self._shard_starts[shard]) + (window - int(self.first[shard])) * self.full_size
        return slice(start, start + int(self.sizes(np.array([window]))[0]))

    @cached_property
    def _shard_starts(self) -> Int64Array:
        return _from_zero(np.asarray(self.layout.shard_sizes, dtype=np.int64))


def _from_zero(counts: Int64Array) -> Int64Array:
    """Running sums, from 0 on: one entry more than there are counts."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
