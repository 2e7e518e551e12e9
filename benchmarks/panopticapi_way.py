"""Panoptic quality with the method of panopticapi, in numpy, as the reference for ours.

Follows `pq_compute_single_core` in panopticapi's evaluation.py, which is not on PyPI. Pillow decodes both PNGs to
uint32 colors, which are converted to ids. `np.unique` counts ids, once for the prediction and once for both maps
together.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

OFFSET = 256**3
VOID = 0
IOU, MATCHED, FALSE, MISSED = range(4)

Maps = Mapping[int, tuple[bytes, Any]]
"""Image id → PNG and segments: ground truth has `segments_info`, predictions map segment id to category id."""


def panoptic_quality(
    ground_truth: Maps, predictions: Maps, categories: Sequence[Mapping[str, Any]]
) -> list[float]:
    """Compute PQ, SQ and RQ in 0..1, means over the categories that have segments."""
    totals = {category["id"]: np.zeros(4) for category in categories}
    for image_id, (true_png, true_segments) in ground_truth.items():
        _count(true_png, true_segments, *predictions[image_id], totals)
    qualities = []
    for iou, matched, false, missed in totals.values():
        if matched + false + missed:
            segments = matched + 0.5 * false + 0.5 * missed
            qualities.append((iou / segments, iou / matched if matched else 0, matched / segments))
    return np.mean(qualities, axis=0).tolist()


def _count(
    true_png: bytes,
    true_segments: Sequence[Mapping[str, Any]],
    predicted_png: bytes,
    predicted_segments: Mapping[int, int],
    totals: Mapping[int, np.ndarray],
) -> None:
    true_map, predicted_map = _ids(true_png), _ids(predicted_png)
    true_by_id = {segment["id"]: segment for segment in true_segments}
    labels, counts = np.unique(predicted_map, return_counts=True)
    area = {int(label): int(count) for label, count in zip(labels, counts) if label != VOID}
    assert area.keys() == predicted_segments.keys()

    both = true_map.astype(np.uint64) * OFFSET + predicted_map.astype(np.uint64)
    shared = {}
    for label, count in zip(*np.unique(both, return_counts=True)):
        shared[int(label) // OFFSET, int(label) % OFFSET] = int(count)

    matched_true, matched_predicted = set(), set()
    for (i, j), intersection in shared.items():
        if i not in true_by_id or j not in predicted_segments or true_by_id[i].get("iscrowd"):
            continue
        if true_by_id[i]["category_id"] != predicted_segments[j]:
            continue
        union = area[j] + true_by_id[i]["area"] - intersection - shared.get((VOID, j), 0)
        if intersection / union > 0.5:
            totals[predicted_segments[j]][[IOU, MATCHED]] += intersection / union, 1
            matched_true.add(i)
            matched_predicted.add(j)
    crowds = {}
    for i, segment in true_by_id.items():
        if i in matched_true:
            continue
        if segment.get("iscrowd"):
            crowds[segment["category_id"]] = i
            continue
        totals[segment["category_id"]][MISSED] += 1
    for j, category in predicted_segments.items():
        if j in matched_predicted:
            continue
        intersection = shared.get((VOID, j), 0)
        if category in crowds:
            intersection += shared.get((crowds[category], j), 0)
        if intersection / area[j] <= 0.5:
            totals[category][FALSE] += 1


def _ids(png: bytes) -> np.ndarray:
    """Decode a PNG to ids, uint32 [H, W], with the formula of panopticapi's `rgb2id`."""
    color = np.array(Image.open(BytesIO(png)), dtype=np.uint32)
    return color[:, :, 0] + 256 * color[:, :, 1] + 256 * 256 * color[:, :, 2]
