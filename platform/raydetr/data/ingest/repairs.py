"""Repair annotations that deviate from the COCO format but have only one possible meaning.

Each repair is reported as a fault with a `repaired-…` code. Ambiguous values are not changed; `faults` reports them.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from detr.mask_codec import box_of_rle
from raydetr.data.ingest.faults import Problem, as_int, as_numbers, read_segmentation, rle_covers
from raydetr.data.ingest.raw import RawAnnotation
from raydetr.data.schema import Segmentation

_INTEGER = re.compile(r"[+-]?\d{1,19}(\.0*)?")
_BOOLEANS = {"true": 1, "false": 0}
_DEPTH = 4
"""Maximum nesting of lists that are searched for polygons or values."""


def read_int(value: Any) -> int | None:
    """Convert an integer, also one written as text or as the only element of a list; None for anything else."""
    value = _unwrap(value)
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        value = int(value.partition(".")[0])
    return as_int(value)


def repair_annotation(
    fields: RawAnnotation, fresh_id: int, crowds_as_objects: bool = False
) -> tuple[RawAnnotation, list[Problem]]:
    """Convert an annotation to the COCO format as far as its meaning is unambiguous.

    Args:
        fields: the annotation as it is in the JSON.
        fresh_id: id to use if the annotation has no integer id; nothing else refers to it.
        crowds_as_objects: read iscrowd 1 as 0.

    Returns:
        The fields with the repaired values, and the repairs as (code, reason).
    """
    made: Any = dict(fields)
    words = []
    for key, value in _repaired_fields(fields, fresh_id).items():
        words.append(f"{_shown(fields, key)}, read as {value}")
        if value is None:
            made.pop(key, None)
        else:
            made[key] = value
    repairs: list[Problem] = [("repaired-field", ", ".join(words))] if words else []
    crowd = made.get("iscrowd")
    if crowds_as_objects and (crowd is True or as_int(crowd) == 1):
        made["iscrowd"] = 0
        repairs.append(("crowd-as-object", f"iscrowd {json.dumps(crowd)}, read as 0"))
    if (repair := _repair_segmentation(made.get("segmentation"))) is not None:
        value, reason = repair
        repairs.append(("repaired-segmentation", reason))
        if value is None:
            made.pop("segmentation", None)
        else:
            made["segmentation"] = value
    if _is_missing_box(made.get("bbox")) and (box := box_of(read_segmentation(made.get("segmentation")))):
        repairs.append(
            ("repaired-box", f"{_shown(fields, 'bbox')}: the extent of the segmentation, {box}, is used")
        )
        made["bbox"] = box
    return made, repairs


def box_of(segmentation: Segmentation | None) -> list[float] | None:
    """Compute the bounding box [x, y, width, height] of a readable segmentation; None if it has no area."""
    if segmentation is None:
        return None
    if (rle := segmentation["rle"]) is None:
        polygons = segmentation["polygons"] or []
        values = [value for polygon in polygons for value in polygon]
        if (
            not values
            or not all(map(math.isfinite, values))
            or any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons)
        ):
            return None
        xs, ys = [x for p in polygons for x in p[::2]], [y for p in polygons for y in p[1::2]]
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    else:
        counts = rle["runs"] if rle["counts"] is None else rle["counts"]
        try:
            box = box_of_rle({"size": rle["size"], "counts": counts}, "a mask")
        except ValueError:
            return None
    return box if min(box[2:]) > 0 else None


def _repaired_fields(fields: Mapping[str, Any], fresh_id: int) -> dict[str, Any]:
    """Return the new values of fields in a nonstandard form, without the segmentation. None: remove the field."""
    changed: dict[str, Any] = {}
    if as_int(fields.get("id")) is None:
        given = read_int(fields.get("id"))
        changed["id"] = fresh_id if given is None else given
    for key in ("image_id", "category_id"):
        if as_int(fields.get(key)) is None and (number := read_int(fields.get(key))) is not None:
            changed[key] = number
    crowd = fields.get("iscrowd")
    if crowd is not None and not isinstance(crowd, bool) and as_int(crowd) is None:
        crowd = _unwrap(crowd)
        value = _BOOLEANS.get(crowd.lower()) if isinstance(crowd, str) else crowd
        value = read_int(crowd) if value is None else int(value) if isinstance(value, bool) else as_int(value)
        if value in (0, 1):
            changed["iscrowd"] = value
    if fields.get("bbox") is not None and as_numbers(fields["bbox"]) is None:
        box = _numbers(_unwrap(fields["bbox"]))
        if box is not None and len(box) == 4:
            changed["bbox"] = box
    area = fields.get("area")
    if area is not None:
        read = as_numbers([area]) or _numbers([_unwrap(area)])
        if read is not None and (not math.isfinite(read[0]) or read[0] < 0):
            changed["area"] = None  # evaluation then uses the area of the box
        elif read is not None and as_numbers([area]) is None:
            changed["area"] = read[0]
    return changed


def _shown(fields: Mapping[str, Any], key: str) -> str:
    return f"{key} {fields[key]!r:.80}" if key in fields else f"no {key}"


def _unwrap(value: Any) -> Any:
    """Unwrap a value: a one-element list to its element, JSON text to its list or object, text to stripped text.

    Repeated up to `_DEPTH` times. Any other value is returned unchanged.
    """
    for _ in range(_DEPTH):
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        elif isinstance(value, str):
            value = value.strip()
            if not value.startswith(("[", "{")):
                break
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                break
        else:
            break
    return value


def _numbers(value: Any) -> list[float] | None:
    """Convert a list of numbers, also written as texts, to floats; None for anything else."""
    if not isinstance(value, list):
        return None
    try:
        return as_numbers([float(x) if isinstance(x, str) else x for x in value])
    except ValueError:
        return None


def _is_missing_box(box: Any) -> bool:
    return box is None or box == [] or (isinstance(box, list) and len(box) == 4 and not any(box))


def _repair_segmentation(value: Any) -> tuple[Any, str] | None:
    """Convert a segmentation to the COCO format.

    Returns:
        The segmentation (None: it is empty) and the reason; None instead of both if there is nothing to repair or the
        value cannot be repaired.
    """
    if value is None or is_standard(read_segmentation(value)):
        return None
    read = _unwrap(value) if isinstance(value, str) else value
    if read in ({}, "", []):
        return None, f"segmentation {value!r:.20} is empty"
    if isinstance(read, list) and len(read) == 1 and isinstance(read[0], dict):
        read = read[0]
    if isinstance(read, dict):
        rle = _rle(read)
        return None if rle is None else (rle, f"an RLE written as {value!r:.80}")
    polygons = _polygons(read, _DEPTH)
    if polygons is None:
        return None
    polygons = [polygon for polygon in polygons if polygon]
    if not polygons:
        return None, f"segmentation {value!r:.20} is empty"
    # Drop points and lines next to polygons: they enclose no area.
    polygons = [polygon for polygon in polygons if len(polygon) not in (2, 4)]
    if not polygons or any(len(polygon) % 2 or not all(map(math.isfinite, polygon)) for polygon in polygons):
        return None
    return polygons, f"polygons written as {value!r:.80}"


def is_standard(read: Segmentation | None) -> bool:
    """Whether a result of `read_segmentation` is in a COCO format and has no polygon of fewer than 3 points."""
    if read is None:
        return False
    if (rle := read["rle"]) is None:
        return all(len(polygon) >= 6 for polygon in read["polygons"] or ())
    return not (rle["counts"] or b"").startswith((b"b'", b'b"'))


def _rle(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Convert an RLE with extra keys or numbers in a nonstandard form; None if it does not cover its size."""
    size = _numbers(fields.get("size"))
    counts = fields.get("counts")
    if size is None or len(size) != 2 or not all(value.is_integer() for value in size):
        return None
    if isinstance(counts, list):
        runs = _numbers(counts)
        if runs is None or not all(value.is_integer() for value in runs):
            return None
        counts = [int(value) for value in runs]
    elif isinstance(counts, str) and re.fullmatch(r"b(['\"]).*\1", counts, re.DOTALL):
        # The printed form of Python bytes, such as b'…'. An RLE never contains quotation marks.
        counts = counts[2:-1].replace("\\\\", "\\")
    made = {"size": [int(value) for value in size], "counts": counts}
    read = read_segmentation(made)
    return made if read is not None and (rle := read["rle"]) and rle_covers(rle) else None


def _polygons(value: Any, depth: int) -> list[list[float]] | None:
    """Collect the polygons in nested lists, as flat coordinates or as points [x, y]; None for anything else."""
    if not isinstance(value, list) or not depth:
        return None
    if (flat := _numbers(value)) is not None:
        return [flat]
    points = [_numbers(each) for each in value]
    if len(points) >= 3 and all(point is not None and len(point) == 2 for point in points):
        return [[coordinate for point in points if point for coordinate in point]]
    polygons = []
    for each in value:
        if (inner := _polygons(each, depth - 1)) is None:
            return None
        polygons += inner
    return polygons
