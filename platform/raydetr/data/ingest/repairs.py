"""Annotations whose meaning is plain although their form is not COCO's: read as the annotator saw them.

Only what has exactly one reading is changed, and each change is a fault with a `repaired-…` code. What could mean two
things stays as it is, for `faults` to report.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from detr.mask_codec import box_of_rle
from raydetr.data.ingest.faults import Problem, as_int, as_numbers, read_segmentation, rle_covers

_INTEGER = re.compile(r"[+-]?\d{1,19}(\.0*)?")
_BOOLEANS = {"true": 1, "false": 0}
_DEPTH = 4
"""Lists of lists that are looked into for polygons."""


def read_int(value: Any) -> int | None:
    """An integer, also as text or as the only element of a list; None for anything else."""
    value = _plain(value)
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        value = int(value.partition(".")[0])
    return as_int(value)


def repair_annotation(
    fields: Mapping[str, Any], fresh_id: int, crowds_as_objects: bool = False
) -> tuple[dict[str, Any], list[Problem]]:
    """An annotation in COCO's form, as far as its meaning is plain.

    Args:
        fields: the annotation as the JSON has it.
        fresh_id: id of an annotation that has none that is an integer: nothing refers to it.
        crowds_as_objects: read iscrowd 1 as 0.

    Returns:
        The fields, those that were changed replaced; what was changed, as (code, reason).
    """
    made = dict(fields)
    words = []
    for key, value in _plain_fields(fields, fresh_id).items():
        words.append(f"{_shown(fields, key)}, read as {value}")
        if value is None:
            made.pop(key, None)
        else:
            made[key] = value
    found: list[Problem] = [("repaired-field", ", ".join(words))] if words else []
    crowd = made.get("iscrowd")
    if crowds_as_objects and (crowd is True or as_int(crowd) == 1):
        made["iscrowd"] = 0
        found.append(("crowd-as-object", f"iscrowd {json.dumps(crowd)}, read as 0"))
    if (form := _segmentation(made.get("segmentation"))) is not None:
        value, what = form
        found.append(("repaired-segmentation", what))
        if value is None:
            made.pop("segmentation", None)
        else:
            made["segmentation"] = value
    if _has_no_box(made.get("bbox")) and (box := box_of(read_segmentation(made.get("segmentation")))):
        found.append(
            ("repaired-box", f"{_shown(fields, 'bbox')}: the segmentation spans {box}, which is used")
        )
        made["bbox"] = box
    return made, found


def box_of(segmentation: Mapping[str, Any] | None) -> list[float] | None:
    """The box [x, y, width, height] that a readable segmentation spans; None where it has no extent."""
    if segmentation is None:
        return None
    if (polygons := segmentation["polygons"]) is not None:
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
        rle = segmentation["rle"]
        counts = rle["runs"] if rle["counts"] is None else rle["counts"]
        try:
            box = box_of_rle({"size": rle["size"], "counts": counts}, "a mask")
        except ValueError:
            return None
    return box if min(box[2:]) > 0 else None


def _plain_fields(fields: Mapping[str, Any], fresh_id: int) -> dict[str, Any]:
    """The fields that training or evaluation uses and that are written in another form, with their values."""
    changed: dict[str, Any] = {}
    if as_int(fields.get("id")) is None:
        given = read_int(fields.get("id"))
        changed["id"] = fresh_id if given is None else given
    for key in ("image_id", "category_id"):
        if as_int(fields.get(key)) is None and (number := read_int(fields.get(key))) is not None:
            changed[key] = number
    crowd = fields.get("iscrowd")
    if crowd is not None and not isinstance(crowd, bool) and as_int(crowd) is None:
        crowd = _plain(crowd)
        value = _BOOLEANS.get(crowd.lower()) if isinstance(crowd, str) else crowd
        value = read_int(crowd) if value is None else int(value) if isinstance(value, bool) else as_int(value)
        if value in (0, 1):
            changed["iscrowd"] = value
    if fields.get("bbox") is not None and as_numbers(fields["bbox"]) is None:
        box = _numbers(_plain(fields["bbox"]))
        if box is not None and len(box) == 4:
            changed["bbox"] = box
    area = fields.get("area")
    if area is not None:
        read = as_numbers([area]) or _numbers([_plain(area)])
        if read is not None and (not math.isfinite(read[0]) or read[0] < 0):
            changed["area"] = None  # evaluation takes the box's
        elif read is not None and as_numbers([area]) is None:
            changed["area"] = read[0]
    return changed


def _shown(fields: Mapping[str, Any], key: str) -> str:
    return f"{key} {fields[key]!r:.80}" if key in fields else f"no {key}"


def _plain(value: Any) -> Any:
    """The only element of a list, the list that a text holds, a text without blanks around it; anything else as it is."""
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
    """Numbers, also as texts; None for anything else."""
    if not isinstance(value, list):
        return None
    try:
        return as_numbers([float(x) if isinstance(x, str) else x for x in value])
    except ValueError:
        return None


def _has_no_box(box: Any) -> bool:
    return box is None or box == [] or (isinstance(box, list) and len(box) == 4 and not any(box))


def _segmentation(value: Any) -> tuple[Any, str] | None:
    """A segmentation in COCO's form (None: there is none) and what was changed; None where nothing is to be changed."""
    if value is None or is_usual(read_segmentation(value)):
        return None
    read = _plain(value) if isinstance(value, str) else value
    if read in ({}, "", []):
        return None, f"segmentation {value!r:.20}: there is none"
    if isinstance(read, list) and len(read) == 1 and isinstance(read[0], dict):
        read = read[0]
    if isinstance(read, dict):
        rle = _rle(read)
        return None if rle is None else (rle, f"an RLE written as {value!r:.80}")
    polygons = _polygons(read, _DEPTH)
    if polygons is None:
        return None
    kept = [polygon for polygon in polygons if polygon]
    if not kept:
        return None, f"segmentation {value!r:.20}: there is none"
    # Points and lines next to polygons enclose nothing.
    kept = [polygon for polygon in kept if len(polygon) not in (2, 4)]
    if not kept or any(len(polygon) % 2 or not all(map(math.isfinite, polygon)) for polygon in kept):
        return None
    return kept, f"polygons written as {value!r:.80}"


def is_usual(read: Mapping[str, Any] | None) -> bool:
    """Whether what `read_segmentation` gives is one of COCO's forms, without polygons that enclose nothing."""
    if read is None:
        return False
    if read["polygons"] is not None:
        return all(len(polygon) >= 6 for polygon in read["polygons"])
    return not (read["rle"]["counts"] or b"").startswith((b"b'", b'b"'))


def _rle(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """An RLE with further keys, or numbers in another form; None where it does not cover its size."""
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
        # Python's bytes, printed: no RLE has quotation marks.
        counts = counts[2:-1].replace("\\\\", "\\")
    made = {"size": [int(value) for value in size], "counts": counts}
    read = read_segmentation(made)
    return made if read is not None and rle_covers(read["rle"]) else None


def _polygons(value: Any, depth: int) -> list[list[float]] | None:
    """All polygons in lists of lists: coordinates in a row, or points [x, y]; None for anything else."""
    if not isinstance(value, list) or not depth:
        return None
    if (flat := _numbers(value)) is not None:
        return [flat]
    points = [_numbers(each) for each in value]
    if len(points) >= 3 and all(point is not None and len(point) == 2 for point in points):
        return [[coordinate for point in points if point for coordinate in point]]
    found = []
    for each in value:
        if (inner := _polygons(each, depth - 1)) is None:
            return None
        found += inner
    return found
