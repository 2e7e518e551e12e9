"""Training targets with masks: the instances of a record, or all segments of its panoptic image."""

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, TypeGuard

import numpy as np
import numpy.typing as npt

from detr.image_processing.decode import ImageError
from detr.image_processing.panoptic_png import read_panoptic_png
from detr.mask_codec import decode_segmentation
from raydetr.data.fault_codes import FAULTS, is_trained
from raydetr.data.schema import ObjectRow, Record, Segmentation, SegmentRow
from raydetr.data.shards import Target, is_target, target_arrays

MaskKind = Literal["none", "instance", "panoptic", "panoptic-boxes"]
"""Which masks a stream carries. panoptic-boxes: no masks, but the boxes of all panoptic segments."""

MASK_COLUMNS: dict[MaskKind, list[str]] = {
    "none": [],
    "instance": ["objects.list.element.segmentation"],
    "panoptic": ["panoptic_image", "segments"],
    "panoptic-boxes": ["panoptic_image", "segments"],
}
"""Columns that each kind needs in addition to those of `training_targets`."""

UInt8Array = npt.NDArray[np.uint8]


class MaskTarget(Target):
    """An object that is trained on with its mask."""

    segmentation: Segmentation


class SegmentTarget(TypedDict):
    """A panoptic segment that is trained on: ingest has checked its id and category id."""

    id: int
    category_id: int


def mask_targets(
    record: Record, labels: Mapping[int, int], kind: MaskKind
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], UInt8Array]:
    """Select the training targets of a record that have a mask.

    Args:
        record: a row with the columns of `training_targets` and of `MASK_COLUMNS`.
        labels: category id → contiguous label.
        kind: instance: the objects with a mask, without crowds. panoptic, panoptic-boxes: the segments of things and
            stuff, with the boxes of their pixels.

    Returns:
        boxes_xyxy float64 [n, 4] in pixels; labels int64 [n]; masks uint8 [n, height, width], 0 or 1.
    """
    size = record["height"], record["width"]
    if kind in ("panoptic", "panoptic-boxes"):
        return _segments(record, labels, size)
    targets = [item for item in record["objects"] or () if _is_mask_target(item)]
    boxes, class_labels = target_arrays(targets, size, labels)
    masks = np.zeros((len(targets), *size), dtype=np.uint8)
    for mask, item in zip(masks, targets, strict=True):
        mask[:] = decode_mask(item["segmentation"], *size)
    return boxes, class_labels, masks


def _is_mask_target(item: ObjectRow) -> TypeGuard[MaskTarget]:
    fault = item.get("fault")
    is_box_only = fault is not None and FAULTS[fault].effect == "box-only"
    return not is_box_only and has_mask(item["segmentation"]) and is_target(item)


def has_mask(segmentation: Segmentation | None) -> TypeGuard[Segmentation]:
    """Whether the `segmentation` of an object in a record holds a mask: an RLE or at least one polygon."""
    if not segmentation:
        return False
    return segmentation["rle"] is not None or bool(segmentation["polygons"])


def decode_mask(segmentation: Segmentation, height: int, width: int) -> UInt8Array:
    """Decode the mask of an object in a record, see `has_mask`: uint8 [height, width], 0 or 1."""
    original: Any = segmentation["polygons"]
    if (rle := segmentation["rle"]) is not None:
        original = {"size": rle["size"], "counts": rle["runs"] if rle["counts"] is None else rle["counts"]}
    return decode_segmentation(original, height, width, "an object of a record")


def _segments(
    record: Record, labels: Mapping[int, int], size: tuple[int, int]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], UInt8Array]:
    ids = _panoptic_map(record["panoptic_image"], size)
    if ids is None:
        return np.zeros((0, 4)), np.zeros(0, dtype=np.int64), np.zeros((0, *size), dtype=np.uint8)
    segments = [segment for segment in record["segments"] or () if _is_segment_target(segment)]
    masks = np.array([ids == segment["id"] for segment in segments], dtype=np.uint8).reshape(
        len(segments), *size
    )
    boxes = np.zeros((len(segments), 4))
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes, np.array([labels[segment["category_id"]] for segment in segments], dtype=np.int64), masks


def _is_segment_target(item: SegmentRow) -> TypeGuard[SegmentTarget]:
    return is_trained(item["fault"])


def _panoptic_map(png: bytes | None, size: tuple[int, int]) -> npt.NDArray[np.int32] | None:
    """Decode segment ids int32 [height, width]. None without a readable PNG of this size, which ingest has reported."""
    if png is None:
        return None
    try:
        ids = read_panoptic_png(png)
    except ImageError:
        return None
    return ids if ids.shape == size else None
