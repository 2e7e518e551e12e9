"""Convert an image entry of a COCO file to a record of a shard, and an object of a record back to an annotation."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raydetr.data.fault_codes import Fault, worst
from raydetr.data.ingest import faults
from raydetr.data.ingest.faults import Orientation, as_int, as_numbers
from raydetr.data.ingest.panoptic import Panoptic, inspect_panoptic
from raydetr.data.ingest.raw import RawAnnotation
from raydetr.data.ingest.repairs import is_standard, repair_annotation
from raydetr.data.schema import ObjectRow, Record, SegmentRow

USUAL_QUERIES = 100
"""Number of object queries of the published models, which cannot detect more objects in an image."""

_COLUMNS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "keypoints")


@dataclass(frozen=True)
class Annotation:
    """An annotation of the JSON, its position there, and the faults that only the whole file shows.

    fields: the annotation as it is in the JSON.
    """

    position: int
    fields: RawAnnotation
    problems: tuple[faults.Problem, ...] = ()
    fresh_id: int = -1
    """Id to use if the JSON has no integer id."""


@dataclass(frozen=True)
class Reading:
    """How to read records.

    orientation: see `faults.inspect_image`.
    crowds_as_objects: read iscrowd 1 as 0.
    """

    orientation: Orientation = "auto"
    crowds_as_objects: bool = False


DEFAULT_READING = Reading()


@dataclass(frozen=True)
class Entry:
    """An image entry of the JSON with its annotations, in the order of the JSON."""

    image_id: int
    file_name: str
    height: int | None
    """Height and width in the JSON; None if absent."""
    width: int | None
    extra: dict[str, Any]
    annotations: tuple[Annotation, ...]
    panoptic: Panoptic | None = None
    problems: tuple[faults.Problem, ...] = ()
    """Faults that only the whole file or the folder shows."""


def make_record(
    entry: Entry,
    data: bytes | None,
    category_ids: frozenset[int],
    panoptic_png: bytes | None = None,
    reading: Reading = DEFAULT_READING,
) -> tuple[Record, list[Fault]]:
    """Convert an image entry to a record and list its faults. The image is decoded once, to check it.

    Args:
        entry: entry of the COCO file.
        data: the encoded image; None if there is no file.
        category_ids: category ids of the data set.
        panoptic_png: the encoded PNG of `entry.panoptic`; None if there is no file.
        reading: how to read the record.

    Returns:
        The record, and the faults: of the image first, then of the objects in order.
    """
    facts = faults.inspect_image(data, entry.height, entry.width, entry.file_name, reading.orientation)
    of_image = [*_without_explained(facts.faults, entry.problems), *entry.problems]
    reported = [Fault(code, entry.file_name, entry.image_id, None, reason) for code, reason in of_image]
    objects: list[ObjectRow] = []
    for annotation in entry.annotations:
        fields = annotation.fields
        repaired: list[faults.Problem] = []
        item, unread = _object(fields)
        if _may_need_repair(fields, item, reading):
            fields, repaired = repair_annotation(fields, annotation.fresh_id, reading.crowds_as_objects)
            item, unread = _object(fields)
            unread |= {
                key: value
                for key, value in annotation.fields.items()
                if key not in fields or fields.get(key) is not value
            }
        problems = faults.object_faults(fields, item, facts.frame, category_ids) + repaired
        problems += annotation.problems
        item["fault"] = worst([code for code, _ in problems])
        item["extra"] = _json(unread)
        objects.append(item)
        for code, reason in problems:
            if item["id"] is None:
                reason = f"annotations[{annotation.position}]: {reason}"
            reported.append(Fault(code, entry.file_name, entry.image_id, item["id"], reason))
    segments: list[SegmentRow] | None = None
    of_png: list[faults.Problem] = []
    if entry.panoptic is not None:
        segments, of_png, of_segments = inspect_panoptic(
            entry.panoptic, panoptic_png, facts.frame, category_ids
        )
        name = entry.panoptic.file_name
        reported += [Fault(code, name, entry.image_id, None, reason) for code, reason in of_png]
        reported += [
            Fault(code, name, entry.image_id, number, reason) for number, code, reason in of_segments
        ]
    if not objects and not segments:
        reported.append(Fault("no-objects", entry.file_name, entry.image_id, None, "no annotation"))
    if len(objects) > USUAL_QUERIES:
        reported.append(
            Fault("many-objects", entry.file_name, entry.image_id, None, f"{len(objects)} objects")
        )
    record: Record = {
        "image_id": entry.image_id,
        "file_name": entry.file_name,
        "height": facts.height,
        "width": facts.width,
        "image": data,
        "objects": objects,
        "panoptic_image": panoptic_png,
        "segments": segments,
        "fault": worst([code for code, _ in (*of_image, *of_png)]),
        "extra": _json(entry.extra),
        "image_hash": facts.hash,
    }
    return record, reported


def _object(fields: RawAnnotation) -> tuple[ObjectRow, dict[str, object]]:
    """Convert annotation fields to the columns of an object. Also returns the fields that no column can store."""
    box = as_numbers(fields.get("bbox"))
    area = as_numbers([fields.get("area")])
    keypoints = as_numbers(fields.get("keypoints"))
    iscrowd = fields.get("iscrowd")
    iscrowd = int(iscrowd) if isinstance(iscrowd, bool) else as_int(iscrowd)
    item: ObjectRow = {
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


def _may_need_repair(fields: RawAnnotation, item: ObjectRow, reading: Reading) -> bool:
    """Whether an annotation may need repairs. Most do not, and this check is cheaper than `repair_annotation`."""
    box, area, segmentation = item["bbox"], item["area"], item["segmentation"]
    if item["id"] is None or item["category_id"] is None or not box or not any(box):
        return True
    if as_int(fields.get("image_id")) is None or (reading.crowds_as_objects and item["iscrowd"]):
        return True
    if (area is None or not 0 <= area < math.inf) and fields.get("area") is not None:
        return True
    if item["iscrowd"] is None and fields.get("iscrowd") is not None:
        return True
    return fields.get("segmentation") is not None and not is_standard(segmentation)


def _without_explained(
    problems: tuple[faults.Problem, ...], known: tuple[faults.Problem, ...]
) -> tuple[faults.Problem, ...]:
    """Remove "missing-file" if `known` has the same code or "file-outside", which give a more specific reason."""
    explained = {code for code, _ in known} & {"missing-file", "file-outside"}
    return tuple(problem for problem in problems if problem[0] != "missing-file" or not explained)


def _json(value: Mapping[str, object]) -> str | None:
    return json.dumps(value, sort_keys=True, separators=(",", ":")) if value else None
