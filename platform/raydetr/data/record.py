"""One image entry of a COCO file, with its image, as a record of a shard; and an object back as COCO annotation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raydetr.data import faults
from raydetr.data.faults import as_int, as_numbers
from raydetr.data.panoptic import Panoptic, inspect_panoptic
from raydetr.data.schema import Fault, worst

USUAL_QUERIES = 100
"""Object queries of the published models: more objects in an image cannot all be found."""

_COLUMNS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "keypoints")


@dataclass(frozen=True)
class Annotation:
    """An annotation as the JSON has it, with its position there and the faults that only the whole file shows."""

    position: int
    fields: dict[str, Any]
    codes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """An image entry of the JSON with its annotations in the JSON's order."""

    image_id: int
    file_name: str
    height: int | None
    """As the JSON says; None where it does not."""
    width: int | None
    extra: dict[str, Any]
    annotations: tuple[Annotation, ...]
    panoptic: Panoptic | None = None


def make_record(
    entry: Entry, data: bytes | None, category_ids: frozenset[int], panoptic_png: bytes | None = None
) -> tuple[dict[str, Any], list[Fault]]:
    """The record of an image entry, and everything that is wrong with it. The image is decoded once, to check it.

    Args:
        entry: of the COCO file.
        data: the encoded image; None where there is no file.
        category_ids: ids of the data set's categories.
        panoptic_png: the encoded PNG of `entry.panoptic`; None where there is no file.

    Returns:
        A mapping with the columns of `schema.SCHEMA`, and its faults: the image's, then the objects' in order.
    """
    facts = faults.inspect_image(data, entry.height, entry.width, entry.file_name)
    found = [Fault(code, entry.file_name, entry.image_id, None, reason) for code, reason in facts.faults]
    objects = []
    for annotation in entry.annotations:
        item, unread = _object(annotation.fields)
        problems = faults.object_faults(annotation.fields, item, facts.frame, category_ids)
        problems += [(code, f"annotations[{annotation.position}]") for code in annotation.codes]
        item["fault"] = worst([code for code, _ in problems])
        item["extra"] = _json(unread)
        objects.append(item)
        for code, reason in problems:
            if item["id"] is None:
                reason = f"annotations[{annotation.position}]: {reason}"
            found.append(Fault(code, entry.file_name, entry.image_id, item["id"], reason))
    segments: list[dict[str, Any]] | None = None
    of_png: list[faults.Problem] = []
    if entry.panoptic is not None:
        segments, of_png, of_segments = inspect_panoptic(
            entry.panoptic, panoptic_png, facts.frame, category_ids
        )
        name = entry.panoptic.file_name
        found += [Fault(code, name, entry.image_id, None, reason) for code, reason in of_png]
        found += [Fault(code, name, entry.image_id, number, reason) for number, code, reason in of_segments]
    if not objects and not segments:
        found.append(Fault("no-objects", entry.file_name, entry.image_id, None, "no annotation"))
    if len(objects) > USUAL_QUERIES:
        found.append(Fault("many-objects", entry.file_name, entry.image_id, None, f"{len(objects)} objects"))
    record = {
        "image_id": entry.image_id,
        "file_name": entry.file_name,
        "height": facts.height,
        "width": facts.width,
        "image": data,
        "objects": objects,
        "panoptic_image": panoptic_png,
        "segments": segments,
        "fault": worst([code for code, _ in (*facts.faults, *of_png)]),
        "extra": _json(entry.extra),
        "image_hash": facts.hash,
    }
    return record, found


def to_annotation(item: Mapping[str, Any], image_id: int) -> dict[str, Any]:
    """The COCO annotation that an object of a record was made of.

    Args:
        item: an element of the column `objects`, all fields.
        image_id: of its record.
    """
    fields = {name: item[name] for name in _COLUMNS if item.get(name) is not None}
    if segmentation := item["segmentation"]:
        rle = segmentation["rle"]
        if rle is None:
            fields["segmentation"] = segmentation["polygons"]
        else:
            counts = rle["runs"] if rle["counts"] is None else rle["counts"].decode("ascii")
            fields["segmentation"] = {"size": rle["size"], "counts": counts}
    return {**fields, "image_id": image_id, **json.loads(item["extra"] or "{}")}


def _object(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns of an object, and the fields that no column took as they are."""
    box = as_numbers(fields.get("bbox"))
    area = as_numbers([fields.get("area")])
    keypoints = as_numbers(fields.get("keypoints"))
    iscrowd = fields.get("iscrowd")
    iscrowd = int(iscrowd) if isinstance(iscrowd, bool) else as_int(iscrowd)
    item = {
        "id": as_int(fields.get("id")),
        "category_id": as_int(fields.get("category_id")),
        "bbox": box if box is not None and len(box) == 4 else None,
        "area": None if area is None else area[0],
        "iscrowd": iscrowd if iscrowd in (0, 1) else None,
        "segmentation": faults.read_segmentation(fields.get("segmentation")),
        "keypoints": keypoints,
    }
    unread = {k: v for k, v in fields.items() if k != "image_id" and item.get(k) is None}
    return item, unread


def _json(value: Mapping[str, Any]) -> str | None:
    return json.dumps(value, sort_keys=True, separators=(",", ":")) if value else None
