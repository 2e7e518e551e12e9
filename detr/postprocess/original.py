"""The post-processing of the original code, under the old names that the DETR page cites."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.postprocess.detection import DetectionOutput, ImageDetections, detections_of_all_queries
from detr.postprocess.segments import SegmentationOutput
from detr.postprocess.sizes import TargetSizes, integer_sizes
from detr.postprocess.view import image_views


class OriginalDetections(ImageDetections):
    """The detections in an image.

    Attributes:
        masks: uint8 [n, 1, height, width], 0 or 1; added by `post_process_instance`.
    """

    masks: NotRequired[Tensor]


class ImageMasks(TypedDict):
    """The masks of an image, which may overlap.

    Attributes:
        scores: float [n] in 0..1.
        labels: int64 [n].
        masks: int64 [n, height, width], 0 or 1.
    """

    scores: Tensor
    labels: Tensor
    masks: Tensor


def post_process(outputs: DetectionOutput, target_sizes: TargetSizes) -> list[OriginalDetections]:
    """Return all queries of each image as detections, whatever their score: the input of COCO's evaluation.

    Args:
        outputs: of the model.
        target_sizes: (height, width) of each image in pixels, as a list or a tensor [batch, 2].

    Returns:
        A dict for each image: `scores` float [queries], `labels` int64 [queries], the best class that is not "no
        object", and `boxes` float [queries, 4], corners in pixels of its target size.

    Raises:
        ValueError: the number of target sizes is not that of the images.
    """
    scores, labels, boxes = detections_of_all_queries(outputs, target_sizes)
    return [
        {"scores": score, "labels": label, "boxes": box} for score, label, box in zip(scores, labels, boxes)
    ]


def post_process_segmentation(
    outputs: SegmentationOutput,
    target_sizes: TargetSizes,
    threshold: float = 0.9,
    mask_threshold: float = 0.5,
    *,
    processed_sizes: TargetSizes | None = None,
    padded_size: tuple[int, int] | None = None,
) -> list[ImageMasks]:
    """Return the queries above a score with their masks, which may overlap.

    Args:
        outputs: of the model.
        target_sizes: (height, width) of each image in pixels, as a list or a tensor [batch, 2].
        threshold: the score of a query, the probability of its best class, must exceed it.
        mask_threshold: the probability of a pixel of the mask must exceed it.
        processed_sizes: (height, width) of each image as the model saw it, resized and without padding: see
            `post_process_instance_segmentation`.
        padded_size: (height, width) of `pixel_values`, needed if it exceeds the largest of `processed_sizes`.

    Returns:
        A dict for each image: `scores` float [n], `labels` int64 [n] and `masks` int64 [n, height, width], 0 or 1.

    Raises:
        ValueError: the number of sizes is not that of the images, or sizes do not fit the masks.
    """
    views = image_views(outputs.pred_masks, target_sizes, processed_sizes, padded_size)
    scores, labels = outputs.logits.softmax(-1).max(-1)
    is_object = labels.ne(outputs.logits.shape[-1] - 1) & (scores > threshold)
    results: list[ImageMasks] = []
    for score, label, masks, selected, view in zip(scores, labels, outputs.pred_masks, is_object, views):
        binary_masks = [view.resize(mask[None]).sigmoid() > mask_threshold for mask in masks[selected]]
        empty = masks.new_zeros((0, *view.output_size(masks)), dtype=torch.bool)
        results.append(
            {
                "scores": score[selected],
                "labels": label[selected],
                "masks": torch.cat([empty, *binary_masks]).long(),
            }
        )
    return results


def post_process_instance(
    results: Sequence[OriginalDetections],
    outputs: SegmentationOutput,
    orig_target_sizes: TargetSizes,
    max_target_sizes: TargetSizes,
    threshold: float = 0.5,
) -> Sequence[OriginalDetections]:
    """Add the masks of all queries to the results of `post_process`: the input of COCO's evaluation of masks.

    Masks are resized to the padded batch, cropped to each image, and resized to its original size with nearest-neighbor
    sampling.

    Args:
        results: of `post_process`, a dict for each image.
        outputs: of the model.
        orig_target_sizes: (height, width) of each original image, as a list or a tensor [batch, 2].
        max_target_sizes: (height, width) of each image as the model saw it, resized and without padding. The largest
            height and width are used as the size of the padded batch.
        threshold: the probability of a pixel of the mask must exceed it.

    Returns:
        The same dicts, with `masks` uint8 [queries, 1, height, width], 0 or 1.

    Raises:
        ValueError: the number of sizes or results is not that of the images.
    """
    originals = integer_sizes(orig_target_sizes, len(outputs.pred_masks), "original")
    processed = integer_sizes(max_target_sizes, len(outputs.pred_masks), "processed")
    if len(results) != len(originals):
        raise ValueError(
            f"there are {len(results)} results and {len(originals)} images: expected one for each"
        )
    padded = max(height for height, _ in processed), max(width for _, width in processed)
    for result, masks, (height, width), size in zip(results, outputs.pred_masks, processed, originals):
        result["masks"] = torch.stack(
            [_resize_to_original(mask, padded, (height, width), size, threshold) for mask in masks]
        )
    return results


def _resize_to_original(
    mask: Tensor, padded: tuple[int, int], processed: tuple[int, int], size: tuple[int, int], threshold: float
) -> Tensor:
    """Convert the logits [h, w] of a mask to uint8 [1, height, width] of the original image."""
    logits = F.interpolate(mask[None, None], size=padded, mode="bilinear", align_corners=False)
    binary = (logits[..., : processed[0], : processed[1]].sigmoid() > threshold).to(torch.uint8)
    return F.interpolate(binary, size=size, mode="nearest")[0]
