"""Task-aligned assignment (TOOD, https://arxiv.org/abs/2108.07755): which tokens learn which object, for a whole batch.

A token learns an object well that it both classifies and localizes well: the tokens with the largest product of score
and IoU are taught, and the score that they are taught is how well they do.

B batch, N the largest number of objects in an image, S tokens, C classes.
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

# Keep the order of tokens whose box does not touch the object yet: the first steps have no other.
_LEAST_SCORE, _LEAST_IOU = 1e-6, 1e-4


@dataclass(frozen=True)
class PaddedTargets:
    """The objects of a batch, as many for every image.

    Attributes:
        class_ids: int64 [B, N], 0 where there is no object.
        boxes_cxcywh: float [B, N, 4], zeros where there is no object.
        real: bool [B, N].
    """

    class_ids: Tensor
    boxes_cxcywh: Tensor
    real: Tensor


def pad_targets(targets: Targets) -> PaddedTargets:
    """The same objects with one row per image; N is at least 1."""
    counts, device = np.asarray(targets.counts, dtype=np.int64), targets.class_ids.device
    batch, most = len(counts), max(int(counts.max(initial=0)), 1)
    image = np.repeat(np.arange(batch), counts)
    position = np.arange(len(image)) - np.repeat(np.cumsum(counts) - counts, counts)
    flat = torch.from_numpy(image * most + position).to(device, non_blocking=True)
    real = torch.zeros(batch * most, dtype=torch.bool, device=device).index_fill(0, flat, True)
    class_ids = torch.zeros(batch * most, dtype=torch.int64, device=device)
    boxes = targets.boxes_cxcywh.new_zeros(batch * most, 4)
    return PaddedTargets(
        class_ids.index_copy(0, flat, targets.class_ids).view(batch, most),
        boxes.index_copy(0, flat, targets.boxes_cxcywh).view(batch, most, 4),
        real.view(batch, most),
    )


@dataclass(frozen=True)
class Assignment:
    """What every token is taught.

    Attributes:
        target: int64 [B, S], the object's position in the image's row of `PaddedTargets`; 0 where there is none.
        quality: float [B, S] in 0..1, the score to be learned; 0 where the token learns no object.
    """

    target: Tensor
    quality: Tensor


@torch.no_grad()
def assign_tokens(
    predictions: DensePredictions, targets: PaddedTargets, grid: TokenGrid, settings: MultiScaleConfig
) -> Assignment:
    """Assign up to ``assigned_tokens`` tokens to every object, and at most one object to every token.

    Candidates are the tokens whose center is in the object's box, or less than the token's size from its center, so that no
    object is too small. A token that several objects chose learns the one with which it is aligned best. Qualities are the
    alignments scaled so that an object's best one is its best IoU.

    Args:
        predictions: of the dense head.
        targets: of the batch.
        grid: of the tokens.
        settings: exponents and number of tokens.
    """
    logits, boxes_cxcywh = predictions.logits, predictions.boxes_cxcywh
    object_boxes = targets.boxes_cxcywh[:, :, None]
    iou, _ = elementwise_iou(box_cxcywh_to_xyxy(object_boxes), box_cxcywh_to_xyxy(boxes_cxcywh)[:, None])
    of_class = targets.class_ids[..., None].expand(-1, -1, logits.shape[1])
    score = logits.transpose(1, 2).gather(1, of_class).sigmoid()

    inside = near = targets.real[..., None] & grid.valid[:, None]
    for axis in range(2):  # one tensor per axis: see `detr.boxes`
        center, size = (each[:, None, :, axis].contiguous() for each in (grid.centers_xy, grid.sizes_wh))
        distance = (center - object_boxes[..., axis]).abs()
        inside = inside & (distance < object_boxes[..., axis + 2] / 2)
        near = near & (distance < size)
    candidate = inside | near
    alignment = score.clamp(min=_LEAST_SCORE) ** settings.score_exponent
    alignment = (alignment * iou.clamp(min=_LEAST_IOU) ** settings.iou_exponent).masked_fill(~candidate, 0)

    best, index = alignment.topk(min(settings.assigned_tokens, alignment.shape[-1]), dim=-1)
    chosen = torch.zeros_like(alignment).scatter(-1, index, best)
    top_iou = torch.where(best > 0, iou.gather(-1, index), 0).amax(-1, keepdim=True)
    scaled = chosen * (top_iou / best[..., :1].clamp(min=torch.finfo(best.dtype).tiny))
    target = chosen.max(1).indices
    return Assignment(target, scaled.gather(1, target[:, None])[:, 0])
