"""Match panoptic segments by the rules of panopticapi, and compute panoptic quality (PQ).

The rules, in the order in which they apply:

- Two segments match if they have the same category and an IoU above 0.5, where void (id 0) of the ground truth is
  removed from the union. A segment has at most one match.
- Crowds of the ground truth match nothing and are not missed.
- An unmatched prediction is false unless more than half of it is void or a crowd of its category.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from detr.image_transforms import rgb_to_id

VOID = 0
"""The segment id of pixels that belong to no segment."""

Counts = dict[int, np.ndarray]
"""Category id to float64 [4]: sum of the IoU of the matches, number of matches, of false and of missed segments."""

_IOU, _MATCHED, _FALSE, _MISSED = range(4)


def match_segments(
    true_map: np.ndarray,
    true_segments: Sequence[Mapping[str, Any]],
    predicted_map: np.ndarray,
    predicted_segments: Mapping[int, int],
    where: str = "the image",
) -> Counts:
    """Count the matches, false and missed segments of one image by the rules of panopticapi.

    Args:
        true_map: segment ids of the ground truth, int [H, W], or the colors that encode them in a PNG, uint8 [H, W, 3].
            0 is void, and so is an id that is not in `true_segments`.
        true_segments: `segments_info` of the ground truth: `id`, `category_id`, `area`, and `iscrowd` if it is not 0.
        predicted_map: predicted segment ids, int [H, W] or uint8 [H, W, 3]; 0 is void.
        predicted_segments: predicted segment id to category id.
        where: name of the image, for error messages.

    Returns:
        Category id to float64 [4]: see `Counts`.

    Raises:
        ValueError: the ids of `predicted_map` and `predicted_segments` differ.
    """
    true_ids, predicted_ids, shared = _intersections(true_map, predicted_map)
    ids = set(predicted_ids.tolist())
    for kind, odd in (
        ("not in segments_info", ids - {VOID} - predicted_segments.keys()),
        ("not in the map", predicted_segments.keys() - ids),
    ):
        if odd:
            raise ValueError(
                f"{where}: segment {min(odd)} of the prediction is {kind} ({len(odd)} such segments)"
            )
    area = dict(zip(predicted_ids.tolist(), shared.sum(0).tolist()))
    row = {segment: index for index, segment in enumerate(true_ids.tolist())}
    column = {segment: index for index, segment in enumerate(predicted_ids.tolist())}

    def overlap(true_id: int, predicted_id: int) -> int:
        return int(shared[row[true_id], column[predicted_id]]) if true_id in row else 0

    counts: Counts = {}

    def count(category_id: int, slot: int, amount: float = 1.0) -> None:
        counts.setdefault(category_id, np.zeros(4))[slot] += amount

    matched = set()
    crowd_of = {}
    for segment in true_segments:
        true_id, category_id = int(segment["id"]), int(segment["category_id"])
        if segment.get("iscrowd"):
            crowd_of[category_id] = true_id  # the last crowd of a category, as in panopticapi
            continue
        missed = True
        touching = predicted_ids[shared[row[true_id]] > 0].tolist() if true_id in row else []
        for predicted_id in touching:
            if predicted_segments.get(predicted_id) != category_id:
                continue
            common = overlap(true_id, predicted_id)
            iou = common / (area[predicted_id] + segment["area"] - common - overlap(VOID, predicted_id))
            if iou > 0.5:
                count(category_id, _MATCHED)
                count(category_id, _IOU, iou)
                matched.add(predicted_id)
                missed = False
        if missed:
            count(category_id, _MISSED)
    for predicted_id, category_id in predicted_segments.items():
        if predicted_id in matched:
            continue
        excused = overlap(VOID, predicted_id)
        if category_id in crowd_of:
            excused += overlap(crowd_of[category_id], predicted_id)
        if excused / area[predicted_id] <= 0.5:
            count(category_id, _FALSE)
    return counts


def _intersections(
    true_map: np.ndarray, predicted_map: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct ids int [T] and [P] of two maps, and the number of pixels with each pair, int64 [T, P].

    Works on runs of equal pairs, not on pixels: a map has about 5,000 runs and 300,000 pixels.
    """
    if true_map.ndim != predicted_map.ndim:
        true_map, predicted_map = (
            rgb_to_id(each) if each.ndim == 3 else each for each in (true_map, predicted_map)
        )
    changed = _differs_from_previous(true_map)
    changed |= _differs_from_previous(predicted_map)
    changes = np.flatnonzero(changed) // true_map[0, 0].size + 1
    starts = np.concatenate([[0], changes[np.diff(changes, prepend=0) > 0]])
    lengths = np.diff(starts, append=true_map.shape[0] * true_map.shape[1])
    true_ids, rows = _distinct(_ids_at(true_map, starts))
    predicted_ids, columns = _distinct(_ids_at(predicted_map, starts))
    pixels = np.bincount(rows * len(predicted_ids) + columns, lengths, len(true_ids) * len(predicted_ids))
    return true_ids, predicted_ids, pixels.astype(np.int64).reshape(len(true_ids), len(predicted_ids))


def _differs_from_previous(segment_map: np.ndarray) -> np.ndarray:
    """Compare each value with that of the previous pixel: bool [pixels - 1], or [3 * (pixels - 1)] for colors."""
    values, channels = segment_map.reshape(-1), segment_map[0, 0].size
    return np.not_equal(values[channels:], values[:-channels])


def _ids_at(segment_map: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    values = segment_map.reshape(-1)
    if segment_map.ndim == 2:
        return values[pixels]
    red = 3 * pixels  # faster than `rgb_to_id`, which would first gather the pixels three bytes at a time
    ids = values[red].astype(np.int32)
    ids += 256 * values[red + 1].astype(np.int32)
    ids += 65536 * values[red + 2].astype(np.int32)
    return ids


def _distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute np.unique with `return_inverse`; faster for few distinct ids (`make bench BENCH='--only quality'`)."""
    ordered = np.sort(ids)
    distinct = ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])]
    return distinct, np.searchsorted(distinct, ids)


def quality(values: np.ndarray) -> dict[str, float]:
    """Compute PQ, SQ and RQ of a category.

    Args:
        values: float64 [4], a value of `Counts` or a sum of such values.

    Returns:
        "pq", "sq" and "rq" in 0..1, with pq = sq * rq; 0 if the denominator is 0.
    """
    iou, matched, false, missed = map(float, values)
    segments = matched + (false + missed) / 2
    return {
        "pq": iou / segments if segments else 0.0,
        "sq": iou / matched if matched else 0.0,
        "rq": matched / segments if segments else 0.0,
    }


def mean_quality(categories: Sequence[np.ndarray]) -> dict[str, float]:
    """Compute the mean of `quality` over the categories that have segments, and their number "n"."""
    present = [quality(values) for values in categories if values[_MATCHED:].sum()]
    means = {key: sum(one[key] for one in present) / max(1, len(present)) for key in ("pq", "sq", "rq")}
    return means | {"n": len(present)}
