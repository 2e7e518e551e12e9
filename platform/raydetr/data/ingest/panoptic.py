"""Check the COCO panoptic annotation of an image against its PNG."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from detr.image_processing.decode import ImageError
from detr.image_processing.panoptic_png import read_panoptic_png
from raydetr.data.fault_codes import worst
from raydetr.data.ingest.faults import Problem, as_int, as_numbers
from raydetr.data.ingest.raw import RawAnnotation
from raydetr.data.schema import SegmentRow

BOX_TOLERANCE = 1.0
"""Maximum difference in pixels between a segment's box and the extent of its pixels that is not reported."""


@dataclass(frozen=True)
class Panoptic:
    """The annotation of an image in a panoptic JSON.

    position: position in `annotations`.
    file_name: name of the PNG, relative to the folder of panoptic masks.
    segments: `segments_info` without segments of dropped classes.
    dropped: ids of the segments of dropped classes, which are still in the PNG.
    """

    position: int
    file_name: str
    segments: tuple[RawAnnotation, ...]
    dropped: frozenset[int] = frozenset()


def inspect_panoptic(
    panoptic: Panoptic, png: bytes | None, frame: tuple[int, int] | None, category_ids: frozenset[int]
) -> tuple[list[SegmentRow], list[Problem], list[tuple[int | None, str, str]]]:
    """Convert the segments of an image to column values, and check them.

    Args:
        panoptic: the annotation.
        png: the encoded PNG of segment ids; None if there is no file.
        frame: (height, width) of the image; None if unknown.
        category_ids: category ids of the data set.

    Returns:
        The elements of the column `segments`; faults of the PNG; faults of segments as (segment id, code, reason).
    """
    rows: list[SegmentRow] = []
    of_segments: list[tuple[int | None, str, str]] = []
    ids, problem = _decode(png, frame)
    of_png = [] if problem is None else [problem]
    pixels = {} if ids is None else _measure(ids)
    seen: set[int] = set()
    for number, fields in enumerate(panoptic.segments):
        box, area = as_numbers(fields.get("bbox")), as_numbers([fields.get("area")])
        row: SegmentRow = {
            "id": as_int(fields.get("id")),
            "category_id": as_int(fields.get("category_id")),
            "area": None if area is None else area[0],
            "bbox": box if box is not None and len(box) == 4 else None,
            "iscrowd": as_int(fields.get("iscrowd", 0)),
        }
        problems = _segment_problems(row, number, seen, pixels if ids is not None else None, category_ids)
        row["fault"] = worst([code for code, _ in problems])
        rows.append(row)
        of_segments += [(row["id"], code, reason) for code, reason in problems]
    if unlabeled := sorted(set(pixels) - seen - panoptic.dropped):
        of_png.append(("unlabelled-segment", f"ids in the PNG that segments_info lacks: {unlabeled[:5]}"))
    return rows, of_png, of_segments


def _segment_problems(
    row: SegmentRow,
    number: int,
    seen: set[int],
    pixels: Mapping[int, tuple[int, tuple[int, int, int, int]]] | None,
    category_ids: frozenset[int],
) -> list[Problem]:
    where = f"segments_info[{number}]"
    if row["id"] is None or row["category_id"] is None:
        return [("malformed-segment", f"{where}: id {row['id']}, category_id {row['category_id']}")]
    problems: list[Problem] = []
    if row["id"] in seen:
        problems.append(("duplicate-segment-id", f"{where}: id {row['id']} is repeated"))
    seen.add(row["id"])
    if row["category_id"] not in category_ids:
        problems.append(("unknown-segment-category", f"{where}: category_id {row['category_id']}"))
    if pixels is None:
        return problems
    if row["id"] not in pixels:
        return [*problems, ("segment-not-in-png", f"{where}: no pixel of the PNG has id {row['id']}")]
    area, box = pixels[row["id"]]
    if row["area"] is not None and row["area"] != area:
        problems.append(("segment-area", f"{where}: area {row['area']:g}, but {area} pixels"))
    if row["bbox"] is not None and max(abs(a - b) for a, b in zip(row["bbox"], box)) > BOX_TOLERANCE:
        problems.append(("segment-box", f"{where}: bbox {row['bbox']}, but its pixels span {list(box)}"))
    return problems


def _decode(
    png: bytes | None, frame: tuple[int, int] | None
) -> tuple[npt.NDArray[np.int64] | None, Problem | None]:
    if png is None:
        return None, ("missing-panoptic", "no such file")
    try:
        ids = read_panoptic_png(png).astype(np.int64)
    except ImageError as error:
        return None, ("unreadable-panoptic", f"not a readable PNG: {error}")
    if frame is not None and ids.shape != frame:
        return ids, (
            "panoptic-size",
            f"the PNG is {ids.shape[0]} x {ids.shape[1]}, the image {frame[0]} x {frame[1]}",
        )
    return ids, None


def _measure(ids: npt.NDArray[np.int64]) -> dict[int, tuple[int, tuple[int, int, int, int]]]:
    """Return segment id → (number of pixels, (x, y, width, height)), without id 0, the unlabeled pixels."""
    values, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    slices = ndimage.find_objects(inverse.reshape(ids.shape).astype(np.int32) + 1)
    return {
        int(value): (int(count), (x.start, y.start, x.stop - x.start, y.stop - y.start))
        for value, count, (y, x) in zip(values, counts, slices, strict=True)
        if value != 0
    }
