"""COCO detection JSON: read and checked in one pass, into the tables of an `Index`.

What is wrong with the file as a whole (not JSON, not COCO, no images) stops the ingest; what is wrong with one
image or one annotation is a fault of that one, see `record`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydetr.data.faults import as_int
from raydetr.data.index import Index
from raydetr.data.json_stream import kind, read_elements
from raydetr.errors import DataError

_LISTS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class CocoFile:
    """What a COCO file has beside images and annotations.

    categories: its classes.
    digest: SHA-256 of the file.
    """

    categories: tuple[dict[str, Any], ...]
    digest: str


def read_coco(address: str, index: Index) -> CocoFile:
    """Read a COCO detection JSON.

    An image id that occurs more than once stands for the last entry that has it, as in pycocotools.

    Args:
        address: of the file.
        index: takes its images and annotations.

    Raises:
        StorageError: it cannot be read.
        DataError: it is not JSON, or not COCO detection: which key is missing or of a wrong type, and where.
    """
    digest = hashlib.sha256()
    keys: list[str] = []
    categories: list[dict[str, Any]] = []
    missing = MissingKeys(address)
    for key, position, value, text in read_elements(address, digest):
        if not position:
            keys.append(key)
        if key not in _LISTS:
            continue
        if position is None:
            what = "is empty: nothing to ingest" if value == [] else f"is a {kind(value)}; expected a list"
            raise DataError(f"{address}: {key!r} {what}.")
        if not isinstance(value, dict):
            raise DataError(f"{address}: {key}[{position}] is a {kind(value)}; expected an object.")
        if key == "images":
            add_image(index, value, position, text, address)
        elif key == "annotations":
            missing.look(value)
            index.add_annotation(position, value, text)
        else:
            categories.append(value)
    if absent := [key for key in _LISTS if key not in keys]:
        raise DataError(f"{address}: not COCO detection: no key {absent[0]!r}; the file has {keys[:10]}.")
    check_categories(categories, address)
    missing.check()
    index.join_annotations(address.rsplit("/", 1)[-1])
    return CocoFile(tuple(categories), digest.hexdigest())


def add_image(index: Index, fields: Mapping[str, Any], position: int, text: str, source: str) -> None:
    """Check an image entry and add it.

    Raises:
        DataError: it lacks an id or a file name.
    """
    where = f"{source}: images[{position}]"
    for key in ("id", "file_name"):
        if key not in fields:
            raise DataError(f"{where} has no {key!r}; it has {sorted(fields)}.")
    image_id, file_name = as_int(fields["id"]), fields["file_name"]
    if image_id is None:
        raise DataError(f"{where}: id is {fields['id']!r}; image ids must be integers of 64 bits.")
    if not is_name(file_name):
        raise DataError(f"{where}: file_name is {file_name!r}; expected a name.")
    index.add_image(position, image_id, file_name, text)


def is_name(value: Any) -> bool:
    """Whether a value can be the name of a file: text, not empty, without half a pair of surrogates."""
    return isinstance(value, str) and bool(value) and not any("\ud800" <= c <= "\udfff" for c in value)


def check_categories(categories: Sequence[dict[str, Any]], source: str) -> None:
    """Check the categories, and make their ids integers.

    Raises:
        DataError: one lacks an id or a name, or has the id of another.
    """
    seen: dict[int, str] = {}
    for position, category in enumerate(categories):
        where = f"{source}: categories[{position}]"
        for key in ("id", "name"):
            if key not in category:
                raise DataError(f"{where} has no {key!r}; it has {sorted(category)}.")
        category_id, name = as_int(category["id"]), category["name"]
        if category_id is None:
            raise DataError(f"{where}: id is {category['id']!r}; category ids must be integers.")
        if not isinstance(name, str):
            raise DataError(f"{where}: name is {name!r}; expected text.")
        if category_id in seen:
            raise DataError(f"{where}: id {category_id} is taken by {seen[category_id]!r} already.")
        category["id"] = category_id
        seen[category_id] = name


class MissingKeys:
    """Keys that not one annotation has: a wrong kind of file rather than a fault of each."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._missing = {"id", "image_id", "category_id", "bbox"}
        self._first: list[str] = []

    def look(self, fields: Mapping[str, Any]) -> None:
        """See an annotation."""
        if self._missing:
            self._first = self._first or sorted(fields)
            self._missing.difference_update(fields)

    def check(self) -> None:
        """When all were seen.

        Raises:
            DataError: a key is missing.
        """
        for key in ("id", "image_id", "category_id", "bbox"):
            if key in self._missing:
                hint = (
                    "this is a panoptic file: give it as --panoptic-annotations, or the detection file (instances_….json)"
                    if "segments_info" in self._first
                    else f"they have {self._first}"
                )
                raise DataError(f"{self._source}: not COCO detection: no annotation has {key!r}; {hint}.")
