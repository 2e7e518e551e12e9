"""Which pixel belongs to which segment, in as few bytes as will do: boxes and masks of a panoptic map come from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class SegmentMap:
    """A map of segments under numbers from 1; masks are cut out after it was resized.

    Attributes:
        numbers: uint8 [height, width], int32 where there are more than 255 segments; 0 is no segment.
        segments: the number of each segment, [n] of the same dtype.
    """

    numbers: torch.Tensor
    segments: torch.Tensor

    def masks(self) -> torch.Tensor:
        """Bool [n, height, width]."""
        return self.numbers == self.segments[:, None, None]


def number_segments(ids: np.ndarray, segments: Sequence[int]) -> tuple[SegmentMap, torch.Tensor]:
    """The map of some segments, and their boxes.

    Over runs of equal ids within a row rather than pixels: a map has some 5,000 runs and 300,000 pixels.

    Args:
        ids: int [height, width], at least one pixel.
        segments: n ids.

    Returns:
        The map; and the boxes int64 [n, 4] of the segments' pixels: left, top, right, bottom of the first and last ones,
        zeros for a segment without any.
    """
    height, width = ids.shape
    begins = np.ones((height, width), bool)
    np.not_equal(ids[:, 1:], ids[:, :-1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=ids.size)
    known, number_of = np.unique(np.array(segments, np.int64), return_inverse=True)
    padded = np.append(known, -1)  # so that there is an element after the last one
    found = ids.ravel()[starts]
    places = np.searchsorted(known, found)
    numbers = np.where(padded[places] == found, places + 1, 0)

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
