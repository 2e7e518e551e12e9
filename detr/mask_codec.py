"""COCO's forms of a segmentation, checked and converted: the one place that calls pycocotools' mask functions.

They trust their input. Of run lengths that do not cover the image, pycocotools leaves the rest of the mask as the
memory was; coordinates that are NaN or huge end the process. So everything is checked here before they see it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

Rle = dict[str, Any]
"""COCO's run-length encoding: `{"size": [height, width], "counts": ...}`. Run lengths are counted column by column,
off and on in turn, the first off. Counts are compressed (text or bytes) or a list of run lengths."""

Segmentation = list[list[float]] | Rle
"""Polygons [x0, y0, x1, y1, ...] or an RLE, checked."""

LARGEST_COORDINATE = 1e6
"""Of a polygon. pycocotools draws all of its outline, in 32 bits: of larger ones, or NaN, the process dies."""

_LONGEST_NUMBER = 12
"""Characters of a number in compressed counts: 60 bits."""


def check_segmentation(segmentation: Any, size: tuple[int, int] | None, where: str) -> Segmentation:
    """Bring a segmentation into a form that mask libraries take, or refuse it.

    Args:
        segmentation: polygons [x0, y0, x1, y1, ...] as lists, tuples or arrays, also one alone or as points [n, 2];
            or an RLE, whose counts may be a tuple or an array, too. Polygons of fewer than three points cover no
            pixel: they are left out next to others.
        size: (height, width) of the image that an RLE has to cover; None where it is not known.
        where: what has it, for messages: "image 7: object 0".

    Returns:
        at least one polygon, or an RLE whose counts are ASCII text or a list of run lengths that cover its size.

    Raises:
        ValueError: another form or size, nothing that covers a pixel, coordinates that are NaN or beyond
            `LARGEST_COORDINATE`, or run lengths that are negative or do not cover the image.
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
    """An RLE whose counts, ASCII text or a list of run lengths, cover its size: see `check_segmentation`."""
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
    """A segmentation of an image as one RLE whose counts are bytes: see `check_segmentation`."""
    checked = check_segmentation(segmentation, (height, width), where)
    if isinstance(checked, list):
        return coco_mask.merge(coco_mask.frPyObjects(checked, height, width))
    if isinstance(checked["counts"], list):
        return coco_mask.frPyObjects(checked, height, width)
    return {"size": checked["size"], "counts": checked["counts"].encode("ascii")}


def decode_segmentation(segmentation: Any, height: int, width: int, where: str) -> np.ndarray:
    """A segmentation of an image as a mask uint8 [height, width], 0 or 1: see `check_segmentation`."""
    return np.asarray(coco_mask.decode(encode_segmentation(segmentation, height, width, where)))


def encode_runs(runs: Sequence[int], height: int, width: int) -> Rle:
    """Run lengths that cover an image as an RLE whose counts are text, which `json.dumps` accepts."""
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": list(runs)}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def box_of_rle(rle: Mapping[str, Any], where: str) -> list[float]:
    """The box (x, y, width, height) of the pixels of an RLE: see `check_rle`."""
    checked = check_rle(rle, None, where)
    height, width = checked["size"]
    return [float(value) for value in coco_mask.toBbox(encode_segmentation(checked, height, width, where))]


def box_iou_xywh(found: Sequence[Any], truth: Sequence[Any], crowd: Sequence[bool]) -> np.ndarray:
    """Intersection over union of boxes (x, y, width, height), float64 [found, truth]; with a crowd, it is the share
    of the found box that lies in it."""
    if not len(found) or not len(truth):
        return np.zeros((len(found), len(truth)))
    pairs = [np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (found, truth)]
    return np.asarray(coco_mask.iou(*pairs, [int(each) for each in crowd]))


def rle_runs(counts: bytes) -> np.ndarray:
    """The run lengths of compressed counts, int64: COCO's variable-length code of differences (maskApi.c, rleFrString).

    Raises:
        ValueError: they do not end on a whole number, hold a character outside of the code, or a number that no
            image needs.
    """
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not len(digits):
        return digits
    if ((digits < 0) | (digits > 63)).any():
        position = int(np.argmax((digits < 0) | (digits > 63)))
        raise ValueError(f"character {counts[position]} at {position}")
    ends = np.flatnonzero(digits & 32 == 0)  # of a number: no more digits follow
    if not len(ends) or ends[-1] != len(digits) - 1:
        raise ValueError("it ends within a number")
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST_NUMBER:
        raise ValueError(f"a number has {lengths.max()} digits")
    shifts = 5 * (np.arange(len(digits)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((digits & 31) << shifts, starts)
    runs -= np.where(digits[ends] & 16, np.int64(1) << 5 * lengths, 0)  # the sign
    # from the fourth on, a number is the difference from the one before the last
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
    kept = [polygon.tolist() for polygon in flat if len(polygon) >= 6]
    if not kept:
        raise ValueError(
            f"{where} has the segmentation {str(segmentation)[:100]}: expected polygons of at least 3 points"
        )
    return kept


def _integer(value: Any) -> int:
    """An integer, also of NumPy or as a float without a fraction."""
    if isinstance(value, bool | np.bool_) or int(value) != value:
        raise ValueError(f"{value!r} is not an integer")
    return int(value)
