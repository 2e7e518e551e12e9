"""Cutting a data set into training, validation and test parts, the same way every time."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from raydetr.data.record import Entry
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


def split_entries(entries: Sequence[Entry], split: Split) -> dict[str, tuple[Entry, ...]]:
    """Each entry in one part, by a hash of its image id or its group: entries that come later change no other's part.

    Raises:
        DataError: an image lacks the field to group by, or a part is empty.
    """
    parts: dict[str, list[Entry]] = {name: [] for name in PARTS[: len(split.fractions)]}
    for entry in entries:
        if split.group_by and split.group_by not in entry.extra:
            raise DataError(
                f"--group-by {split.group_by}: image {entry.image_id} ({entry.file_name}) has no such field; it has "
                f"{sorted(entry.extra)}."
            )
        key = entry.extra[split.group_by] if split.group_by else entry.image_id
        digest = hashlib.blake2b(f"{split.seed}/split/{key!r}".encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "big") / 2**64
        for name, fraction in zip(parts, split.fractions, strict=True):
            place -= fraction
            if place < 0 or name == list(parts)[-1]:
                parts[name].append(entry)
                break
    for name, members in parts.items():
        if not members:
            raise DataError(
                f"--split leaves no image for {name}: there are only {len(entries)} images (or groups)."
            )
    return {name: tuple(members) for name, members in parts.items()}
