"""Semantic segmentation: a class for every pixel."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.model.outputs import ModelOutput
from detr.postprocess.running_argmax import running_argmax
from detr.postprocess.segments import SegmentationOutput
from detr.postprocess.sizes import TargetSizes
from detr.postprocess.view import View, image_views


@dataclass
class SemanticSegmentation(ModelOutput):
    """The class of each pixel of an image, with scores.

    Attributes:
        segmentation: int64 [height, width].
        segmentation_scores: float [classes, height, width], not normalized: for each class the sum over the queries of
            class probability times mask probability.
    """

    segmentation: Tensor
    segmentation_scores: Tensor


def post_process_semantic_segmentation(
    outputs: SegmentationOutput,
    target_sizes: TargetSizes | None = None,
    return_segmentation_scores: bool = False,
    *,
    processed_sizes: TargetSizes | None = None,
    padded_size: tuple[int, int] | None = None,
) -> Sequence[Tensor] | Sequence[SemanticSegmentation]:
    """Return the class of every pixel of each image. There is no background class: every pixel gets a class.

    Args:
        outputs: of the model.
        target_sizes: (height, width) of each image in pixels, as a list or a tensor [batch, 2]; None leaves the maps
            at the size of the masks.
        return_segmentation_scores: also return the scores. They need much memory: 850 MB for 250 classes and
            800 x 1066 pixels.
        processed_sizes: (height, width) of each image as the model saw it, resized and without padding: see
            `post_process_instance_segmentation`.
        padded_size: (height, width) of `pixel_values`, needed if it exceeds the largest of `processed_sizes`.

    Returns:
        For each image the map int64 [height, width] of classes, or a `SemanticSegmentation`.

    Raises:
        ValueError: the number of sizes is not that of the images, or sizes do not fit the masks.
    """
    views = image_views(outputs.pred_masks, target_sizes, processed_sizes, padded_size)
    classes = outputs.logits.softmax(-1)[..., :-1]
    scores = torch.einsum("bqc, bqhw -> bchw", classes, outputs.pred_masks.sigmoid())
    if return_segmentation_scores:
        resized = [view.resize(image) for image, view in zip(scores, views)]
        return [SemanticSegmentation(image.argmax(0), image) for image in resized]
    return [_best_class(image, view) for image, view in zip(scores, views)]


def _best_class(scores: Tensor, view: View) -> Tensor:
    """Return the best class of each pixel, int64 [height, width]; scores [classes, h, w] are resized class by class."""
    classes = _possible_classes(scores)
    maps = (view.resize(scores[c : c + 1])[0] for c in classes.tolist())
    return classes[running_argmax(maps).long()]


@torch.no_grad()
def _possible_classes(scores: Tensor) -> Tensor:
    """Return a superset of the classes that are best at some pixel after scores [classes, h, w] are resized.

    A resized pixel is a weighted mean of the four cells around it (fewer at the border). So a class can only be best
    there if in one of these cells its score is at least the minimum over the four cells of every other class. About ten
    of 250 classes pass this test.

    Returns:
        int64 [n], ascending.
    """
    height, width = scores.shape[-2:]
    block = min(height, 2), min(width, 2)
    winners = torch.bincount(running_argmax(scores).flatten()).nonzero().flatten()
    in_all_four = -F.max_pool2d(-scores[winners], block, stride=1)
    reached = in_all_four.amax(0, keepdim=True)
    # Minimum of the thresholds of all 2 x 2 blocks that contain a cell.
    needed = -F.max_pool2d(-reached, block, stride=1, padding=(block[0] - 1, block[1] - 1))
    # Margin for interpolation weights whose rounded sum slightly exceeds 1. Scores are not negative.
    needed *= 1 - 8 * torch.finfo(scores.dtype).eps
    return (~(scores < needed)).flatten(1).any(1).nonzero().flatten()
