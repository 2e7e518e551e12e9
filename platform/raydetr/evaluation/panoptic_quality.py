"""Panoptic quality of predictions, from what is kept of each image: four numbers for each of its classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from detr.image_processing.panoptic_png import read_panoptic_colors
from detr.image_transforms import rgb_to_id
from detr.metrics.panoptic_matching import VOID, match_segments, mean_quality, quality
from raydetr.errors import DataError

NAMES = ("PQ", "SQ", "RQ")
PanopticTruth = Mapping[int, tuple[bytes, Sequence[Mapping[str, Any]]]]
"""Image id → PNG whose colours encode segment ids as COCO does, and `segments_info`."""
_NEEDED = ("id", "category_id", "area")


@dataclass(frozen=True)
class PanopticCounts:
    """Matches of predicted segments with the true ones.

    categories: COCO entries, ascending by id.
    image_ids: int64 [n], ascending: the images whose truth has a panoptic map that can be read.
    counts: float64 [n, categories, 4]: sum of the matches' IoU, matches, false segments, missed segments.
    left_out: image id → why its truth cannot be used.
    """

    categories: tuple[Mapping[str, Any], ...]
    image_ids: np.ndarray
    counts: np.ndarray
    left_out: dict[int, str] = field(default_factory=dict)


def count_segments(
    truth: PanopticTruth, predictions: pa.Table, categories: Sequence[Mapping[str, Any]]
) -> PanopticCounts:
    """Match the predicted segments of each image with the true ones.

    Segments of an image without a prediction are missed. Predicted segments of a category that the data set does not
    have are void, as are true segments at fault (without an id, a category or an area).

    Args:
        truth: of the images that have a panoptic map.
        predictions: `image_id`, `panoptic` and `segments` of `PREDICTION_SCHEMA`.
        categories: of the data set.

    Raises:
        DataError: a predicted map has another size than the true one, or other ids than its segments.
    """
    columns = predictions.select(["image_id", "panoptic", "segments"])
    found = {}
    for batch in columns.to_batches(max_chunksize=256):
        for row in batch.to_pylist():
            if row["panoptic"] is not None and row["image_id"] in truth:
                segments = {item["id"]: item["category_id"] for item in row["segments"] or ()}
                found[row["image_id"]] = row["panoptic"], segments
    return count_maps(truth, found, categories)


def count_maps(
    truth: PanopticTruth,
    found: Mapping[int, tuple[bytes | np.ndarray, Mapping[int, int]]],
    categories: Sequence[Mapping[str, Any]],
) -> PanopticCounts:
    """`count_segments` of predictions in memory.

    Args:
        truth: of the images that have a panoptic map.
        found: image id → the predicted map, a PNG or int [H, W] where 0 is void, and its segments' categories.
        categories: of the data set.
    """
    order = tuple(sorted(categories, key=lambda category: int(category["id"])))
    position = {int(category["id"]): index for index, category in enumerate(order)}
    image_ids, counts, left_out = [], [], {}
    for image_id in sorted(truth):
        png, segments = truth[image_id]
        try:
            true_map = read_panoptic_colors(png)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
            left_out[image_id] = f"the PNG of its segments cannot be read ({error})"
            continue
        true_segments = [
            item
            for item in segments
            if item["category_id"] in position and all(item.get(name) is not None for name in _NEEDED)
        ]
        found_map, found_segments = found.get(image_id, (np.zeros_like(true_map), {}))
        if isinstance(found_map, bytes):
            found_map = read_panoptic_colors(found_map)
        if found_map.shape[:2] != true_map.shape[:2]:
            left_out[image_id] = (
                f"the PNG of its segments is {true_map.shape[:2]} (height, width), the image {found_map.shape[:2]}"
            )
            continue
        image_ids.append(image_id)
        counts.append(np.zeros((len(order), 4)))
        of_image = _match(true_map, true_segments, found_map, found_segments, position, image_id)
        for category_id, values in of_image.items():
            counts[-1][position[category_id]] += values
    stacked = np.stack(counts) if counts else np.zeros((0, len(order), 4))
    return PanopticCounts(order, np.array(image_ids, np.int64), stacked, left_out)


def _match(
    true_map: np.ndarray,
    true_segments: Sequence[Mapping[str, Any]],
    found_map: np.ndarray,
    categories: Mapping[int, int],
    known: Mapping[int, int],
    image_id: int,
) -> dict[int, np.ndarray]:
    unknown = [segment for segment, category in categories.items() if category not in known]
    if unknown:
        found_map = rgb_to_id(found_map) if found_map.ndim == 3 else found_map
        found_map = np.where(np.isin(found_map, unknown), VOID, found_map)
    segments = {segment: category for segment, category in categories.items() if category in known}
    try:
        return match_segments(true_map, true_segments, found_map, segments, f"image {image_id}")
    except ValueError as error:
        raise DataError(f"{error}: delete the predictions and evaluate again.") from error


def panoptic_figures(counts: PanopticCounts) -> dict[str, float]:
    """PQ, SQ and RQ of all categories, `…_things` and `…_stuff`, in 0..1; -1 where there are no segments of the kind.

    Means over the categories of which the truth or a prediction has segments.
    """
    totals = counts.counts.sum(axis=0)
    things = np.array([bool(category.get("isthing", 1)) for category in counts.categories], bool)
    figures: dict[str, float] = {}
    for suffix, rows in (("", np.ones(len(things), bool)), ("_things", things), ("_stuff", ~things)):
        mean = mean_quality(list(totals[rows]))
        figures |= {f"{name}{suffix}": mean[name.lower()] if mean["n"] else -1.0 for name in NAMES}
    return {name: float(value) for name, value in figures.items()}


def class_qualities(counts: PanopticCounts) -> dict[int, dict[str, float]]:
    """Category id → PQ, SQ and RQ, -1 where neither truth nor predictions have segments of the category."""
    result = {}
    for category, values in zip(counts.categories, counts.counts.sum(axis=0), strict=True):
        of_class = quality(values) if values[1:].sum() else dict.fromkeys(("pq", "sq", "rq"), -1.0)
        result[int(category["id"])] = {name: float(of_class[name.lower()]) for name in NAMES}
    return result


def resampled_quality(counts: PanopticCounts, weights: np.ndarray) -> np.ndarray:
    """PQ of each category in resamples of the images.

    Args:
        counts: of n images.
        weights: [resamples, n], how often an image counts.

    Returns:
        float64 [resamples, categories]; NaN where a resample has no segments of the category.
    """
    flat = counts.counts.reshape(len(counts.image_ids), -1)
    iou, matched, false, missed = np.moveaxis(
        (weights.astype(np.float64) @ flat).reshape(len(weights), -1, 4), 2, 0
    )
    segments = matched + (false + missed) / 2
    return np.where(segments > 0, iou / np.where(segments > 0, segments, 1), np.nan)


def mean_of_classes(quality_of_classes: np.ndarray) -> np.ndarray:
    """PQ of all categories, float64 [...], of `resampled_quality`'s [..., categories]; NaN where there are no segments."""
    present = ~np.isnan(quality_of_classes)
    number = present.sum(axis=-1)
    total = np.where(present, quality_of_classes, 0).sum(axis=-1)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
