"""Instance segmentation: a map of objects, each with its own id."""

from typing import Any, TypedDict

from detr.postprocess.rle import coco_rle, transformers_rle
from detr.postprocess.segments import (
    NO_MASK_FOUND,
    SegmentationOutput,
    SegmentInfo,
    SegmentRules,
    segments_of_batch,
)
from detr.postprocess.sizes import TargetSizes
from detr.postprocess.view import image_views


class InstanceSegmentation(TypedDict):
    """The objects of an image.

    Attributes:
        segmentation: see `SegmentedImage`; a list of run lengths if they are requested.
        segments_info: its objects.
    """

    segmentation: Any
    segments_info: list[SegmentInfo]


def post_process_instance_segmentation(
    outputs: SegmentationOutput,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    target_sizes: TargetSizes | None = None,
    return_coco_annotation: bool | None = False,
    *,
    processed_sizes: TargetSizes | None = None,
    padded_size: tuple[int, int] | None = None,
    integer_maps: bool = False,
    rle_format: str | None = None,
) -> list[InstanceSegmentation]:
    """Return the objects of each image as a map of ids. A pixel belongs to at most one object.

    Each pixel is assigned to the query whose mask probability times score is largest there, among the queries above
    `threshold`. Then queries that won too little of their own mask are dropped.

    Args:
        outputs: of the model.
        threshold: the score of a query, the probability of its best class, must exceed it.
        mask_threshold: a pixel belongs to a query's own mask if probability times score is at least this.
        overlap_mask_area_threshold: the share of its own mask that a query won must exceed it.
        target_sizes: (height, width) of each image in pixels, as a list or a tensor [batch, 2]; None leaves the maps
            at the size of the masks.
        return_coco_annotation: return the map as run lengths: see `detr.postprocess.rle.transformers_rle`. In spite of
            the name they are not COCO's. The map of an image without a query above `threshold` is not converted.
        processed_sizes: (height, width) of each image as the model saw it, resized and without padding. The masks of
            a padded batch are then cropped to the image before they are resized. Without it they are resized with their
            padding, as in transformers, and are misaligned with a padded image.
        padded_size: (height, width) of `pixel_values`, needed if it exceeds the largest of `processed_sizes`.
        integer_maps: make the map of an image without a query above `threshold` int32.
        rle_format: "coco" returns COCO's run-length encoding, whatever `return_coco_annotation` is.

    Returns:
        For each image a dict:

        - `segmentation`: int32 [height, width] on the device of the masks, 0 for no object; float32 filled with -1 if
          no query is above `threshold`; or run lengths. With "coco" a list of `{"size", "counts"}`, one for each entry
          of `segments_info`.
        - `segments_info`: a dict for each object: `id` 1.., `label_id`, `was_fused` False, and `score`, rounded to 6
          decimals; Python numbers.

    Raises:
        ValueError: the number of sizes is not that of the images, sizes do not fit the masks, or `rle_format` is
            unknown.
    """
    if rle_format not in (None, "coco"):
        raise ValueError(f"rle_format is {rle_format!r}: expected None or 'coco'")
    rules = SegmentRules(threshold, mask_threshold, overlap_mask_area_threshold)
    views = image_views(outputs.pred_masks, target_sizes, processed_sizes, padded_size)
    results: list[InstanceSegmentation] = []
    for segmented in segments_of_batch(outputs, rules, views, integer_maps):
        segmentation: Any = segmented["segmentation"]
        if rle_format == "coco":
            segmentation = coco_rle(segmentation, [segment["id"] for segment in segmented["segments_info"]])
        elif return_coco_annotation and segmentation[0, 0] != NO_MASK_FOUND:
            segmentation = transformers_rle(segmentation)
        results.append({"segmentation": segmentation, "segments_info": segmented["segments_info"]})
    return results
