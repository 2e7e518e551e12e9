"""Repeat factors: use images of rare categories more often (Gupta et al. 2019, LVIS, section 6)."""

import numpy as np
import numpy.typing as npt

from raydetr.data.shards import TARGET_COLUMNS, Manifest, is_target, read_records
from raydetr.errors import ConfigError

CATEGORY_COLUMNS = [name for name in TARGET_COLUMNS if name.startswith("objects.") and "bbox" not in name]


def repeat_factors(manifest: Manifest, threshold: float) -> npt.NDArray[np.float64]:
    """Compute how often each record is used in an epoch, on average.

    A category that occurs in a share f of the images has the factor max(1, sqrt(threshold / f)). An image has the
    largest factor of its categories, or 1 if it has no objects.

    The factors are real numbers; the plan rounds them to whole repeat counts in each epoch (`plan._round_repeats`).

    Args:
        manifest: the data set; only the category columns of its shards are read.
        threshold: share of the images below which a category is repeated, in (0, 1]; LVIS uses 0.001.

    Returns:
        float64 [records], each at least 1, in storage order.

    Raises:
        ConfigError: threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(
            f"--repeat-threshold is {threshold}: expected a share of the images, over 0 and at most 1."
        )
    labels: list[list[int]] = [
        sorted({manifest.labels[item["category_id"]] for item in record["objects"] or () if is_target(item)})
        for record in read_records(manifest, CATEGORY_COLUMNS)
    ]
    images = np.bincount([label for each in labels for label in each], minlength=len(manifest.labels))
    # f = images / num_images. A category without images gets a factor that no record uses; 1 avoids a division by 0.
    factors = np.sqrt(threshold * manifest.num_images / np.maximum(images, 1)).clip(min=1)
    return np.array([max((factors[label] for label in each), default=1.0) for each in labels])
