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
    """Classes of an image's pixels, with their scores.

    Attributes:
        segmentation: int64 [height, width].
        segmentation_scores: float [classes, height, width]: for each class the sum over the queries of its probability
            times that of the query's mask; not normalised.
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
    """The class of every pixel of each image. There is no background: a pixel that nothing covers gets a class too.

    Args:
        outputs: of the model.
        target_sizes: (height, width) of each image in pixels, as a list or a tensor [batch, 2]; None leaves the maps
            at the masks' size.
        return_segmentation_scores: give the scores as well: much memory, with 250 classes 850 MB for 800 x 1066.
        processed_sizes: (height, width) of each image as the model saw it, resized and without padding: see
            `post_process_instance_segmentation`.
        padded_size: (height, width) of `pixel_values`, where the largest of `processed_sizes` is less.

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
    """The map int64 [height, width] of scores [classes, h, w], which are resized class by class."""
    classes = _possible_classes(scores)
    maps = (view.resize(scores[c : c + 1])[0] for c in classes.tolist())
    return classes[running_argmax(maps).long()]


@torch.no_grad()
def _possible_classes(scores: Tensor) -> Tensor:
    """The classes that are the best of some pixel, and perhaps others, once scores [classes, h, w] are resized.

    A resized pixel lies between the four cells around it, or fewer at the border. A class can be the best there only
    if in one of these cells it has no less than another class has in all four. Of 250 classes some ten can.

    Returns:
        int64 [n], ascending.
    """
    height, width = scores.shape[-2:]
    block = min(height, 2), min(width, 2)
    winners = torch.bincount(running_argmax(scores).flatten()).nonzero().flatten()
    in_all_four = -F.max_pool2d(-scores[winners], block, stride=1)
    reached = in_all_four.amax(0, keepdim=True)
    # The least of what is reached in the blocks that a cell is of.
    needed = -F.max_pool2d(-reached, block, stride=1, padding=(block[0] - 1, block[1] - 1))
    # Weights that in rounding sum up to a little more than 1 must not make a difference. Scores are not negative.
    needed *= 1 - 8 * torch.finfo(scores.dtype).eps
    return (~(scores < needed)).flatten(1).any(1).nonzero().flatten()
