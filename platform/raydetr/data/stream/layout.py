"""Locate records in shards, row groups and the windows that tasks read, by index arithmetic instead of lists."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Layout:
    """The number of records in each shard, int64 [shards], and in a full row group."""

    shard_sizes: Int64Array
    row_group_size: int


@dataclass(frozen=True)
class Window:
    """Consecutive row groups of one shard.

    shard: index of the shard.
    row_groups: index of the first row group, and one past the last.
    size: number of records in the window.
    """

    shard: int
    row_groups: tuple[int, int]
    size: int


@dataclass(frozen=True)
class Sizes:
    """Ids and image sizes of the records of a window, in storage order."""

    image_ids: Int64Array
    heights: Int64Array
    widths: Int64Array


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a data set, numbered in storage order. Needs memory for a few numbers per shard.

    row_groups: row groups per window; the last window of a shard may have fewer.
    """

    layout: Layout
    row_groups: int

    @property
    def full_size(self) -> int:
        """Number of records in a full window."""
        return self.row_groups * self.layout.row_group_size

    @cached_property
    def first(self) -> Int64Array:
        """Index of the first window of each shard, int64 [shards + 1]; the last entry is the number of windows."""
        return _offsets(-(-np.asarray(self.layout.shard_sizes, dtype=np.int64) // self.full_size))

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, index: int) -> Window:
        shard = int(np.searchsorted(self.first, index, side="right")) - 1
        start = (index - int(self.first[shard])) * self.row_groups
        groups = -(-int(self.layout.shard_sizes[shard]) // self.layout.row_group_size)
        size = int(self.sizes(np.array([index]))[0])
        return Window(shard, (start, min(start + self.row_groups, groups)), size)

    def of_shards(self, shards: Int64Array) -> Int64Array:
        """Return the indices of the windows of these shards, shard after shard."""
        counts = self.first[shards + 1] - self.first[shards]
        starts = np.repeat(self.first[shards] - _offsets(counts)[:-1], counts)
        return starts + np.arange(counts.sum())

    def sizes(self, windows: Int64Array) -> Int64Array:
        """Return the number of records in each of these windows."""
        shards = np.searchsorted(self.first, windows, side="right") - 1
        before = (windows - self.first[shards]) * self.full_size
        return np.minimum(np.asarray(self.layout.shard_sizes)[shards] - before, self.full_size)

    def records(self, window: int) -> slice:
        """Return the records of a window as a slice of the data set in storage order."""
        shard = int(np.searchsorted(self.first, window, side="right")) - 1
        start = int(self._shard_starts[shard]) + (window - int(self.first[shard])) * self.full_size
        return slice(start, start + int(self.sizes(np.array([window]))[0]))

    @cached_property
    def _shard_starts(self) -> Int64Array:
        return _offsets(np.asarray(self.layout.shard_sizes, dtype=np.int64))


def _offsets(counts: Int64Array) -> Int64Array:
    """Return the cumulative sums with a leading 0: one entry more than `counts`."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
