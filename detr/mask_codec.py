"""Check and convert COCO segmentations. No other module calls the mask functions of pycocotools.

These functions trust their input. If run lengths do not cover the image, pycocotools leaves the rest of the mask
uninitialized. NaN or huge coordinates crash the process. So everything is checked here first.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

Rle = dict[str, Any]
"""COCO's run-length encoding: `{"size": [height, width], "counts": ...}`. Runs go column by column and alternate
between 0 and 1, starting with 0. Counts are compressed (text or bytes) or a list of run lengths."""

Segmentation = list[list[float]] | Rle
"""Checked polygons [x0, y0, x1, y1, ...], or a checked RLE."""

LARGEST_COORDINATE = 1e6
"""Limit for polygon coordinates. pycocotools draws the whole outline with 32-bit integers, so larger coordinates or NaN
crash the process."""

_LONGEST_NUMBER = 12
"""Maximum characters of a number in compressed counts: 60 bits."""


def check_segmentation(segmentation: Any, size: tuple[int, int] | None, where: str) -> Segmentation:
    """Check a segmentation and convert it to a form that mask libraries accept.

    Args:
        segmentation: polygons [x0, y0, x1, y1, ...] as lists, tuples or arrays, a single polygon, or points [n, 2];
            or an RLE, whose counts may also be a tuple or an array. Polygons of fewer than three points cover no
            pixel and are dropped if other polygons remain.
        size: (height, width) of the image that an RLE must cover; None if unknown.
        where: the object for error messages: "image 7: object 0".

    Returns:
        At least one polygon, or an RLE whose counts are ASCII text or a list of run lengths that cover its size.

    Raises:
        ValueError: the form or size is wrong, nothing covers a pixel, coordinates are NaN or beyond
            `LARGEST_COORDINATE`, or run lengths are negative or do not cover the image.
    """
    if isinstance(segmentation, Mapping) and {"size", "counts"} <= segmentation.keys():
        return check_rle(segmentation, size, where)
    if isinstance(segmentation, list | tuple | np.ndarray) and len(segmentation):
        return _check_polygons(segmentation, where)
    raise ValueError(
        f"{where} has the segmentation {str(segmentation)[:100]}: expected a list of polygons of at least 3 points, or "
        "an RLE with size and counts"
    )


def check_rle(rle: Mapping[str, Any], size: tuple[int, int] | None, where: str) -> Rle:
    """Check an RLE; the result has counts that cover its size, as ASCII text or a list: see `check_segmentation`."""
    try:
        height, width = (_integer(side) for side in rle["size"])
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{where} has an RLE of size {str(rle['size'])[:100]}: expected [height, width]"
        ) from error
    if size is not None and (height, width) != tuple(size):
        raise ValueError(
            f"{where} has an RLE of [{height}, {width}], the image is [{size[0]}, {size[1]}] (height, width)"
        )
    counts = rle["counts"]
    try:
        if isinstance(counts, str | bytes):
            packed = counts.encode("ascii") if isinstance(counts, str) else counts
            runs = rle_runs(packed)
        else:
            packed, runs = None, np.array([_integer(run) for run in counts], np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{where} has an RLE whose counts {str(counts)[:60]!r} cannot be read: {error}"
        ) from error
    total = int(runs.sum())
    if (runs < 0).any() or (runs > height * width).any() or total != height * width:
        what = f"the run length {runs.min()}" if (runs < 0).any() else f"run lengths of {total} pixels in all"
        raise ValueError(f"{where} has an RLE with {what}: expected {height} x {width} = {height * width}")
    return {"size": [height, width], "counts": runs.tolist() if packed is None else packed.decode("ascii")}


def encode_segmentation(segmentation: Any, height: int, width: int, where: str) -> Rle:
    """Encode a segmentation of an image as one RLE whose counts are bytes: see `check_segmentation`."""
    checked = check_segmentation(segmentation, (height, width), where)
    if isinstance(checked, list):
        return coco_mask.merge(coco_mask.frPyObjects(checked, height, width))
    if isinstance(checked["counts"], list):
        return coco_mask.frPyObjects(checked, height, width)
    return {"size": checked["size"], "counts": checked["counts"].encode("ascii")}


def decode_segmentation(segmentation: Any, height: int, width: int, where: str) -> np.ndarray:
    """Decode a segmentation of an image into a mask uint8 [height, width], 0 or 1: see `check_segmentation`."""
    return np.asarray(coco_mask.decode(encode_segmentation(segmentation, height, width, where)))


def encode_runs(runs: Sequence[int], height: int, width: int) -> Rle:
    """Encode run lengths that cover an image as an RLE whose counts are text, which `json.dumps` accepts."""
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": list(runs)}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def box_of_rle(rle: Mapping[str, Any], where: str) -> list[float]:
    """Return the bounding box (x, y, width, height) of an RLE's pixels: see `check_rle`."""
    checked = check_rle(rle, None, where)
    height, width = checked["size"]
    return [float(value) for value in coco_mask.toBbox(encode_segmentation(checked, height, width, where))]


