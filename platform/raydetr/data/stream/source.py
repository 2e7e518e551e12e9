"""The source of a stream's records: the shards of a data set, read window by window."""

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
    """The interface from which a stream reads."""

    @property
    def labels(self) -> dict[int, int]:
        """Category id → contiguous label."""

    def sizes(self, window: Window) -> Sizes:
        """Read ids and image sizes of a window's records, without their images."""

    def records(self, window: Window, columns: Sequence[str] = RECORD_COLUMNS) -> pa.Table:
        """Read these columns of a window's records."""


@dataclass(frozen=True, eq=False)
class ShardSource:
    """The shards of a data set.

    root: URI of their folder.
    files: names of the shards in it.
    row_group_size: records in a full row group.
    labels: category id → contiguous label.
    """

    root: str
    files: Sequence[str]
    row_group_size: int
    labels: dict[int, int]

    def sizes(self, window: Window) -> Sizes:
        """See `Source`. The index columns of a shard are read once and cached."""
        index = _shard_index(self.root, self.files[window.shard])
        return to_sizes(index.slice(window.row_groups[0] * self.row_group_size, window.size))

    def records(self, window: Window, columns: Sequence[str] = RECORD_COLUMNS) -> pa.Table:
        """See `Source`."""
        return read_rows(self.root, self.files[window.shard], range(*window.row_groups), columns)


def shard_source(manifest: Manifest) -> ShardSource:
    """Create the source of the shards that a manifest lists."""
    files = [shard.file for shard in manifest.shards]
    return ShardSource(manifest.root, files, manifest.row_group_size, manifest.labels)


def layout(manifest: Manifest) -> Layout:
    """Return the layout of a data set, which the plan needs."""
    return Layout(
        np.array([shard.num_images for shard in manifest.shards], np.int64), manifest.row_group_size
    )


def to_sizes(records: pa.Table) -> Sizes:
    """Convert records with `INDEX_COLUMNS` to ids and image sizes."""
    # An image that could not be read has no size. 1 x 1 is as good as any other, since its slot has weight 0.
    image_ids, heights, widths = (
        compute.fill_null(records[name], 1).to_numpy().astype(np.int64) for name in INDEX_COLUMNS
    )
    return Sizes(image_ids, np.maximum(heights, 1), np.maximum(widths, 1))


@lru_cache(maxsize=128)
def _shard_index(root: str, file: str) -> pa.Table:
    return read_rows(root, file, None, INDEX_COLUMNS)
