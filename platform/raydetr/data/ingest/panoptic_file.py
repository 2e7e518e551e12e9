"""Read COCO panoptic JSON in one pass into the tables of an `Index`, with or without detection annotations."""

import hashlib
import json
from typing import Any

from raydetr.data.fault_codes import Fault
from raydetr.data.ingest.coco import CocoFile, MissingKeys, add_image, check_categories, is_name
from raydetr.data.ingest.faults import as_int
from raydetr.data.ingest.index import Index
from raydetr.data.ingest.json_stream import kind, read_elements
from raydetr.data.ingest.raw import RawAnnotation
from raydetr.data.ingest.repairs import read_int
from raydetr.errors import DataError

_LISTS = ("images", "annotations", "categories")


def read_panoptic(uri: str, index: Index, alone: bool) -> CocoFile:
    """Read a COCO panoptic JSON.

    Args:
        uri: URI of the file.
        index: receives the annotations. Of several annotations of an image the last is used.
        alone: there is no detection JSON: also add the images, and the segments of things as detection annotations.

    Raises:
        StorageError: the file cannot be read.
        DataError: the file is not JSON or not COCO panoptic. The message says what is missing.
    """
    digest = hashlib.sha256()
    entries: list[Any] = []
    present: set[str] = set()
    readable = False
    for key, position, value, text in read_elements(uri, digest):
        if key not in _LISTS or position is None:
            continue
        present.add(key)
        if key == "categories":
            entries.append(value)
        elif key == "annotations":
            readable |= _add(index, value, position, text, uri)
        elif alone and kind(value) == "object":
            add_image(index, value, position, text, uri)
    for key in _LISTS:
        if key not in present:
            raise DataError(f"{uri}: not COCO panoptic: expected an object with a non-empty list {key!r}.")
    for position, category in enumerate(entries):
        if not isinstance(category, dict):
            raise DataError(f"{uri}: categories[{position}] is {category!r}; expected an object.")
    categories = check_categories(entries, uri)
    if not readable:
        raise DataError(f"{uri}: not COCO panoptic: no annotation has image_id, file_name and segments_info.")
    if alone:
        _add_things(index, {category["id"] for category in categories if category.get("isthing", 1)}, uri)
    return CocoFile(tuple(categories), digest.hexdigest())


def _add(index: Index, fields: Any, position: int, text: str, uri: str) -> bool:
    """Add an annotation, or a fault if it cannot be read. Returns whether it was added."""
    image_id = read_int(fields.get("image_id")) if isinstance(fields, dict) else None
    segments = fields.get("segments_info") if isinstance(fields, dict) else None
    if (
        image_id is None
        or not is_name(fields.get("file_name"))
        or not isinstance(segments, list)
        or not all(isinstance(segment, dict) for segment in segments)
    ):
        reason = f"annotations[{position}] lacks a readable image_id, file_name or segments_info"
        name = uri.rsplit("/", 1)[-1]
        index.add_fault(Fault("malformed-panoptic", name, image_id, None, reason))
        return False
    index.add_panoptic(position, image_id, fields["file_name"], text)
    return True


def _add_things(index: Index, things: set[int], source: str) -> None:
    """Add the segments of things as detection annotations with consecutive ids."""
    missing = MissingKeys(source)
    number = 0
    for image_id, annotation in index.panoptics():
        for segment in annotation["segments_info"]:
            if as_int(segment.get("category_id")) in things:
                fields: RawAnnotation = {**segment, "id": number + 1, "image_id": image_id}
                missing.check_off(fields)
                index.add_annotation(number, fields, json.dumps(fields))
                number += 1
    if not number:
        raise DataError(f"{source}: no segment has a category with isthing 1: there is nothing to detect.")
    missing.require_none()
    index.join_annotations(source.rsplit("/", 1)[-1])
