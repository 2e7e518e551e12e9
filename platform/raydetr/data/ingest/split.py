"""Split a data set reproducibly into training, validation and test parts, and find images that occur in two of them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from raydetr.data.fault_codes import Fault
from raydetr.data.ingest.duplicates import first_near_duplicates
from raydetr.data.ingest.index import Index
from raydetr.data.ingest.record import Entry
from raydetr.data.shards import Manifest, Shard, read_image_hashes
from raydetr.errors import ConfigError, DataError

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """How to split.

    fractions: shares of train, val and, if there are three, test; they sum to 1.
    group_by: field of the image entries in the JSON; images with the same value stay in the same part. Empty: images
        are assigned independently.
    seed: seed of the assignment.
    """

    fractions: tuple[float, ...]
    group_by: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            len(self.fractions) not in (2, 3)
            or min(self.fractions) <= 0
            or abs(sum(self.fractions) - 1) > 1e-6
        ):
            raise ConfigError(
                f"--split is {','.join(map(str, self.fractions))}: expected two or three fractions over 0 that sum to "
                "1, such as 0.8,0.1,0.1 for train, val and test."
            )


def split_images(index: Index, split: Split) -> dict[str, int]:
    """Assign each image to a part by a hash of its id or its group, so that adding images moves no other image.

    Returns:
        Part → number of images.

    Raises:
        DataError: an image lacks the field to group by, or a part is empty.
    """
    names = PARTS[: len(split.fractions)]
    index.add_parts((position, names[_part(entry, split)]) for position, entry in index.images())
    counts = {name: index.count(name) for name in names}
    for name, count in counts.items():
        if not count:
            raise DataError(
                f"--split assigns no image to {name}: there are only {index.count()} images (or groups)."
            )
    return counts


def _part(entry: Entry, split: Split) -> int:
    if split.group_by and split.group_by not in entry.extra:
        raise DataError(
            f"--group-by {split.group_by}: image {entry.image_id} ({entry.file_name}) has no such field; it has "
            f"{sorted(entry.extra)}."
        )
    key = entry.extra[split.group_by] if split.group_by else entry.image_id
    digest = hashlib.blake2b(f"{split.seed}/split/{key!r}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64  # uniform in [0, 1)
    for number, fraction in enumerate(split.fractions):
        position -= fraction
        if position < 0:
            return number
    return len(split.fractions) - 1


def find_near_duplicates(output: str, shards: Sequence[Shard], other: Manifest) -> Iterator[Fault]:
    """Report each image of `shards` that is nearly the same as an image of another part of the data set."""
    ours, theirs = _Hashes(output, shards), _Hashes(other.root, other.shards)
    for our_index, their_index in first_near_duplicates(ours.values, theirs.values).tolist():
        (image_id, file), (other_id, other_file) = ours.image(our_index), theirs.image(their_index)
        reason = f"nearly the same image as {other_file} (image {other_id}) of {other.root}"
        yield Fault("near-duplicate", file, image_id, None, reason)


class _Hashes:
    """The perceptual hashes of all records that have one. Ids and file names are read from the shards when needed."""

    def __init__(self, root: str, shards: Sequence[Shard]) -> None:
        self._root, self._shards = root, shards
        values = [np.array([row[2] for row in _with_hash(root, shard)], dtype=np.int64) for shard in shards]
        self.values = np.concatenate([np.zeros(0, dtype=np.int64), *values])
        self._ends = np.cumsum([len(each) for each in values])
        self._rows = lru_cache(maxsize=2)(lambda number: _with_hash(root, shards[number]))

    def image(self, index: int) -> tuple[int, str]:
        """Return image id and file name of the hash `values[index]`."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        rows = self._rows(number)
        # The index is negative: it counts from the end of the shard's rows.
        image_id, file, _ = rows[index - int(self._ends[number])]
        return image_id, file


def _with_hash(root: str, shard: Shard) -> list[tuple[int, str, int | None]]:
    return [row for row in read_image_hashes(root, shard) if row[2] is not None]
