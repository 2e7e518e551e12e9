"""COCO panoptic JSON: read in one pass, into the tables of an `Index`, with or without detection annotations."""

import hashlib
import json
from typing import Any

from raydetr.data.ingest.coco import CocoFile, MissingKeys, add_image, check_categories, is_name
from raydetr.data.ingest.faults import as_int
from raydetr.data.ingest.index import Index
from raydetr.data.ingest.json_stream import read_elements
from raydetr.data.ingest.repairs import read_int
from raydetr.data.schema import Fault
from raydetr.errors import DataError

_LISTS = ("images", "annotations", "categories")


def read_panoptic(address: str, index: Index, alone: bool) -> CocoFile:
    """Read a COCO panoptic JSON.

    Args:
        address: of the file.
        index: takes its annotations; of those of one image the last is used.
        alone: there is no detection JSON: take the images too, and the segments of things as annotations.

    Raises:
        StorageError: it cannot be read.
        DataError: it is not JSON, or not COCO panoptic: what is missing.
    """
    digest = hashlib.sha256()
    categories: list[Any] = []
    found: set[str] = set()
    readable = False
    for key, position, value, text in read_elements(address, digest):
        if key not in _LISTS or position is None:
            continue
        found.add(key)
        if key == "categories":
            categories.append(value)
        elif key == "annotations":
            readable |= _add(index, value, position, text, address)
        elif alone and isinstance(value, dict):
            add_image(index, value, position, text, address)
    for key in _LISTS:
        if key not in found:
            raise DataError(
                f"{address}: not COCO panoptic: expected an object with a list {key!r} that is not empty."
            )
    for position, category in enumerate(categories):
        if not isinstance(category, dict):
            raise DataError(f"{address}: categories[{position}] is {category!r}; expected an object.")
    check_categories(categories, address)
    if not readable:
        raise DataError(
            f"{address}: not COCO panoptic: no annotation has image_id, file_name and segments_info."
        )
    if alone:
        _add_things(index, {category["id"] for category in categories if category.get("isthing", 1)}, address)
    return CocoFile(tuple(categories), digest.hexdigest())


def _add(index: Index, fields: Any, position: int, text: str, address: str) -> bool:
    """Add an annotation, or the fault of one that cannot be read."""
    image_id = read_int(fields.get("image_id")) if isinstance(fields, dict) else None
    segments = fields.get("segments_info") if isinstance(fields, dict) else None
    if (
        image_id is None
        or not is_name(fields.get("file_name"))
        or not isinstance(segments, list)
        or not all(isinstance(segment, dict) for segment in segments)
    ):
        reason = f"annotations[{position}] lacks a readable image_id, file_name or segments_info"
        name = address.rsplit("/", 1)[-1]
        index.add_fault(Fault("malformed-panoptic", name, image_id, None, reason))
        return False
    index.add_panoptic(position, image_id, fields["file_name"], text)
    return True


def _add_things(index: Index, things: set[int], source: str) -> None:
    """The segments of things as detection annotations, numbered through."""
    missing = MissingKeys(source)
    number = 0
    for image_id, annotation in index.panoptics():
        for segment in annotation["segments_info"]:
            if as_int(segment.get("category_id")) in things:
                fields = {**segment, "id": number + 1, "image_id": image_id}
                missing.look(fields)
                index.add_annotation(number, fields, json.dumps(fields))
                number += 1
    if not number:
        raise DataError(f"{source}: no segment is of a category with isthing 1: there is nothing to detect.")
    missing.check()
    index.join_annotations(source.rsplit("/", 1)[-1])
