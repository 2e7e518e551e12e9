"""The losses of matched masks of the multi-scale architecture, at the size of the finest map.

A target is how much of each pixel of the map the object covers, so that nothing has to be enlarged. Cross-entropy is
averaged over the surroundings of the object's box, as on the crops of Mask R-CNN (https://arxiv.org/abs/1703.06870), which
makes small objects count as much as large ones; DICE (https://arxiv.org/abs/1606.04797) sees the whole image.

B batch, N the largest number of objects in an image, h x w the finest map, H x W the padded image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.loss.criterion import Labels
from detr.loss.dense_assignment import PaddedTargets
from detr.loss.matcher import Matching
from detr.loss.targets import Targets, check_masks
from detr.model.multiscale.masks import DynamicMasks
from detr.model.multiscale.tokens import TokenGrid

_SURROUNDINGS = 1.5
"""Sides of what is around an object, in those of its box."""


def mask_terms(
    masks: DynamicMasks,
    grid: TokenGrid,
    labels: Labels,
    targets: Targets,
    padded: PaddedTargets,
    matching: Matching,
    weights: Tensor,
) -> dict[str, Tensor]:
    """Weighted sums over the matches of the last layer, float [] each.

    Args:
        masks: of all queries.
        grid: of the tokens.
        labels: with ``masks``.
        targets: the same, gathered.
        padded: the same, padded.
        matching: of the decoder's layers.
        weights: float [B], of the images.

    Raises:
        ValueError: an image has no masks, or masks of another number or shape; the message names it.
    """
    check_masks(labels)
    # The query of each object, in the order of the objects, which is that of the padded ones; where none matched, any.
    query = torch.zeros_like(targets.class_ids)
    query = query.scatter(0, matching.target[-1], matching.query[-1] % masks.kernels.shape[1])
    share = torch.zeros_like(targets.boxes_cxcywh[:, 0]).scatter(
        0, matching.target[-1], weights[matching.image]
    )
    query = torch.zeros_like(padded.class_ids).masked_scatter(padded.real, query)
    share = torch.zeros_like(padded.boxes_cxcywh[..., 0]).masked_scatter(padded.real, share)
    wanted = pool_masks([label["masks"] for label in labels], grid.shapes[0], masks.stride, query.shape[1])
    entropy, dice = mask_losses(masks.of_queries(query).logits(), wanted, padded.boxes_cxcywh, grid)
    return {"loss_mask": (entropy * share).sum(), "loss_dice": (dice * share).sum()}


def pool_masks(masks: Sequence[Tensor], shape: tuple[int, int], stride: int, max_objects: int) -> Tensor:
    """The covered part of every pixel of a map: float32 [B, N, h, w] in 0..1, zeros where there is no object.

    Args:
        masks: one [n, H_i, W_i] per image, 0 or 1 of any dtype, in the upper left corner of the padded image.
        shape: (h, w).
        stride: of the map, in pixels.
        max_objects: N.
    """
    height, width = shape
    pooled = torch.zeros(len(masks), max_objects, height, width, device=masks[0].device)
    for image, own in zip(pooled, masks, strict=True):
        if not len(own):
            continue
        own = own[:, : height * stride, : width * stride].to(torch.float32)
        bottom, right = (-own.shape[1]) % stride, (-own.shape[2]) % stride
        cells = F.avg_pool2d(F.pad(own, (0, right, 0, bottom))[:, None], stride)[:, 0]
        image[: len(own), : cells.shape[1], : cells.shape[2]] = cells
    return pooled


def mask_losses(
    logits: Tensor, wanted: Tensor, boxes_cxcywh: Tensor, grid: TokenGrid
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and DICE loss of each mask, float [B, N] each; padding has no part in them.

    Args:
        logits: float [B, N, h, w].
        wanted: float [B, N, h, w] in 0..1.
        boxes_cxcywh: float [B, N, 4], of the objects.
        grid: of the tokens; its first map is that of the masks.
    """
    height, width = logits.shape[-2:]
    cells = height * width
    logits, wanted = logits.flatten(2), wanted.to(logits.dtype).flatten(2)
    valid = grid.valid[:, None, :cells]
    distance = (grid.centers_xy[:, None, :cells] - boxes_cxcywh[:, :, None, :2]).abs()
    sizes = torch.maximum(boxes_cxcywh[:, :, None, 2:], 2 * grid.sizes_wh[:, None, :cells])
    near = ((distance < sizes * (_SURROUNDINGS / 2)).all(-1) & valid).to(logits.dtype)
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    entropy = (entropy * near).sum(-1) / near.sum(-1).clamp(min=1)
    probability = logits.sigmoid() * valid
    overlap = (probability * wanted).sum(-1)
    dice = 1 - (2 * overlap + 1) / (probability.sum(-1) + wanted.sum(-1) + 1)
    return entropy, dice
