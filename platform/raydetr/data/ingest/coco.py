"""Read and check COCO detection JSON in one pass, into the tables of an `Index`.

An error of the file as a whole (not JSON, not COCO, no images) stops the ingest. A defect of a single image or
annotation becomes a fault of its record, see `record`.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from raydetr.data.fault_codes import Fault
from raydetr.data.ingest.index import Index
from raydetr.data.ingest.json_stream import kind, read_elements
from raydetr.data.ingest.raw import RawAnnotation, RawImage
from raydetr.data.ingest.repairs import read_int
from raydetr.data.schema import Category
from raydetr.errors import DataError

_LISTS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class CocoFile:
    """The content of a COCO file other than images and annotations.

    categories: its categories.
    digest: SHA-256 of the file.
    """

    categories: tuple[Category, ...]
    digest: str


def read_coco(uri: str, index: Index) -> CocoFile:
    """Read a COCO detection JSON.

    If several entries have the same image id, the last one is used, as in pycocotools.

    Args:
        uri: URI of the file.
        index: receives the images and annotations.

    Raises:
        StorageError: the file cannot be read.
        DataError: the file is not JSON or not COCO detection. The message says which key is missing or has the wrong
            type, and where.
    """
    digest = hashlib.sha256()
    keys: list[str] = []
    entries: list[Any] = []
    used: set[int | None] = set()
    missing = MissingKeys(uri)
    for key, position, value, text in read_elements(uri, digest):
        if not position:
            keys.append(key)
        if key not in _LISTS:
            continue
        if value == [] and key != "images":
            continue  # images without objects, where "categories" may be empty too
        if position is None:
            what = (
                "is empty: there is nothing to ingest"
                if value == []
                else f"is of type {kind(value)}; expected a list"
            )
            raise DataError(f"{uri}: {key!r} {what}.")
        if kind(value) != "object":
            raise DataError(f"{uri}: {key}[{position}] is of type {kind(value)}; expected an object.")
        if key == "images":
            add_image(index, value, position, text, uri)
        elif key == "annotations":
            missing.check_off(value)
            used.add(read_int(value.get("category_id")))
            index.add_annotation(position, value, text)
        else:
            entries.append(value)
    if absent := [key for key in _LISTS if key not in keys]:
        raise DataError(f"{uri}: not COCO detection: no key {absent[0]!r}; the file has {keys[:10]}.")
    name = uri.rsplit("/", 1)[-1]
    if used and not entries:
        raise DataError(f"{uri}: 'categories' is empty, but the file has annotations: list their categories.")
    categories = check_categories(entries, uri)
    for dropped in drop_unused_duplicates(categories, used):
        reason = (
            f"category {dropped['id']} has the same name {dropped['name']!r} as another, and no annotation"
        )
        index.add_fault(Fault("repaired-category", name, None, None, reason))
    missing.require_none()
    index.join_annotations(name)
    return CocoFile(tuple(categories), digest.hexdigest())


def add_image(index: Index, fields: RawImage, position: int, text: str, source: str) -> None:
    """Check an image entry and add it to the index.

    Raises:
        DataError: the id or the file name is missing or invalid.
    """
    where = f"{source}: images[{position}]"
    for key in ("id", "file_name"):
        if key not in fields:
            raise DataError(f"{where} has no {key!r}; it has {sorted(fields)}.")
    image_id, file_name = read_int(fields["id"]), fields["file_name"]
    if image_id is None:
        raise DataError(
            f"{where}: id is {fields['id']!r:.80}; image ids must be integers of at most 64 bits: number the images, "
            "and change image_id in their annotations accordingly."
        )
    if not is_name(file_name):
        raise DataError(f"{where}: file_name is {file_name!r}; expected a file name.")
    index.add_image(position, image_id, file_name, text)


def is_name(value: Any) -> bool:
    """Whether a value can be a file name: a string that is not empty and has no lone surrogates."""
    return isinstance(value, str) and bool(value) and not any("\ud800" <= c <= "\udfff" for c in value)


def check_categories(entries: Sequence[Any], source: str) -> list[Category]:
    """Check the entries of `categories`, each of which is an object, and convert their ids to integers.

    Raises:
        DataError: an id or a name is missing or invalid, or two categories have the same id.
    """
    seen: dict[int, str] = {}
    checked: list[Category] = []
    for position, category in enumerate(entries):
        where = f"{source}: categories[{position}]"
        for key in ("id", "name"):
            if key not in category:
                raise DataError(f"{where} has no {key!r}; it has {sorted(category)}.")
        category_id, name = read_int(category["id"]), category["name"]
        if category_id is None:
            raise DataError(f"{where}: id is {category['id']!r}; category ids must be integers.")
        if not isinstance(name, str):
            raise DataError(f"{where}: name is {name!r}; expected a string.")
        if category_id in seen:
            raise DataError(f"{where}: id {category_id} is already used by {seen[category_id]!r}.")
        checked.append(category | {"id": category_id})
        seen[category_id] = name
    return checked


def drop_unused_duplicates(categories: list[Category], used: Container[int | None]) -> list[Category]:
    """Drop categories without annotations that have the same name as a category with annotations; return them.

    Roboflow lists the project as a category, which can have the name of a class.
    """
    named = {_normalized_name(category) for category in categories if category["id"] in used}
    counts = Counter(_normalized_name(category) for category in categories)
    dropped = [
        each
        for each in categories
        if counts[_normalized_name(each)] > 1 and _normalized_name(each) in named and each["id"] not in used
    ]
    categories[:] = [each for each in categories if each not in dropped]
    return dropped


def require_distinct_names(categories: Sequence[Category], source: str) -> None:
    """Check that no two categories have the same name or names that look the same.

    Raises:
        DataError: two have; in results, their classes would be indistinguishable.
    """
    seen: dict[str, Category] = {}
    for category in categories:
        first = seen.setdefault(_normalized_name(category), category)
        if first is not category:
            name, other = category["name"], first["name"]
            named = (
                f"both named {name!r}"
                if name == other
                else f"named {other!a} and {name!a}, which look the same"
            )
            raise DataError(
                f"{source}: the categories {first['id']} and {category['id']} are {named}: give each a unique name, or "
                f"merge them by --classes with a file that holds {json.dumps({name: other})}."
            )


def _normalized_name(category: Category) -> str:
    """Normalize a name so that names which look the same are equal: NFC, without surrounding whitespace."""
    return unicodedata.normalize("NFC", category["name"]).strip()


class MissingKeys:
    """Detect required keys that no annotation has. The file is then of the wrong kind, not each annotation faulty."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._missing = {"image_id", "category_id", "bbox"}
        self._first: list[str] = []

    def check_off(self, fields: RawAnnotation) -> None:
        """Check off the keys of an annotation."""
        if self._missing:
            self._first = self._first or sorted(fields)
            self._missing.difference_update(fields)
            if fields.get("segmentation"):
                self._missing.discard("bbox")  # the box is then computed from the segmentation

    def require_none(self) -> None:
        """Check that no key is missing, after all annotations were checked off.

        Raises:
            DataError: no annotation has one of the keys.
        """
        for key in ("image_id", "category_id", "bbox"):
            if self._first and key in self._missing:
                hint = (
                    "this is a panoptic file: give it as --panoptic-annotations, or give the detection file "
                    "(instances_….json)"
                    if "segments_info" in self._first
                    else f"they have {self._first}"
                )
                raise DataError(f"{self._source}: not COCO detection: no annotation has {key!r}; {hint}.")
