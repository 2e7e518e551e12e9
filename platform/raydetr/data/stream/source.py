"""Where a stream's records come from: the shards of a data set, read window by window."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute

from raydetr.data.shards import TARGET_COLUMNS, Manifest, read_rows
from raydetr.data.stream.layout import Layout, Sizes, Window

INDEX_COLUMNS = ["image_id", "height", "width"]
RECORD_COLUMNS = [*TARGET_COLUMNS, "image_id", "image", "fault"]


class Source(Protocol):
    """What a stream reads."""

    @property
    def labels(self) -> dict[int, int]:
        """Category id → contiguous label."""

    def sizes(self, window: Window) -> Sizes:
        """Ids and image sizes of a window's records, without their pixels."""

    def records(self, window: Window, columns: Sequence[str] = RECORD_COLUMNS) -> pa.Table:
        """The records of a window, with these columns."""


@dataclass(frozen=True, eq=False)
class ShardSource:
    """The shards of a data set.

    root: address of their folder.
    files: of the shards, within it.
    """

    root: str
    files: Sequence[str]
    row_group_size: int
    labels: dict[int, int]

    def sizes(self, window: Window) -> Sizes:
        """See `Source`; the index of a shard is read once."""
        index = _shard_index(self.root, self.files[window.shard])
        return to_sizes(index.slice(window.row_groups[0] * self.row_group_size, window.size))

    def records(self, window: Window, columns: Sequence[str] = RECORD_COLUMNS) -> pa.Table:
        """See `Source`."""
        return read_rows(self.root, self.files[window.shard], range(*window.row_groups), columns)


def shard_source(manifest: Manifest) -> ShardSource:
    """The shards that a manifest names."""
    files = [shard.file for shard in manifest.shards]
    return ShardSource(manifest.root, files, manifest.row_group_size, manifest.labels)


def layout(manifest: Manifest) -> Layout:
    """What the plan needs to know of a data set."""
    return Layout(
        np.array([shard.num_images for shard in manifest.shards], np.int64), manifest.row_group_size
    )


def to_sizes(records: pa.Table) -> Sizes:
    """Ids and image sizes of records with `INDEX_COLUMNS`."""
    # An image that could not be read has no size; its slot has weight 0 whatever it is.
    image_ids, heights, widths = (
        compute.fill_null(records[name], 1).to_numpy().astype(np.int64) for name in INDEX_COLUMNS
    )
    return Sizes(image_ids, np.maximum(heights, 1), np.maximum(widths, 1))


@lru_cache(maxsize=128)
def _shard_index(root: str, file: str) -> pa.Table:
    return read_rows(root, file, None, INDEX_COLUMNS)
