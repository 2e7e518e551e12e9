"""COCO detection JSON: read and checked as a whole, and cut into one entry an image.

What is wrong with the file as a whole (not JSON, not COCO, no images) stops the ingest; what is wrong with one
image or one annotation is a fault of that one, see `record`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from raydetr import storage
from raydetr.data.faults import as_int
from raydetr.data.record import Annotation, Entry
from raydetr.data.schema import Fault
from raydetr.errors import DataError


@dataclass(frozen=True)
class CocoIndex:
    """A COCO detection file."""

    categories: tuple[dict[str, Any], ...]
    entries: tuple[Entry, ...]
    """One for each image id, in the order of the file."""
    faults: tuple[Fault, ...]
    """Of image entries and annotations that cannot be part of any record."""
    digest: str = ""
    """SHA-256 of the file."""


def read_coco(address: str) -> CocoIndex:
    """Read a COCO detection JSON.

    Raises:
        StorageError: it cannot be read.
        DataError: it is not JSON, or not COCO detection: which key is missing or of a wrong type, and where.
    """
    text = storage.read_bytes(address)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{address}: not JSON ({error}).") from error
    return replace(parse_coco(content, address), digest=hashlib.sha256(text).hexdigest())


def parse_coco(content: Any, source: str) -> CocoIndex:
    """Check COCO detection content and group its annotations by image.

    An image id that occurs more than once stands for the last entry that has it, as in pycocotools.

    Args:
        content: what the JSON file holds.
        source: its name, for messages.

    Raises:
        DataError: it is not COCO detection.
    """
    if not isinstance(content, dict):
        raise DataError(
            f"{source}: not COCO detection: the file holds a {_kind(content)}; expected an object with the keys "
            "images, annotations and categories."
        )
    images, annotations, categories = (
        _list_of(content, key, source) for key in ("images", "annotations", "categories")
    )
    _check_categories(categories, source)
    _check_annotations(annotations, source)
    names = source.rsplit("/", 1)[-1]
    found: list[Fault] = []
    entries: dict[int, Entry] = {}
    for position, fields in enumerate(images):
        entry = _entry(fields, position, source)
        if (earlier := entries.get(entry.image_id)) is not None:
            reason = (
                f"image id {entry.image_id} again in images[{position}] ({entry.file_name}), which is used"
            )
            found.append(Fault("duplicate-image-id", earlier.file_name, entry.image_id, None, reason))
        entries[entry.image_id] = entry
    by_image: dict[int, list[Annotation]] = {image_id: [] for image_id in entries}
    for annotation in _with_duplicates(annotations):
        fields = annotation.fields
        image_id = as_int(fields.get("image_id"))
        if image_id in by_image:
            by_image[image_id].append(annotation)
            continue
        what = f"image_id {fields['image_id']!r}" if "image_id" in fields else "no image_id"
        reason = f"annotations[{annotation.position}] has {what}"
        found.append(Fault("unknown-image", names, image_id, as_int(fields.get("id")), reason))
    return CocoIndex(
        categories=tuple(categories),
        entries=tuple(
            replace(entry, annotations=tuple(by_image[image_id])) for image_id, entry in entries.items()
        ),
        faults=tuple(found),
    )


def _with_duplicates(annotations: list[dict[str, Any]]) -> Iterator[Annotation]:
    """The annotations, those marked whose id an earlier one has."""
    seen: dict[int, tuple[Any, ...]] = {}
    for position, fields in enumerate(annotations):
        annotation_id = as_int(fields.get("id"))
        content = tuple(repr(fields.get(key)) for key in ("image_id", "category_id", "bbox"))
        if annotation_id is None or annotation_id not in seen:
            if annotation_id is not None:
                seen[annotation_id] = content
            yield Annotation(position, fields)
        else:
            same = seen[annotation_id] == content
            code = "repeated-annotation" if same else "duplicate-annotation-id"
            yield Annotation(position, fields, (code,))


def _entry(fields: Mapping[str, Any], position: int, source: str) -> Entry:
    where = f"{source}: images[{position}]"
    for key in ("id", "file_name"):
        if key not in fields:
            raise DataError(f"{where} has no {key!r}; it has {sorted(fields)}.")
    image_id, file_name = as_int(fields["id"]), fields["file_name"]
    if image_id is None:
        raise DataError(f"{where}: id is {fields['id']!r}; image ids must be integers of 64 bits.")
    if not isinstance(file_name, str) or not file_name:
        raise DataError(f"{where}: file_name is {file_name!r}; expected a name.")
    height, width = as_int(fields.get("height")), as_int(fields.get("width"))
    extra = {k: v for k, v in fields.items() if k not in ("id", "file_name", "height", "width")}
    extra |= {k: fields[k] for k, v in (("height", height), ("width", width)) if v is None and k in fields}
    return Entry(image_id, file_name, height, width, extra, ())


def _list_of(content: Mapping[str, Any], key: str, source: str) -> list[dict[str, Any]]:
    """A list of objects under a key of the file."""
    if key not in content:
        raise DataError(
            f"{source}: not COCO detection: no key {key!r}; the file has {sorted(map(str, content))[:10]}."
        )
    items = content[key]
    if not isinstance(items, list):
        raise DataError(f"{source}: {key!r} is a {_kind(items)}; expected a list.")
    if not items:
        raise DataError(f"{source}: {key!r} is empty: nothing to ingest.")
    for position, item in enumerate(items):
        if not isinstance(item, dict):
            raise DataError(f"{source}: {key}[{position}] is a {_kind(item)}; expected an object.")
    return items


def _check_categories(categories: list[dict[str, Any]], source: str) -> None:
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


def _check_annotations(annotations: list[dict[str, Any]], source: str) -> None:
    """A key that not one annotation has is a wrong kind of file rather than a fault of each."""
    for key in ("id", "image_id", "category_id", "bbox"):
        if not any(key in fields for fields in annotations):
            hint = (
                "this is a panoptic file: give the detection file (instances_….json)"
                if "segments_info" in annotations[0]
                else f"they have {sorted(annotations[0])}"
            )
            raise DataError(f"{source}: not COCO detection: no annotation has {key!r}; {hint}.")


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
