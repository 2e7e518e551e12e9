"""Instance segmentation: a map of objects, each of its own id."""

from typing import Any

from detr.postprocess.rle import coco_rle, transformers_rle
from detr.postprocess.segments import NO_MASK_FOUND, SegmentationOutput, SegmentRules, segments_of_batch
from detr.postprocess.sizes import TargetSizes
from detr.postprocess.view import image_views


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
) -> list[dict[str, Any]]:
    """The objects of each image as a map of ids. A pixel belongs to one object at most.

    Every pixel goes to the kept query whose mask probability times score is largest there; a query is then dropped
    that won too little of its own mask.

    Args:
        outputs: of the model.
        threshold: a query's score, the probability of its best class, must exceed it.
        mask_threshold: a pixel is of a query's own mask where probability times score is not less.
        overlap_mask_area_threshold: the part of its own mask that a query won must exceed it.
        target_sizes: (height, width) of each image in pixels, as a list or a tensor [batch, 2]; None leaves the maps
            at the masks' size.
        return_coco_annotation: give run lengths for the map: see `detr.postprocess.rle.transformers_rle`. They are not
            COCO's, in spite of the name; an image without a kept query keeps its map.
        processed_sizes: (height, width) of each image as the model saw it, resized and without padding. The masks of
            a padded batch are then cut to the image before they are resized; without it they are resized with their
            padding, as in transformers, and do not fit an image that was padded.
        padded_size: (height, width) of `pixel_values`, where the largest of `processed_sizes` is less.
        integer_maps: make the map of an image without a kept query int32.
        rle_format: "coco" gives COCO's run-length encoding, whatever `return_coco_annotation` is.

    Returns:
        For each image a dict:

        - `segmentation`: int32 [height, width] on the device of the masks, 0 where there is no object; float32 of -1
          where no query was kept; or run lengths. With "coco" a list of `{"size", "counts"}`, one for each entry of
          `segments_info`.
        - `segments_info`: a dict for each object: `id` 1.., `label_id`, `was_fused` False, and `score`, rounded to 6
          decimals; Python numbers.

    Raises:
        ValueError: the number of sizes is not that of the images, sizes do not fit the masks, or another format.
    """
    if rle_format not in (None, "coco"):
        raise ValueError(f"rle_format is {rle_format!r}: expected None or 'coco'")
    rules = SegmentRules(threshold, mask_threshold, overlap_mask_area_threshold)
    views = image_views(outputs.pred_masks, target_sizes, processed_sizes, padded_size)
    results = segments_of_batch(outputs, rules, views, integer_maps)
    for result in results:
        segments = result["segments_info"]
        if rle_format == "coco":
            ids = [segment["id"] for segment in segments]
            result["segmentation"] = coco_rle(result["segmentation"], ids)
        elif return_coco_annotation and result["segmentation"][0, 0] != NO_MASK_FOUND:
            result["segmentation"] = transformers_rle(result["segmentation"])
    return results
