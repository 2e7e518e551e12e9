"""Repeat factors: images of rare categories are used more often (Gupta et al. 2019, LVIS, section 6)."""

import numpy as np
import numpy.typing as npt

from raydetr.data.shards import TARGET_COLUMNS, Manifest, is_target, read_records
from raydetr.errors import ConfigError

CATEGORY_COLUMNS = [name for name in TARGET_COLUMNS if name.startswith("objects.") and "bbox" not in name]


def repeat_factors(manifest: Manifest, threshold: float) -> npt.NDArray[np.float64]:
    """How often each record is used in an epoch, on average.

    A category found in a share f of the images has the factor max(1, sqrt(threshold / f)); an image has the largest
    of its categories', or 1 without any.

    Args:
        manifest: the data set; its categories are read once, from the index columns alone.
        threshold: share of the images below which a category is repeated, over 0, at most 1; LVIS takes 0.001.

    Returns:
        float64 [records], at least 1, in storage order.

    Raises:
        ConfigError: threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(
            f"--repeat-threshold is {threshold}: expected a share of the images, over 0, at most 1."
        )
    labels: list[list[int]] = [
        sorted({manifest.labels[item["category_id"]] for item in record["objects"] or () if is_target(item)})
        for record in read_records(manifest, CATEGORY_COLUMNS)
    ]
    images = np.bincount([label for each in labels for label in each], minlength=len(manifest.labels))
    factors = np.sqrt(threshold * manifest.num_images / np.maximum(images, 1)).clip(min=1)
    return np.array([max((factors[label] for label in each), default=1.0) for each in labels])
