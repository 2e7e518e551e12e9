"""How sure figures are: average precision over resamples of a data set's images.

A resample draws as many images as there are, with replacement; an image drawn twice counts as two. Its AP is what
pycocotools computes of a data set in which the images are really repeated. Nothing is matched again: an image's
matches do not depend on the others, so that only the sums along descending score are taken anew, with the images'
multiplicities as weights, for many resamples at once.
"""

from collections.abc import Iterator

import numpy as np

from detr.metrics.coco_matching import IGNORED, NUM_IOUS, TRUE, Matches

_RECALLS = np.linspace(0.0, 1.0, 101)  # as in pycocotools, of which some are one ulp above k / 100
_EPSILON = np.spacing(1)
_CHUNK = 1 << 21
"""Weights gathered at once: 8 MB."""
_LEAST = 32
"""Resamples taken at once, however many detections there are: fewer are slow."""


def image_weights(num_images: int, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each resample has each image: uint16 [resamples, num_images], equal for equal arguments."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((resamples, num_images), np.uint16)
    for row in weights if num_images else ():
        row += np.bincount(rng.integers(0, num_images, num_images), minlength=num_images).astype(np.uint16)
    return weights


def resampled_precision(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Average precision of each category at each IoU threshold, in each resample.

    Args:
        matches: of the whole data set.
        weights: non-negative integers [resamples, images]: how often an image counts.

    Returns:
        float64 [resamples, categories, 10]; NaN where a resample has no object of the category.
    """
    result = np.full((len(weights), matches.num_categories, NUM_IOUS), np.nan)
    by_image = np.ascontiguousarray(weights.T.astype(np.int32))
    starts = np.searchsorted(matches.category, np.arange(matches.num_categories + 1))
    by_category = np.argsort(matches.object_category, kind="stable")
    ends = np.searchsorted(matches.object_category[by_category], np.arange(matches.num_categories + 1))
    for category in range(matches.num_categories):
        objects = matches.object_image[by_category[ends[category] : ends[category + 1]]]
        rows = slice(starts[category], starts[category + 1])
        status = matches.status[:, rows]
        true = np.flatnonzero((status == TRUE).any(axis=0))
        last = true[-1] + 1 if len(true) else 0  # what follows the last true detection changes nothing
        image = matches.image[rows][:last]
        for chunk in _chunks(len(weights), max(len(objects), last)):
            drawn = np.ascontiguousarray(by_image[:, chunk])
            result[chunk, category] = _precision(image, status[:, :last], objects, drawn).T
    return result


def mean_precision(precision: np.ndarray) -> dict[str, np.ndarray]:
    """The means over categories that COCO reports.

    Args:
        precision: float64 [..., categories, 10], of `resampled_precision`.

    Returns:
        "AP", "AP50" and "AP75" to float64 [...]; NaN where there is no object.
    """
    present = ~np.isnan(precision[..., 0])
    count = present.sum(axis=-1)
    means = (
        np.where(present[..., None], precision, 0).sum(axis=-2) / np.where(count, count, np.nan)[..., None]
    )
    return {"AP": means.mean(axis=-1), "AP50": means[..., 0], "AP75": means[..., 5]}


def interval(
    figure: float, resampled: np.ndarray, confidence: float = 0.95, least: float = 0.0
) -> tuple[float, float]:
    """Where a figure would lie on other images of the same kind and number.

    A resample has fewer different images than the data set, which moves AP (upwards, by as much as its standard
    error where classes are rare): the percentiles are moved back by the mean difference.

    Args:
        figure: of the data set itself.
        resampled: [resamples]; NaN does not count.
        confidence: share of such figures inside.
        least: of the figure; the largest is 1.

    Returns:
        (low, high); (figure, figure) where nothing could be resampled.
    """
    resampled = unbiased(figure, resampled)
    if not len(resampled):
        return figure, figure
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(np.clip(low, least, 1)), float(np.clip(high, least, 1))


def unbiased(figure: float, resampled: np.ndarray) -> np.ndarray:
    """Resampled figures that are there, moved so that their mean is the figure."""
    resampled = resampled[~np.isnan(resampled)]
    return resampled - (resampled.mean() - figure) if len(resampled) else resampled


def _chunks(count: int, width: int) -> Iterator[slice]:
    step = max(_LEAST, _CHUNK // max(1, width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _precision(image: np.ndarray, status: np.ndarray, objects: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AP of one category in each resample, float64 [10, r]; NaN where it has no object.

    Resamples are the last axis, along which every step is one loop over neighbours in memory.

    Args:
        image: [n], of its detections by descending score.
        status: [10, n].
        objects: [m], their images.
        weights: int32 [images, r].
    """
    present = weights[objects].sum(axis=0)
    result = np.where(present > 0, np.zeros((NUM_IOUS, 1)), np.nan)
    if not len(image):
        return result
    counted = np.cumsum(weights[image], axis=0, dtype=np.int32)
    reached = _recalls_reached(present)
    column = np.arange(len(present))
    for index in range(NUM_IOUS):
        true = np.flatnonzero(status[index] == TRUE)
        if not len(true):
            continue
        hits = np.cumsum(weights[image[true]], axis=0, dtype=np.int32)
        detections = counted[true]
        ignored = np.flatnonzero(status[index] == IGNORED)
        if len(ignored):
            before = np.zeros((len(ignored) + 1, len(present)), np.int32)
            np.cumsum(weights[image[ignored]], axis=0, out=before[1:])
            detections -= before[np.searchsorted(ignored, true)]
        # The highest precision at this recall or a higher one, taken once for each recall first reached here.
        precision = hits / (detections + _EPSILON)
        highest = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        recalls = reached.ravel().take(hits * np.int64(len(present)) + column)
        recalls[1:] -= recalls[:-1].copy()
        highest *= recalls
        result[index] = np.where(present > 0, highest.sum(axis=0) / len(_RECALLS), np.nan)
    return result


def _recalls_reached(present: np.ndarray) -> np.ndarray:
    """Of the 101 recalls, how many k of `present[r]` objects reach: int64 [largest present + 1, r]."""
    values, columns = np.unique(present, return_inverse=True)
    table = np.zeros((len(values), int(values[-1]) + 1), np.int64)
    for line, value in zip(table, values.tolist()):
        line[: value + 1] = np.searchsorted(_RECALLS, np.arange(value + 1) / max(value, 1), side="right")
    return np.ascontiguousarray(table[columns].T)
