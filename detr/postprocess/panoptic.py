"""Panoptic segmentation: a map of things and stuff."""

import functools
import logging
from collections.abc import Iterable

from detr.postprocess.segments import SegmentationOutput, SegmentedImage, SegmentRules, segments_of_batch
from detr.postprocess.sizes import TargetSizes
from detr.postprocess.view import image_views

logger = logging.getLogger(__name__)


def post_process_panoptic_segmentation(
    outputs: SegmentationOutput,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Iterable[int] | None = None,
    target_sizes: TargetSizes | None = None,
    *,
    processed_sizes: TargetSizes | None = None,
    padded_size: tuple[int, int] | None = None,
    integer_maps: bool = False,
    merge_fused: bool = False,
) -> list[SegmentedImage]:
    """Return the segments of each image as a map of ids. All segments of a fused class are one: one sky, many persons.

    Args:
        outputs: of the model.
        threshold: the score of a query, the probability of its best class, must exceed it.
        mask_threshold: a pixel belongs to a query's own mask if probability times score is at least this.
        overlap_mask_area_threshold: the share of its own mask that a query won must exceed it.
        label_ids_to_fuse: classes whose segments are fused into one, such as stuff; None for no class, which logs a
            warning once.
        target_sizes: (height, width) of each image in pixels, as a list or a tensor [batch, 2]; None leaves the maps
            at the size of the masks.
        processed_sizes: (height, width) of each image as the model saw it, resized and without padding: see
            `post_process_instance_segmentation`.
        padded_size: (height, width) of `pixel_values`, needed if it exceeds the largest of `processed_sizes`.
        integer_maps: make the map of an image without a query above `threshold` int32.
        merge_fused: give fused segments a single entry, with the best score, and each segment a unique id. Without it
            `segments_info` has an entry for each query, as in transformers: ids repeat, and the segment after a fused
            one gets the fused id plus 1, even if another segment has that id.

    Returns:
        For each image a dict:

        - `segmentation`: int32 [height, width] on the device of the masks, 0 for no segment; float32 filled with -1 if
          no query is above `threshold`.
        - `segments_info`: a dict for each segment: `id` 1.., `label_id`, `was_fused` (whether the class is one of
          `label_ids_to_fuse`), and `score`, rounded to 6 decimals; Python numbers.

    Raises:
        ValueError: the number of sizes is not that of the images, or sizes do not fit the masks.
    """
    if label_ids_to_fuse is None:
        _warn_that_nothing_is_fused()
        label_ids_to_fuse = ()
    rules = SegmentRules(
        threshold, mask_threshold, overlap_mask_area_threshold, frozenset(label_ids_to_fuse), merge_fused
    )
    views = image_views(outputs.pred_masks, target_sizes, processed_sizes, padded_size)
    return segments_of_batch(outputs, rules, views, integer_maps)


@functools.cache
def _warn_that_nothing_is_fused() -> None:
    logger.warning("`label_ids_to_fuse` unset. No instance will be fused.")
