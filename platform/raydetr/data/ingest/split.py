"""Cutting a data set into training, validation and test parts, the same way every time; images in two of them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from raydetr.data.ingest.duplicates import first_near_duplicates
from raydetr.data.ingest.index import Index
from raydetr.data.ingest.record import Entry
from raydetr.data.schema import Fault
from raydetr.data.shards import Manifest, Shard, read_image_hashes
from raydetr.errors import ConfigError, DataError

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """How to cut.

    fractions: of the parts train, val and, where there are three, test; they sum to 1.
    group_by: field of the JSON's image entries; images with the same value stay together. Empty: each by itself.
    seed: another one cuts otherwise.
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
    """Put each image into one part, by a hash of its id or its group: images that come later change no other's part.

    Returns:
        Part → its number of images.

    Raises:
        DataError: an image lacks the field to group by, or a part is empty.
    """
    names = PARTS[: len(split.fractions)]
    index.add_parts((position, names[_part(entry, split)]) for position, entry in index.images())
    counts = {name: index.count(name) for name in names}
    for name, count in counts.items():
        if not count:
            raise DataError(
                f"--split leaves no image for {name}: there are only {index.count()} images (or groups)."
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
    place = int.from_bytes(digest, "big") / 2**64
    for number, fraction in enumerate(split.fractions):
        place -= fraction
        if place < 0:
            return number
    return len(split.fractions) - 1


def near_duplicates_of(output: str, shards: Sequence[Shard], other: Manifest) -> Iterator[Fault]:
    """Images of `shards` that are nearly the same as one of another part of the data set: a fault each."""
    ours, theirs = _Hashes(output, shards), _Hashes(other.root, other.shards)
    for mine, its in first_near_duplicates(ours.values, theirs.values).tolist():
        (image_id, file), (its_id, its_file) = ours.image(mine), theirs.image(its)
        reason = f"nearly the same picture as {its_file} (image {its_id}) of {other.root}"
        yield Fault("near-duplicate", file, image_id, None, reason)


class _Hashes:
    """The perceptual hashes of the records that have one; which image it is, is read again where it is asked."""

    def __init__(self, root: str, shards: Sequence[Shard]) -> None:
        self._root, self._shards = root, shards
        values = [np.array([row[2] for row in _with_hash(root, shard)], dtype=np.int64) for shard in shards]
        self.values = np.concatenate([np.zeros(0, dtype=np.int64), *values])
        self._ends = np.cumsum([len(each) for each in values])
        self._rows = lru_cache(maxsize=2)(lambda number: _with_hash(root, shards[number]))

    def image(self, place: int) -> tuple[int, str]:
        """Image id and file name at a place of `values`."""
        number = int(np.searchsorted(self._ends, place, side="right"))
        rows = self._rows(number)
        image_id, file, _ = rows[place - int(self._ends[number])]
        return image_id, file


def _with_hash(root: str, shard: Shard) -> list[tuple[int, str, int | None]]:
    return [row for row in read_image_hashes(root, shard) if row[2] is not None]