def box_iou_xywh(detections: Sequence[Any], ground_truth: Sequence[Any], crowd: Sequence[bool]) -> np.ndarray:
    """Compute the intersection over union of boxes (x, y, width, height), float64 [detections, ground_truth].

    For a crowd it is the share of the detected box that lies in the crowd.
    """
    if not len(detections) or not len(ground_truth):
        return np.zeros((len(detections), len(ground_truth)))
    pairs = [np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (detections, ground_truth)]
    return np.asarray(coco_mask.iou(*pairs, [int(each) for each in crowd]))


def rle_runs(counts: bytes) -> np.ndarray:
    """Decode compressed counts into run lengths, int64.

    They are COCO's variable-length code of differences (maskApi.c, rleFrString). Each character holds 5 bits of a
    number, lowest bits first, and a sixth bit (32) that is set if more characters follow.

    Raises:
        ValueError: the counts end within a number, or hold an invalid character or a number too long for any image.
    """
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not len(digits):
        return digits
    if ((digits < 0) | (digits > 63)).any():
        position = int(np.argmax((digits < 0) | (digits > 63)))
        raise ValueError(f"character {counts[position]} at {position}")
    ends = np.flatnonzero(digits & 32 == 0)  # last digit of each number
    if not len(ends) or ends[-1] != len(digits) - 1:
        raise ValueError("it ends within a number")
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST_NUMBER:
        raise ValueError(f"a number has {lengths.max()} digits")
    shifts = 5 * (np.arange(len(digits)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((digits & 31) << shifts, starts)
    runs -= np.where(digits[ends] & 16, np.int64(1) << 5 * lengths, 0)  # the sign bit
    # From the fourth number on, number i is stored as its difference from number i - 2.
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs


def _check_polygons(segmentation: Sequence[Any] | np.ndarray, where: str) -> list[list[float]]:
    try:
        if all(np.ndim(part) == 0 for part in segmentation):  # one polygon, not a list of them
            segmentation = [segmentation]
        polygons = [np.asarray(polygon, np.float64) for polygon in segmentation]
    except (TypeError, ValueError):
        polygons = []
    if not polygons or not all(
        each.ndim == 1 or (each.ndim == 2 and each.shape[1] == 2) or not each.size for each in polygons
    ):
        raise ValueError(
            f"{where} has the segmentation {str(segmentation)[:100]}: a polygon is a list of numbers x0, y0, x1, y1, ..."
        )
    flat = [polygon.reshape(-1) for polygon in polygons]
    for polygon in flat:
        if len(polygon) % 2:
            raise ValueError(
                f"{where} has a polygon of {len(polygon)} coordinates: x without y, {polygon[:8].tolist()}"
            )
        if not (np.abs(polygon) <= LARGEST_COORDINATE).all():
            raise ValueError(
                f"{where} has a polygon with coordinates that are NaN or beyond {LARGEST_COORDINATE:g}"
            )
    valid = [polygon.tolist() for polygon in flat if len(polygon) >= 6]
    if not valid:
        raise ValueError(
            f"{where} has the segmentation {str(segmentation)[:100]}: expected polygons of at least 3 points"
        )
    return valid


def _integer(value: Any) -> int:
    """Convert to an integer; accepts NumPy integers and floats without a fraction."""
    if isinstance(value, bool | np.bool_) or int(value) != value:
        raise ValueError(f"{value!r} is not an integer")
    return int(value)
