"""Confidence intervals of average precision, by the bootstrap over images.

A resample draws n of the n images of a data set with replacement; an image drawn twice counts as two images. Its AP
equals the AP that pycocotools computes for a data set in which the images are really repeated.

Nothing is matched again, since the matches of an image do not depend on other images. Only the cumulative sums along
descending score are computed again, with the multiplicities of the images as weights, for many resamples at a time.
"""

from collections.abc import Iterator

import numpy as np

from detr.metrics.coco_matching import IGNORED, NUM_IOUS, TRUE, Matches

_RECALLS = np.linspace(0.0, 1.0, 101)  # as in pycocotools; some values are one ulp above k / 100
_EPSILON = np.spacing(1)  # pycocotools adds it to the denominator of the precision
_CHUNK_WEIGHTS = 1 << 21
"""Weights gathered at a time: 8 MB."""
_MIN_CHUNK_RESAMPLES = 32
"""Minimum resamples per chunk, whatever the number of detections: fewer are slow."""


def image_weights(num_images: int, resamples: int, seed: int = 0) -> np.ndarray:
    """Draw the multiplicity of each image in each resample: uint16 [resamples, num_images], determined by `seed`."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((resamples, num_images), np.uint16)
    for row in weights if num_images else ():
        row += np.bincount(rng.integers(0, num_images, num_images), minlength=num_images).astype(np.uint16)
    return weights


def resampled_precision(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Compute the average precision of each category at each IoU threshold, in each resample.

    Args:
        matches: of the whole data set.
        weights: multiplicity of each image, non-negative integers [resamples, images].

    Returns:
        float64 [resamples, categories, 10]; NaN if a resample has no object of the category.
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
        last = true[-1] + 1 if len(true) else 0  # detections after the last true one do not change AP
        image = matches.image[rows][:last]
        for chunk in _chunks(len(weights), max(len(objects), last)):
            drawn = np.ascontiguousarray(by_image[:, chunk])
            result[chunk, category] = _precision(image, status[:, :last], objects, drawn).T
    return result


def mean_precision(precision: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the means over categories that COCO reports.

    Args:
        precision: float64 [..., categories, 10], from `resampled_precision`.

    Returns:
        "AP", "AP50" and "AP75" to float64 [...]; NaN if a resample has no objects.
    """
    present = ~np.isnan(precision[..., 0])
    count = present.sum(axis=-1)
    means = (
        np.where(present[..., None], precision, 0).sum(axis=-2) / np.where(count, count, np.nan)[..., None]
    )
    return {"AP": means.mean(axis=-1), "AP50": means[..., 0], "AP75": means[..., 5]}


def interval(
    value: float, resampled: np.ndarray, confidence: float = 0.95, least: float = 0.0
) -> tuple[float, float]:
    """Compute the bootstrap confidence interval of a metric: percentiles of the resampled values, corrected for bias.

    A resample has fewer distinct images than the data set. This raises AP, for rare classes by as much as its standard
    error, so the percentiles are shifted by the difference between the metric and the mean of the resampled values.

    Args:
        value: of the metric on the data set itself.
        resampled: [resamples], values of the metric on the resamples; NaN is ignored.
        confidence: confidence level, 0..1.
        least: minimum that the metric can have; its maximum is 1.

    Returns:
        (low, high), clipped to the range of the metric; (value, value) if all resampled values are NaN.
    """
    resampled = unbiased(value, resampled)
    if not len(resampled):
        return value, value
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(np.clip(low, least, 1)), float(np.clip(high, least, 1))


def unbiased(value: float, resampled: np.ndarray) -> np.ndarray:
    """Drop NaN, and shift the resampled values so that their mean is the value on the data set itself."""
    resampled = resampled[~np.isnan(resampled)]
    return resampled - (resampled.mean() - value) if len(resampled) else resampled


def _chunks(count: int, width: int) -> Iterator[slice]:
    step = max(_MIN_CHUNK_RESAMPLES, _CHUNK_WEIGHTS // max(1, width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _precision(image: np.ndarray, status: np.ndarray, objects: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute the AP of one category in each resample, float64 [10, r]; NaN if a resample has no object of it.

    AP is the mean over 101 recalls R of max {precision(i): recall(i) >= R}. Let hits(i) and detections(i) be the sums of
    weights of the true and of all counted detections up to i, by descending score. Then precision(i) is
    hits(i) / detections(i), and recall(i) is hits(i) / present. Only true detections raise the recall, so

        AP = 1 / 101 * sum over true i of highest(i) * (recalls first reached at i)

    where highest(i) is the maximum precision from i on. A detection of weight w stands for w copies in a row. A further
    copy of a true detection never lowers the precision, so highest is the same for all its copies, and one term covers
    them. A detection of weight 0 reaches no new recall, so it contributes 0. Recall 0 is counted at the first term.

    Resamples are the last axis, so the inner loop of every operation runs over contiguous memory.

    Args:
        image: [n], the image of each detection, by descending score.
        status: [10, n].
        objects: [m], the image of each object.
        weights: int32 [images, r].
    """
    present = weights[objects].sum(axis=0)
    result = np.where(present > 0, np.zeros((NUM_IOUS, 1)), np.nan)
    if not len(image):
        return result
    all_detections = np.cumsum(weights[image], axis=0, dtype=np.int32)
    reached = _recalls_reached(present)
    column = np.arange(len(present))
    for index in range(NUM_IOUS):
        true = np.flatnonzero(status[index] == TRUE)
        if not len(true):
            continue
        hits = np.cumsum(weights[image[true]], axis=0, dtype=np.int32)
        detections = all_detections[true]
        ignored = np.flatnonzero(status[index] == IGNORED)
        if len(ignored):
            before = np.zeros((len(ignored) + 1, len(present)), np.int32)
            np.cumsum(weights[image[ignored]], axis=0, out=before[1:])
            detections -= before[np.searchsorted(ignored, true)]
        precision = hits / (detections + _EPSILON)
        highest = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        # reached[hits, column] as a flat index, which may exceed int32; then the recalls first reached at each row.
        recalls = reached.ravel().take(hits * np.int64(len(present)) + column)
        recalls[1:] -= recalls[:-1].copy()
        highest *= recalls
        result[index] = np.where(present > 0, highest.sum(axis=0) / len(_RECALLS), np.nan)
    return result


def _recalls_reached(present: np.ndarray) -> np.ndarray:
    """Count the recalls, of 101, that k hits among `present[r]` objects reach: int64 [max(present) + 1, r].

    Row k of column r holds the number of recalls that are at most k / present[r].
    """
    values, columns = np.unique(present, return_inverse=True)
    table = np.zeros((len(values), int(values[-1]) + 1), np.int64)
    for line, value in zip(table, values.tolist()):
        line[: value + 1] = np.searchsorted(_RECALLS, np.arange(value + 1) / max(value, 1), side="right")
    return np.ascontiguousarray(table[columns].T)
