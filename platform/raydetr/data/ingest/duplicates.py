"""Find near-duplicate images: a perceptual hash, and the search for pairs of hashes that differ in few bits."""

import numpy as np
import numpy.typing as npt
from torch import Tensor

Int64Array = npt.NDArray[np.int64]

MAX_DISTANCE = 3
"""Maximum number of differing bits between the hashes of near-duplicates, such as a recompressed or scaled image."""

_MASK = np.uint64(0xFFFF)
_PAIRS_PER_CHUNK = 2**22
"""Number of candidate pairs that are compared together, which bounds the memory."""


def image_hash(image: Tensor) -> int | None:
    """Compute the difference hash of an image: whether each of 8 x 8 cells is darker than its right neighbor.

    Args:
        image: uint8 [3, height, width].

    Returns:
        64 bits as a signed integer. None for an image with a side under 16 pixels or almost no contrast, since many
        different images of that kind would have the same hash.
    """
    _, height, width = image.shape
    if min(height, width) < 16:
        return None
    # Every n-th pixel is enough for the averages of 8 x 9 cells.
    stride = max(min(height, width) // 160, 1)
    gray = image[:, ::stride, ::stride].numpy().astype(np.float32).mean(axis=0)
    rows = np.linspace(0, gray.shape[0], 9).astype(int)[:-1]
    columns = np.linspace(0, gray.shape[1], 10).astype(int)[:-1]
    sums = np.add.reduceat(np.add.reduceat(gray, rows, axis=0), columns, axis=1)
    cells = sums / (np.diff([*rows, gray.shape[0]])[:, None] * np.diff([*columns, gray.shape[1]]))
    if np.ptp(cells) < 8:
        return None
    bits = np.packbits(cells[:, 1:] > cells[:, :-1])
    return int(np.frombuffer(bits.tobytes(), dtype=">i8")[0])


def near_duplicates(first: Int64Array, second: Int64Array, max_distance: int = MAX_DISTANCE) -> Int64Array:
    """Find all pairs of hashes, one of each set, that differ in at most `max_distance` bits.

    Args:
        first: int64 [n].
        second: int64 [m].
        max_distance: 0 to 3.

    Returns:
        int64 [pairs, 2], indices into `first` and `second`, sorted.
    """
    if max_distance > 3:
        raise ValueError(
            f"max_distance is {max_distance}: expected at most 3, since more differing bits can affect all four parts"
        )
    ours, theirs = first.view(np.uint64), second.view(np.uint64)
    pairs = [np.zeros((0, 2), dtype=np.int64)]
    # If at most three bits differ, at least one of the four 16-bit parts is equal: only pairs with an equal part are
    # compared.
    for shift in (0, 16, 32, 48):
        part_of_ours, part_of_theirs = ((each >> np.uint64(shift)) & _MASK for each in (ours, theirs))
        order = np.argsort(part_of_theirs, kind="stable")
        parts = part_of_theirs[order]
        start = np.searchsorted(parts, part_of_ours, side="left")
        counts = np.searchsorted(parts, part_of_ours, side="right") - start
        # Some parts occur in very many images, such as those of a sky or a dark edge: compare in chunks.
        cuts = np.flatnonzero(np.diff(np.cumsum(counts) // _PAIRS_PER_CHUNK)) + 1
        for ids in np.split(np.arange(len(ours)), cuts):
            left = np.repeat(ids, counts[ids])
            offset = np.arange(len(left)) - np.repeat(np.cumsum(counts[ids]) - counts[ids], counts[ids])
            right = order[np.repeat(start[ids], counts[ids]) + offset]
            close = np.bitwise_count(ours[left] ^ theirs[right]) <= max_distance
            pairs.append(np.stack([left[close], right[close]], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def first_near_duplicates(first: Int64Array, second: Int64Array) -> Int64Array:
    """Find the first near-duplicate in `second` for each hash of `first` that has one.

    Returns only one row per hash, however many near-duplicates it has: all frames of a fixed camera are alike.

    Args:
        first: int64 [n].
        second: int64 [m].

    Returns:
        int64 [at most n, 2], indices into `first` (ascending) and `second`.
    """
    ours, inverse = np.unique(first, return_inverse=True)
    theirs, positions = np.unique(second, return_index=True)
    earliest = np.full(len(ours), len(second), dtype=np.int64)
    left, right = near_duplicates(ours, theirs).T
    np.minimum.at(earliest, left, positions[right])
    matched = np.flatnonzero(earliest[inverse] < len(second))
    return np.stack([matched, earliest[inverse][matched]], axis=1)
