"""Bootstrap: metrics of resamples of the images, and the confidence intervals computed from them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from detr.metrics.bootstrap import image_weights, interval, mean_precision, resampled_precision
from detr.metrics.coco_matching import Matches, extract_matches
from raydetr.evaluation.metrics import Evaluations
from raydetr.evaluation.panoptic_quality import PanopticCounts, mean_of_classes, resampled_quality

CONFIDENCE = 0.95
RESAMPLES = 1000


@dataclass(frozen=True)
class Resampled:
    """Metrics of each resample, NaN if a resample has nothing to score.

    metrics: `AP`, `AP50`, `AP75`, with masks `mask_AP`, with segments `PQ` → float64 [resamples].
    classes: the same names → float64 [resamples, categories], categories ascending by id.
    """

    metrics: Mapping[str, np.ndarray]
    classes: Mapping[str, np.ndarray]


def resample(
    evaluations: Evaluations,
    matches: Matches,
    panoptic: PanopticCounts | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Resampled:
    """Score bootstrap resamples of the images.

    The same number of images, seed and number of resamples give the same resamples. Therefore two models can be
    compared in pairs.

    Args:
        evaluations: evaluations of the data set.
        matches: matches of `evaluations.boxes`.
        panoptic: panoptic counts of the images, or of some of them.
        seed: seed of the bootstrap.
        resamples: number of resamples.
    """
    image_ids = evaluations.boxes.image_ids
    weights = image_weights(len(image_ids), resamples, seed)
    precision = resampled_precision(matches, weights)
    metrics = mean_precision(precision)
    classes = {"AP": precision.mean(axis=2), "AP50": precision[..., 0], "AP75": precision[..., 5]}
    if evaluations.masks is not None:
        masks = resampled_precision(extract_matches(evaluations.masks), weights)
        metrics["mask_AP"], classes["mask_AP"] = mean_precision(masks)["AP"], masks.mean(axis=2)
    if panoptic is not None:
        classes["PQ"] = resampled_quality(panoptic, weights[:, np.isin(image_ids, panoptic.image_ids)])
        metrics["PQ"] = mean_of_classes(classes["PQ"])
    return Resampled(metrics, classes)


def intervals(metrics: Mapping[str, float], resampled: Resampled) -> dict[str, tuple[float, float]]:
    """Return name → (low, high) for each resampled metric.

    Args:
        metrics: values on the data set itself, around which the intervals are placed.
        resampled: values on the resamples.
    """
    return {name: interval(metrics[name], values, CONFIDENCE) for name, values in resampled.metrics.items()}
