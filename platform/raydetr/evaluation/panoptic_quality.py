"""Panoptic quality of predictions, computed from four numbers per image and class."""

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
PanopticGroundTruth = Mapping[int, tuple[bytes, Sequence[Mapping[str, Any]]]]
"""Image id → PNG whose colors encode segment ids as COCO does, and `segments_info`."""
_REQUIRED_FIELDS = ("id", "category_id", "area")


@dataclass(frozen=True)
class PanopticCounts:
    """Match counts of predicted segments with ground-truth segments.

    categories: COCO entries, ascending by id.
    image_ids: int64 [n], ascending; the images whose ground truth has a readable panoptic map.
    counts: float64 [n, categories, 4]; sum of the IoU of matches, matches, false positives, missed segments.
    skipped: image id → why its ground truth cannot be used.
    """

    categories: tuple[Mapping[str, Any], ...]
    image_ids: np.ndarray
    counts: np.ndarray
    skipped: dict[int, str] = field(default_factory=dict)


def count_segments(
    ground_truth: PanopticGroundTruth, predictions: pa.Table, categories: Sequence[Mapping[str, Any]]
) -> PanopticCounts:
    """Match the predicted segments of each image with the ground-truth segments.

    Segments of an image without a prediction are missed. Predicted segments of unknown categories are void, as are
    ground-truth segments without an id, a category or an area.

    Args:
        ground_truth: ground truth of the images that have a panoptic map.
        predictions: `image_id`, `panoptic` and `segments` of `PREDICTION_SCHEMA`.
        categories: categories of the data set.

    Raises:
        DataError: a predicted map has ids that its segments do not have.
    """
    columns = predictions.select(["image_id", "panoptic", "segments"])
    predicted = {}
    for batch in columns.to_batches(max_chunksize=256):
        for row in batch.to_pylist():
            if row["panoptic"] is not None and row["image_id"] in ground_truth:
                segments = {item["id"]: item["category_id"] for item in row["segments"] or ()}
                predicted[row["image_id"]] = row["panoptic"], segments
    return count_maps(ground_truth, predicted, categories)


def count_maps(
    ground_truth: PanopticGroundTruth,
    predicted: Mapping[int, tuple[bytes | np.ndarray, Mapping[int, int]]],
    categories: Sequence[Mapping[str, Any]],
) -> PanopticCounts:
    """Do the same as `count_segments` for predictions in memory.

    Args:
        ground_truth: ground truth of the images that have a panoptic map.
        predicted: image id → predicted map and segment id → category id. The map is a PNG or int [height, width], with
            0 for void.
        categories: categories of the data set.
    """
    order = tuple(sorted(categories, key=lambda category: int(category["id"])))
    position = {int(category["id"]): index for index, category in enumerate(order)}
    image_ids, counts, skipped = [], [], {}
    for image_id in sorted(ground_truth):
        png, segments = ground_truth[image_id]
        try:
            true_map = read_panoptic_colors(png)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
            skipped[image_id] = f"the PNG of its segments cannot be read ({error})"
            continue
        true_segments = [
            item
            for item in segments
            if item["category_id"] in position
            and all(item.get(name) is not None for name in _REQUIRED_FIELDS)
        ]
        predicted_map, predicted_segments = predicted.get(image_id, (np.zeros_like(true_map), {}))
        if isinstance(predicted_map, bytes):
            predicted_map = read_panoptic_colors(predicted_map)
        if predicted_map.shape[:2] != true_map.shape[:2]:
            skipped[image_id] = (
                f"the PNG of its segments is {true_map.shape[:2]} (height, width), the image {predicted_map.shape[:2]}"
            )
            continue
        image_ids.append(image_id)
        counts.append(np.zeros((len(order), 4)))
        image_counts = _match(true_map, true_segments, predicted_map, predicted_segments, position, image_id)
        for category_id, values in image_counts.items():
            counts[-1][position[category_id]] += values
    stacked = np.stack(counts) if counts else np.zeros((0, len(order), 4))
    return PanopticCounts(order, np.array(image_ids, np.int64), stacked, skipped)


def _match(
    true_map: np.ndarray,
    true_segments: Sequence[Mapping[str, Any]],
    predicted_map: np.ndarray,
    categories: Mapping[int, int],
    known: Mapping[int, int],
    image_id: int,
) -> dict[int, np.ndarray]:
    """Match the segments of one image, with predicted segments of unknown categories turned into void."""
    unknown = [segment for segment, category in categories.items() if category not in known]
    if unknown:
        predicted_map = rgb_to_id(predicted_map) if predicted_map.ndim == 3 else predicted_map
        predicted_map = np.where(np.isin(predicted_map, unknown), VOID, predicted_map)
    segments = {segment: category for segment, category in categories.items() if category in known}
    try:
        return match_segments(true_map, true_segments, predicted_map, segments, f"image {image_id}")
    except ValueError as error:
        raise DataError(f"{error}: delete the predictions and evaluate again.") from error


def panoptic_metrics(counts: PanopticCounts) -> dict[str, float]:
    """Compute PQ, SQ and RQ of all categories, of things (`…_things`) and of stuff (`…_stuff`).

    Each value is the mean over the categories that have ground-truth or predicted segments, in 0..1, or -1 if there are
    no such categories.
    """
    totals = counts.counts.sum(axis=0)
    things = np.array([bool(category.get("isthing", 1)) for category in counts.categories], bool)
    metrics: dict[str, float] = {}
    for suffix, rows in (("", np.ones(len(things), bool)), ("_things", things), ("_stuff", ~things)):
        mean = mean_quality(list(totals[rows]))
        metrics |= {f"{name}{suffix}": mean[name.lower()] if mean["n"] else -1.0 for name in NAMES}
    return {name: float(value) for name, value in metrics.items()}


def class_qualities(counts: PanopticCounts) -> dict[int, dict[str, float]]:
    """Return category id → PQ, SQ and RQ; -1 if the category has no ground-truth and no predicted segments."""
    result = {}
    for category, values in zip(counts.categories, counts.counts.sum(axis=0), strict=True):
        class_quality = quality(values) if values[1:].sum() else dict.fromkeys(("pq", "sq", "rq"), -1.0)
        result[int(category["id"])] = {name: float(class_quality[name.lower()]) for name in NAMES}
    return result


def resampled_quality(counts: PanopticCounts, weights: np.ndarray) -> np.ndarray:
    """Compute PQ of each category for resamples of the images.

    PQ is additive over images until its final division, so a resample is a weighted sum of the counts.

    Args:
        counts: counts of n images.
        weights: [resamples, n], how many times each image is in a resample.

    Returns:
        float64 [resamples, categories]; NaN if a resample has no segments of the category.
    """
    flat = counts.counts.reshape(len(counts.image_ids), -1)
    iou, matched, false, missed = np.moveaxis(
        (weights.astype(np.float64) @ flat).reshape(len(weights), -1, 4), 2, 0
    )
    segments = matched + (false + missed) / 2
    return np.where(segments > 0, iou / np.where(segments > 0, segments, 1), np.nan)


def mean_of_classes(quality_of_classes: np.ndarray) -> np.ndarray:
    """Average `resampled_quality` over the categories: float64 [..., categories] → [...]; NaN without any segments."""
    present = ~np.isnan(quality_of_classes)
    number = present.sum(axis=-1)
    total = np.where(present, quality_of_classes, 0).sum(axis=-1)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
