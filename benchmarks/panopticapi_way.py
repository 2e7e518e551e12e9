"""Panoptic quality as panopticapi computes it, in numpy, step by step: what ours is compared with.

After `pq_compute_single_core` of its evaluation.py, which is not on PyPI: both PNGs are decoded by Pillow to uint32
colours and those to ids; ids are counted by `np.unique`, once for the prediction and once for both maps together.
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
"""Image id → PNG, and its segments: `segments_info` of the truth, segment id → category id of the prediction."""


def panoptic_quality(truth: Maps, found: Maps, categories: Sequence[Mapping[str, Any]]) -> list[float]:
    """PQ, SQ and RQ in 0..1, means over the categories that have segments."""
    totals = {category["id"]: np.zeros(4) for category in categories}
    for image_id, (true_png, true_segments) in truth.items():
        _count(true_png, true_segments, *found[image_id], totals)
    qualities = []
    for iou, matched, false, missed in totals.values():
        if matched + false + missed:
            segments = matched + 0.5 * false + 0.5 * missed
            qualities.append((iou / segments, iou / matched if matched else 0, matched / segments))
    return np.mean(qualities, axis=0).tolist()


def _count(
    true_png: bytes,
    true_segments: Sequence[Mapping[str, Any]],
    found_png: bytes,
    found_segments: Mapping[int, int],
    totals: Mapping[int, np.ndarray],
) -> None:
    true_map, found_map = _ids(true_png), _ids(found_png)
    of_truth = {segment["id"]: segment for segment in true_segments}
    labels, counts = np.unique(found_map, return_counts=True)
    area = {int(label): int(count) for label, count in zip(labels, counts) if label != VOID}
    assert area.keys() == found_segments.keys()

    both = true_map.astype(np.uint64) * OFFSET + found_map.astype(np.uint64)
    shared = {}
    for label, count in zip(*np.unique(both, return_counts=True)):
        shared[int(label) // OFFSET, int(label) % OFFSET] = int(count)

    hit_true, hit_found = set(), set()
    for (i, j), intersection in shared.items():
        if i not in of_truth or j not in found_segments or of_truth[i].get("iscrowd"):
            continue
        if of_truth[i]["category_id"] != found_segments[j]:
            continue
        union = area[j] + of_truth[i]["area"] - intersection - shared.get((VOID, j), 0)
        if intersection / union > 0.5:
            totals[found_segments[j]][[IOU, MATCHED]] += intersection / union, 1
            hit_true.add(i)
            hit_found.add(j)
    crowds = {}
    for i, segment in of_truth.items():
        if i in hit_true:
            continue
        if segment.get("iscrowd"):
            crowds[segment["category_id"]] = i
            continue
        totals[segment["category_id"]][MISSED] += 1
    for j, category in found_segments.items():
        if j in hit_found:
            continue
        intersection = shared.get((VOID, j), 0)
        if category in crowds:
            intersection += shared.get((crowds[category], j), 0)
        if intersection / area[j] <= 0.5:
            totals[category][FALSE] += 1


def _ids(png: bytes) -> np.ndarray:
    """uint32 [H, W]: panopticapi's `rgb2id` of the decoded colours."""
    color = np.array(Image.open(BytesIO(png)), dtype=np.uint32)
    return color[:, :, 0] + 256 * color[:, :, 1] + 256 * 256 * color[:, :, 2]
