"""Task-aligned assignment of objects to tokens (TOOD, https://arxiv.org/abs/2108.07755), vectorized over a batch.

The alignment of a token with an object measures how well the token both classifies and localizes it:
alignment = score^a IoU^b. The tokens with the highest alignment are assigned to the object. The target of their score,
called quality, is their alignment, scaled so that the best token of the object gets the object's best IoU.

B batch, N maximum number of objects in an image, S tokens, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detr.boxes import box_cxcywh_to_xyxy, elementwise_iou
from detr.loss.targets import Targets
from detr.model.multiscale.dense_head import DensePredictions
from detr.model.multiscale.tokens import TokenGrid
from detr.multiscale_config import MultiScaleConfig

# With an IoU of 0 all alignments would be 0. The minimums keep the order of tokens whose boxes do not overlap the
# object yet, which is all that the first steps have.
_MIN_SCORE, _MIN_IOU = 1e-6, 1e-4


@dataclass(frozen=True)
class PaddedTargets:
    """The objects of a batch, padded to the same number for every image.

    Attributes:
        class_ids: int64 [B, N], 0 on padding.
        boxes_cxcywh: float [B, N, 4], zeros on padding.
        real: bool [B, N], False on padding.
    """

    class_ids: Tensor
    boxes_cxcywh: Tensor
    real: Tensor


def pad_targets(targets: Targets) -> PaddedTargets:
    """Pad the targets to one row per image; N is at least 1."""
    counts, device = np.asarray(targets.counts, dtype=np.int64), targets.class_ids.device
    batch, max_objects = len(counts), max(int(counts.max(initial=0)), 1)
    image = np.repeat(np.arange(batch), counts)
    position = np.arange(len(image)) - np.repeat(np.cumsum(counts) - counts, counts)
    flat = torch.from_numpy(image * max_objects + position).to(device, non_blocking=True)
    real = torch.zeros(batch * max_objects, dtype=torch.bool, device=device).index_fill(0, flat, True)
    class_ids = torch.zeros(batch * max_objects, dtype=torch.int64, device=device)
    boxes = targets.boxes_cxcywh.new_zeros(batch * max_objects, 4)
    return PaddedTargets(
        class_ids.index_copy(0, flat, targets.class_ids).view(batch, max_objects),
        boxes.index_copy(0, flat, targets.boxes_cxcywh).view(batch, max_objects, 4),
        real.view(batch, max_objects),
    )


@dataclass(frozen=True)
class Assignment:
    """Targets of the tokens.

    Attributes:
        target: int64 [B, S], the index of the assigned object in the image's row of `PaddedTargets`; 0 if none.
        quality: float [B, S] in 0..1, the target of the score; 0 if no object is assigned.
    """

    target: Tensor
    quality: Tensor


@torch.no_grad()
def assign_tokens(
    predictions: DensePredictions, targets: PaddedTargets, grid: TokenGrid, settings: MultiScaleConfig
) -> Assignment:
    """Assign up to ``assigned_tokens`` tokens to every object, and at most one object to every token.

    1. The candidates of an object are the tokens whose center is in its box. Tokens that are closer to its center than
       their own size are also candidates, so that no object is too small to have any.
    2. The object gets the ``assigned_tokens`` candidates with the highest alignment.
    3. A token with several objects is assigned to the object with which its alignment is highest.

    Args:
        predictions: of the dense head.
        targets: of the batch.
        grid: of the tokens.
        settings: exponents and maximum number of tokens.
    """
    logits, boxes_cxcywh = predictions.logits, predictions.boxes_cxcywh
    object_boxes = targets.boxes_cxcywh[:, :, None]
    iou, _ = elementwise_iou(box_cxcywh_to_xyxy(object_boxes), box_cxcywh_to_xyxy(boxes_cxcywh)[:, None])
    class_ids = targets.class_ids[..., None].expand(-1, -1, logits.shape[1])
    score = logits.transpose(1, 2).gather(1, class_ids).sigmoid()

    inside = near = targets.real[..., None] & grid.valid[:, None]
    for axis in range(2):  # one contiguous tensor per axis, so that a CPU vectorizes: see `detr.boxes._sides`
        center, size = (each[:, None, :, axis].contiguous() for each in (grid.centers_xy, grid.sizes_wh))
        distance = (center - object_boxes[..., axis]).abs()
        inside = inside & (distance < object_boxes[..., axis + 2] / 2)
        near = near & (distance < size)
    candidate = inside | near
    alignment = score.clamp(min=_MIN_SCORE) ** settings.score_exponent
    alignment = (alignment * iou.clamp(min=_MIN_IOU) ** settings.iou_exponent).masked_fill(~candidate, 0)

    best, index = alignment.topk(min(settings.assigned_tokens, alignment.shape[-1]), dim=-1)
    # [B, N, S]: the alignment of chosen tokens, 0 of others
    chosen = torch.zeros_like(alignment).scatter(-1, index, best)
    # quality = alignment / (best alignment of the object) * (best IoU of its chosen tokens)
    top_iou = torch.where(best > 0, iou.gather(-1, index), 0).amax(-1, keepdim=True)
    scaled = chosen * (top_iou / best[..., :1].clamp(min=torch.finfo(best.dtype).tiny))
    target = chosen.max(1).indices
    return Assignment(target, scaled.gather(1, target[:, None])[:, 0])
