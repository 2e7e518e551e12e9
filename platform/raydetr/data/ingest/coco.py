"""COCO detection JSON: read and checked in one pass, into the tables of an `Index`.

What is wrong with the file as a whole (not JSON, not COCO, no images) stops the ingest; what is wrong with one
image or one annotation is a fault of that one, see `record`.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydetr.data.ingest.index import Index
from raydetr.data.ingest.json_stream import kind, read_elements
from raydetr.data.ingest.repairs import read_int
from raydetr.data.schema import Fault
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
    used: set[int | None] = set()
    missing = MissingKeys(address)
    for key, position, value, text in read_elements(address, digest):
        if not position:
            keys.append(key)
        if key not in _LISTS:
            continue
        if value == [] and key != "images":
            continue  # images without objects; then without categories too
        if position is None:
            what = "is empty: nothing to ingest" if value == [] else f"is a {kind(value)}; expected a list"
            raise DataError(f"{address}: {key!r} {what}.")
        if not isinstance(value, dict):
            raise DataError(f"{address}: {key}[{position}] is a {kind(value)}; expected an object.")
        if key == "images":
            add_image(index, value, position, text, address)
        elif key == "annotations":
            missing.look(value)
            used.add(read_int(value.get("category_id")))
            index.add_annotation(position, value, text)
        else:
            categories.append(value)
    if absent := [key for key in _LISTS if key not in keys]:
        raise DataError(f"{address}: not COCO detection: no key {absent[0]!r}; the file has {keys[:10]}.")
    name = address.rsplit("/", 1)[-1]
    if used and not categories:
        raise DataError(f"{address}: 'categories' is empty: nothing to ingest.")
    check_categories(categories, address)
    for dropped in drop_unused_namesakes(categories, used):
        reason = f"category {dropped['id']} has the name {dropped['name']!r} of another, and no annotation"
        index.add_fault(Fault("repaired-category", name, None, None, reason))
    missing.check()
    index.join_annotations(name)
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
    image_id, file_name = read_int(fields["id"]), fields["file_name"]
    if image_id is None:
        raise DataError(
            f"{where}: id is {fields['id']!r:.80}; image ids must be integers of 64 bits: number the images, here and "
            "in the image_id of their annotations."
        )
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
        category_id, name = read_int(category["id"]), category["name"]
        if category_id is None:
            raise DataError(f"{where}: id is {category['id']!r}; category ids must be integers.")
        if not isinstance(name, str):
            raise DataError(f"{where}: name is {name!r}; expected text.")
        if category_id in seen:
            raise DataError(f"{where}: id {category_id} is taken by {seen[category_id]!r} already.")
        category["id"] = category_id
        seen[category_id] = name


def drop_unused_namesakes(
    categories: list[dict[str, Any]], used: Container[int | None]
) -> list[dict[str, Any]]:
    """Drop categories that share their name with one that has annotations, and have none; returns these.

    Roboflow lists the project as a category of its own, with the name of a class.
    """
    named = {_as_seen(category) for category in categories if category["id"] in used}
    counts = Counter(_as_seen(category) for category in categories)
    dropped = [
        each
        for each in categories
        if counts[_as_seen(each)] > 1 and _as_seen(each) in named and each["id"] not in used
    ]
    categories[:] = [each for each in categories if each not in dropped]
    return dropped


def require_distinct_names(categories: Sequence[Mapping[str, Any]], source: str) -> None:
    """Check that no two categories have one name, or names that look the same.

    Raises:
        DataError: two have, which would be two classes that no one can tell apart in a result.
    """
    seen: dict[str, Mapping[str, Any]] = {}
    for category in categories:
        first = seen.setdefault(_as_seen(category), category)
        if first is not category:
            name, other = category["name"], first["name"]
            named = (
                f"both named {name!r}"
                if name == other
                else f"named {other!a} and {name!a}, which look the same"
            )
            raise DataError(
                f"{source}: the categories {first['id']} and {category['id']} are {named}: give each a name of its own, "
                f"or make them one by --classes with a file that holds {json.dumps({name: other})}."
            )


def _as_seen(category: Mapping[str, Any]) -> str:
    """The name without what no one sees: Unicode's form of letters with accents, and spaces around it."""
    return unicodedata.normalize("NFC", category["name"]).strip()


class MissingKeys:
    """Keys that not one annotation has: a wrong kind of file rather than a fault of each."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._missing = {"image_id", "category_id", "bbox"}
        self._first: list[str] = []

    def look(self, fields: Mapping[str, Any]) -> None:
        """See an annotation."""
        if self._missing:
            self._first = self._first or sorted(fields)
            self._missing.difference_update(fields)
            if fields.get("segmentation"):
                self._missing.discard("bbox")  # which is then that of the segmentation

    def check(self) -> None:
        """When all were seen.

        Raises:
            DataError: a key is missing.
        """
        for key in ("image_id", "category_id", "bbox"):
            if self._first and key in self._missing:
                hint = (
                    "this is a panoptic file: give it as --panoptic-annotations, or the detection file (instances_….json)"
                    if "segments_info" in self._first
                    else f"they have {self._first}"
                )
                raise DataError(f"{self._source}: not COCO detection: no annotation has {key!r}; {hint}.")
