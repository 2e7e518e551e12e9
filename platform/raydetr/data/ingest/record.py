"""One image entry of a COCO file, with its image, as a record of a shard; and an object back as COCO annotation."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raydetr.data.ingest import faults
from raydetr.data.ingest.faults import Orientation, as_int, as_numbers
from raydetr.data.ingest.panoptic import Panoptic, inspect_panoptic
from raydetr.data.ingest.repairs import is_usual, repair_annotation
from raydetr.data.schema import Fault, worst

USUAL_QUERIES = 100
"""Object queries of the published models: more objects in an image cannot all be found."""

_COLUMNS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "keypoints")


@dataclass(frozen=True)
class Annotation:
    """An annotation as the JSON has it, with its position there and the faults that only the whole file shows."""

    position: int
    fields: dict[str, Any]
    problems: tuple[faults.Problem, ...] = ()
    fresh_id: int = -1
    """Its id where the JSON has none that is an integer."""


@dataclass(frozen=True)
class Reading:
    """How records are read.

    orientation: see `faults.inspect_image`.
    crowds_as_objects: read iscrowd 1 as 0.
    """

    orientation: Orientation = "auto"
    crowds_as_objects: bool = False


AS_USUAL = Reading()


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
    problems: tuple[faults.Problem, ...] = ()
    """What only the whole file and the folder show."""


def make_record(
    entry: Entry,
    data: bytes | None,
    category_ids: frozenset[int],
    panoptic_png: bytes | None = None,
    reading: Reading = AS_USUAL,
) -> tuple[dict[str, Any], list[Fault]]:
    """The record of an image entry, and everything that is wrong with it. The image is decoded once, to check it.

    Args:
        entry: of the COCO file.
        data: the encoded image; None where there is no file.
        category_ids: ids of the data set's categories.
        panoptic_png: the encoded PNG of `entry.panoptic`; None where there is no file.
        reading: how.

    Returns:
        A mapping with the columns of `schema.SCHEMA`, and its faults: the image's, then the objects' in order.
    """
    facts = faults.inspect_image(data, entry.height, entry.width, entry.file_name, reading.orientation)
    of_image = [*_more_exact(facts.faults, entry.problems), *entry.problems]
    found = [Fault(code, entry.file_name, entry.image_id, None, reason) for code, reason in of_image]
    objects = []
    for annotation in entry.annotations:
        fields = annotation.fields
        repaired: list[faults.Problem] = []
        item, unread = _object(fields)
        if _is_unusual(fields, item, reading):
            fields, repaired = repair_annotation(fields, annotation.fresh_id, reading.crowds_as_objects)
            item, unread = _object(fields)
            unread |= {
                key: value
                for key, value in annotation.fields.items()
                if key not in fields or fields[key] is not value
            }
        problems = faults.object_faults(fields, item, facts.frame, category_ids) + repaired
        problems += annotation.problems
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
        "fault": worst([code for code, _ in (*of_image, *of_png)]),
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


def _is_unusual(fields: Mapping[str, Any], item: Mapping[str, Any], reading: Reading) -> bool:
    """Whether a look at the form of an annotation is worth its time: most are as COCO's."""
    box, area, segmentation = item["bbox"], item["area"], item["segmentation"]
    if item["id"] is None or item["category_id"] is None or not box or not any(box):
        return True
    if as_int(fields.get("image_id")) is None or (reading.crowds_as_objects and item["iscrowd"]):
        return True
    if (area is None or not 0 <= area < math.inf) and fields.get("area") is not None:
        return True
    if item["iscrowd"] is None and fields.get("iscrowd") is not None:
        return True
    return fields.get("segmentation") is not None and not is_usual(segmentation)


def _more_exact(
    found: tuple[faults.Problem, ...], known: tuple[faults.Problem, ...]
) -> tuple[faults.Problem, ...]:
    """What an image is found to be, without a missing file that is explained by what is known of its name."""
    explained = {code for code, _ in known} & {"missing-file", "file-outside"}
    return tuple(problem for problem in found if problem[0] != "missing-file" or not explained)


def _json(value: Mapping[str, Any]) -> str | None:
    return json.dumps(value, sort_keys=True, separators=(",", ":")) if value else None
