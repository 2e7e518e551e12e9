"""Figures over resamples of the images, of which intervals are made."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from detr.metrics.bootstrap import image_weights, interval, mean_precision, resampled_precision
from detr.metrics.coco_matching import Matches, matches_of
from raydetr.evaluation.figures import Evaluations
from raydetr.evaluation.panoptic_quality import PanopticCounts, mean_of_classes, resampled_quality

CONFIDENCE = 0.95
RESAMPLES = 1000


@dataclass(frozen=True)
class Resampled:
    """Figures over resamples, NaN where a resample has nothing to score.

    figures: `AP`, `AP50`, `AP75`, with masks `mask_AP`, with segments `PQ`, to float64 [resamples].
    classes: the same names to float64 [resamples, categories], categories ascending by id.
    """

    figures: Mapping[str, np.ndarray]
    classes: Mapping[str, np.ndarray]


def resample(
    evaluations: Evaluations,
    matches: Matches,
    panoptic: PanopticCounts | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Resampled:
    """Score resamples of the images, the same ones for the same images, seed and number.

    Args:
        evaluations: of the data set.
        matches: of `evaluations.boxes`.
        panoptic: counts of (some of) its images.
        seed: of the resamples.
        resamples: how many.
    """
    image_ids = evaluations.boxes.image_ids
    weights = image_weights(len(image_ids), resamples, seed)
    precision = resampled_precision(matches, weights)
    figures = mean_precision(precision)
    classes = {"AP": precision.mean(axis=2), "AP50": precision[..., 0], "AP75": precision[..., 5]}
    if evaluations.masks is not None:
        masks = resampled_precision(matches_of(evaluations.masks), weights)
        figures["mask_AP"], classes["mask_AP"] = mean_precision(masks)["AP"], masks.mean(axis=2)
    if panoptic is not None:
        classes["PQ"] = resampled_quality(panoptic, weights[:, np.isin(image_ids, panoptic.image_ids)])
        figures["PQ"] = mean_of_classes(classes["PQ"])
    return Resampled(figures, classes)


def intervals(figures: Mapping[str, float], resampled: Resampled) -> dict[str, list[float]]:
    """Name → [low, high] of each resampled figure."""
    return {
        name: list(interval(figures[name], values, CONFIDENCE)) for name, values in resampled.figures.items()
    }
