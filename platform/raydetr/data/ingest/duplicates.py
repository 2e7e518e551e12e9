"""Images that are the same or nearly so: a perceptual hash, and pairs of hashes that differ in few bits."""

import numpy as np
import numpy.typing as npt
from torch import Tensor

Int64Array = npt.NDArray[np.int64]

MAX_DISTANCE = 3
"""Bits in which the hashes of near-identical images may differ: the same picture compressed or scaled anew."""

_MASK = np.uint64(0xFFFF)
_PAIRS_AT_ONCE = 2**22


def image_hash(image: Tensor) -> int | None:
    """The difference hash of an image: whether each of 8 x 8 places is darker than its right neighbour.

    Args:
        image: uint8 [3, height, width].

    Returns:
        64 bits as a signed integer; None for an image smaller than 16 pixels a side or nearly without contrast, of
        which there may be many that are not the same.
    """
    _, height, width = image.shape
    if min(height, width) < 16:
        return None
    # Every n-th pixel is enough for 72 averages.
    every = max(min(height, width) // 160, 1)
    grey = image[:, ::every, ::every].numpy().astype(np.float32).mean(axis=0)
    rows = np.linspace(0, grey.shape[0], 9).astype(int)[:-1]
    columns = np.linspace(0, grey.shape[1], 10).astype(int)[:-1]
    sums = np.add.reduceat(np.add.reduceat(grey, rows, axis=0), columns, axis=1)
    cells = sums / (np.diff([*rows, grey.shape[0]])[:, None] * np.diff([*columns, grey.shape[1]]))
    if np.ptp(cells) < 8:
        return None
    bits = np.packbits(cells[:, 1:] > cells[:, :-1])
    return int(np.frombuffer(bits.tobytes(), dtype=">i8")[0])


def near_duplicates(first: Int64Array, second: Int64Array, max_distance: int = MAX_DISTANCE) -> Int64Array:
    """Pairs of hashes of two sets that differ in at most `max_distance` bits, at most 3.

    Args:
        first: int64 [n].
        second: int64 [m].
        max_distance: 0 to 3.

    Returns:
        int64 [pairs, 2], indices into `first` and `second`, ascending.
    """
    if max_distance > 3:
        raise ValueError(
            f"max_distance is {max_distance}: more than 3 differing bits can touch all four parts"
        )
    ours, theirs = first.view(np.uint64), second.view(np.uint64)
    found = [np.zeros((0, 2), dtype=np.int64)]
    # Of four parts of 16 bits, at least one is equal where at most three bits differ.
    for shift in (0, 16, 32, 48):
        part_of_ours, part_of_theirs = ((each >> np.uint64(shift)) & _MASK for each in (ours, theirs))
        order = np.argsort(part_of_theirs, kind="stable")
        parts = part_of_theirs[order]
        start = np.searchsorted(parts, part_of_ours, side="left")
        counts = np.searchsorted(parts, part_of_ours, side="right") - start
        # Some parts are in very many pictures: those of a sky, of a dark edge.
        cuts = np.flatnonzero(np.diff(np.cumsum(counts) // _PAIRS_AT_ONCE)) + 1
        for ids in np.split(np.arange(len(ours)), cuts):
            left = np.repeat(ids, counts[ids])
            place = np.arange(len(left)) - np.repeat(np.cumsum(counts[ids]) - counts[ids], counts[ids])
            right = order[np.repeat(start[ids], counts[ids]) + place]
            close = np.bitwise_count(ours[left] ^ theirs[right]) <= max_distance
            found.append(np.stack([left[close], right[close]], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def first_near_duplicates(first: Int64Array, second: Int64Array) -> Int64Array:
    """Of each hash of a set that nearly occurs in another one: where it does so first.

    There is one row for each, however many there are: frames of a camera that stands still are all alike.

    Args:
        first: int64 [n].
        second: int64 [m].

    Returns:
        int64 [at most n, 2], indices into `first`, ascending, and `second`.
    """
    ours, which = np.unique(first, return_inverse=True)
    theirs, places = np.unique(second, return_index=True)
    earliest = np.full(len(ours), len(second), dtype=np.int64)
    mine, its = near_duplicates(ours, theirs).T
    np.minimum.at(earliest, mine, places[its])
    found = np.flatnonzero(earliest[which] < len(second))
    return np.stack([found, earliest[which][found]], axis=1)
