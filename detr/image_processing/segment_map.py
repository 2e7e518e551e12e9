"""Compact map from pixels to the segments of a panoptic annotation; their boxes and masks are computed from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class SegmentMap:
    """A map of segments, numbered from 1. It is resized before masks are extracted from it.

    Attributes:
        numbers: uint8 [height, width], int32 if there are more than 255 segments; 0 is no segment.
        segments: the number of each segment, [n] of the same dtype.
    """

    numbers: torch.Tensor
    segments: torch.Tensor

    def masks(self) -> torch.Tensor:
        """Return the mask of each segment: bool [n, height, width]."""
        return self.numbers == self.segments[:, None, None]


def number_segments(ids: np.ndarray, segments: Sequence[int]) -> tuple[SegmentMap, torch.Tensor]:
    """Number segments from 1, and compute their map and boxes.

    Works on runs of equal ids within a row, not on pixels: a map has about 5,000 runs and 300,000 pixels.

    Args:
        ids: int [height, width], at least one pixel.
        segments: n ids.

    Returns:
        The map, and boxes int64 [n, 4]: the first and last column and row of each segment's pixels as left, top, right,
        bottom; zeros for a segment without pixels.
    """
    height, width = ids.shape
    is_start = np.ones((height, width), bool)
    np.not_equal(ids[:, 1:], ids[:, :-1], out=is_start[:, 1:])
    starts = np.flatnonzero(is_start)
    lengths = np.diff(starts, append=ids.size)
    known, number_of = np.unique(np.array(segments, np.int64), return_inverse=True)
    padded = np.append(known, -1)  # searchsorted may return the index past the end
    run_ids = ids.ravel()[starts]
    places = np.searchsorted(known, run_ids)
    numbers = np.where(padded[places] == run_ids, places + 1, 0)

    top = starts // width
    left = starts - top * width
    boxes = np.zeros((len(known) + 1, 4), np.int64)
    boxes[:, 0], boxes[:, 1] = width, height
    np.minimum.at(boxes[:, 0], numbers, left)
    np.minimum.at(boxes[:, 1], numbers, top)
    np.maximum.at(boxes[:, 2], numbers, left + lengths - 1)
    np.maximum.at(boxes[:, 3], numbers, top)
    boxes[boxes[:, 0] == width] = 0

    dtype = np.uint8 if len(known) < 256 else np.int32
    pixels = np.repeat(numbers.astype(dtype), lengths).reshape(height, width)
    of_segments = (number_of + 1).astype(dtype)
    return (
        SegmentMap(torch.from_numpy(pixels), torch.from_numpy(of_segments)),
        torch.from_numpy(boxes[number_of + 1]),
    )
