"""The rules of panoptic quality (PQ), as panopticapi has them.

In the order they apply:

- segments match that have the same category and an IoU above 0.5, void (id 0) of the truth taken out of the union;
  at most one of each can;
- crowds of the truth match nothing and are not missed;
- an unmatched prediction counts as false unless more than half of it is void or a crowd of its category.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from detr.image_transforms import rgb_to_id

VOID = 0
"""The segment id of pixels that belong to no segment."""

Counts = dict[int, np.ndarray]
"""Category id to float64 [4]: sum of the IoU of matches, matches, false and missed segments."""

_IOU, _MATCHED, _FALSE, _MISSED = range(4)


def match_segments(
    true_map: np.ndarray,
    true_segments: Sequence[Mapping[str, Any]],
    found_map: np.ndarray,
    found_segments: Mapping[int, int],
    where: str = "the image",
) -> Counts:
    """Count matches, false and missed segments of one image by the rules of panopticapi.

    Args:
        true_map: int [H, W], segment ids of the truth, or uint8 [H, W, 3], the colours that encode them in a PNG; 0 is
            void, and so is an id that is not in `true_segments`.
        true_segments: the truth's `segments_info`: `id`, `category_id`, `area`, and `iscrowd` where it is not 0.
        found_map: the predicted ones, int [H, W] or uint8 [H, W, 3]; 0 is void.
        found_segments: predicted segment id to category id.
        where: the image's name, for messages.

    Returns:
        category id to float64 [4]: sum of the matches' IoU, matches, false segments, missed segments.

    Raises:
        ValueError: the ids of `found_map` and `found_segments` are not the same.
    """
    true_ids, found_ids, shared = _intersections(true_map, found_map)
    ids = set(found_ids.tolist())
    for kind, odd in (
        ("not in segments_info", ids - {VOID} - found_segments.keys()),
        ("not in the map", found_segments.keys() - ids),
    ):
        if odd:
            raise ValueError(
                f"{where}: segment {min(odd)} of the prediction is {kind} ({len(odd)} such segments)"
            )
    area = dict(zip(found_ids.tolist(), shared.sum(0).tolist()))
    row = {segment: index for index, segment in enumerate(true_ids.tolist())}
    column = {segment: index for index, segment in enumerate(found_ids.tolist())}

    def overlap(true_id: int, found_id: int) -> int:
        return int(shared[row[true_id], column[found_id]]) if true_id in row else 0

    counts: Counts = {}

    def count(category_id: int, what: int, amount: float = 1.0) -> None:
        counts.setdefault(category_id, np.zeros(4))[what] += amount

    matched = set()
    crowd_of = {}
    for segment in true_segments:
        true_id, category_id = int(segment["id"]), int(segment["category_id"])
        if segment.get("iscrowd"):
            crowd_of[category_id] = true_id  # the last of a category, as panopticapi
            continue
        missed = True
        touching = found_ids[shared[row[true_id]] > 0].tolist() if true_id in row else []
        for found_id in touching:
            if found_segments.get(found_id) != category_id:
                continue
            common = overlap(true_id, found_id)
            iou = common / (area[found_id] + segment["area"] - common - overlap(VOID, found_id))
            if iou > 0.5:
                count(category_id, _MATCHED)
                count(category_id, _IOU, iou)
                matched.add(found_id)
                missed = False
        if missed:
            count(category_id, _MISSED)
    for found_id, category_id in found_segments.items():
        if found_id in matched:
            continue
        excused = overlap(VOID, found_id)
        if category_id in crowd_of:
            excused += overlap(crowd_of[category_id], found_id)
        if excused / area[found_id] <= 0.5:
            count(category_id, _FALSE)
    return counts


def _intersections(true_map: np.ndarray, found_map: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct ids int [T] and [F] of two maps, and how many pixels have both, int64 [T, F].

    Over runs of equal pairs rather than pixels: a map has some 5,000 runs and 300,000 pixels to sort.
    """
    if true_map.ndim != found_map.ndim:
        true_map, found_map = (rgb_to_id(each) if each.ndim == 3 else each for each in (true_map, found_map))
    changed = _differs_from_previous(true_map)
    changed |= _differs_from_previous(found_map)
    changes = np.flatnonzero(changed) // true_map[0, 0].size + 1
    starts = np.concatenate([[0], changes[np.diff(changes, prepend=0) > 0]])
    lengths = np.diff(starts, append=true_map.shape[0] * true_map.shape[1])
    true_ids, rows = _distinct(_ids_at(true_map, starts))
    found_ids, columns = _distinct(_ids_at(found_map, starts))
    pixels = np.bincount(rows * len(found_ids) + columns, lengths, len(true_ids) * len(found_ids))
    return true_ids, found_ids, pixels.astype(np.int64).reshape(len(true_ids), len(found_ids))


def _differs_from_previous(segment_map: np.ndarray) -> np.ndarray:
    """bool [pixels - 1], times 3 of colours: whether a value is not that of the pixel before."""
    values, each = segment_map.reshape(-1), segment_map[0, 0].size
    return np.not_equal(values[each:], values[:-each])


def _ids_at(segment_map: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    values = segment_map.reshape(-1)
    if segment_map.ndim == 2:
        return values[pixels]
    red = 3 * pixels  # `rgb_to_id` of the pixels would first gather them three bytes at a time
    ids = values[red].astype(np.int32)
    ids += 256 * values[red + 1].astype(np.int32)
    ids += 65536 * values[red + 2].astype(np.int32)
    return ids


def _distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What np.unique gives with `return_inverse`, sooner where few are distinct (`make bench BENCH='--only quality'`)."""
    ordered = np.sort(ids)
    distinct = ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])]
    return distinct, np.searchsorted(distinct, ids)


def quality(values: np.ndarray) -> dict[str, float]:
    """PQ, SQ and RQ of a category.

    Args:
        values: float64 [4], a value of `Counts` or a sum of such.

    Returns:
        "pq", "sq" and "rq" in 0..1, with pq = sq * rq; 0 where there is nothing to divide by.
    """
    iou, matched, false, missed = map(float, values)
    segments = matched + (false + missed) / 2
    return {
        "pq": iou / segments if segments else 0.0,
        "sq": iou / matched if matched else 0.0,
        "rq": matched / segments if segments else 0.0,
    }


def mean_quality(categories: Sequence[np.ndarray]) -> dict[str, float]:
    """The mean of `quality` over the categories that have segments, and their number "n"."""
    present = [quality(values) for values in categories if values[_MATCHED:].sum()]
    means = {key: sum(one[key] for one in present) / max(1, len(present)) for key in ("pq", "sq", "rq")}
    return means | {"n": len(present)}
