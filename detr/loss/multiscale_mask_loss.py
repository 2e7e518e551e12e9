"""Losses of matched masks in the multi-scale architecture, at the size of the finest feature map.

The target of a pixel of the feature map is the fraction of it that the object covers, so predictions need no
upsampling. Cross-entropy is averaged over the object's box and its surroundings, as on the crops of Mask R-CNN
(https://arxiv.org/abs/1703.06870), so that small objects have the same weight as large ones. The DICE loss
(https://arxiv.org/abs/1606.04797) covers the whole image.

B batch, N maximum number of objects in an image, h x w size of the finest feature map, H x W padded image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.loss.dense_assignment import PaddedTargets
from detr.loss.matcher import Matching
from detr.loss.targets import Labels, Targets, check_masks
from detr.model.multiscale.masks import DynamicMasks
from detr.model.multiscale.tokens import TokenGrid

_SURROUNDINGS = 1.5
"""Size of the region in which cross-entropy is averaged, relative to the box of the object."""


def mask_terms(
    masks: DynamicMasks,
    grid: TokenGrid,
    labels: Labels,
    targets: Targets,
    padded: PaddedTargets,
    matching: Matching,
    weights: Tensor,
) -> dict[str, Tensor]:
    """Compute the weighted sums of the mask losses over the matches of the last layer, float [] each.

    Args:
        masks: masks of all queries.
        grid: grid of the tokens.
        labels: labels with ``masks``.
        targets: the labels, gathered.
        padded: the labels, padded.
        matching: matches of the decoder layers.
        weights: float [B], weights of the images.

    Raises:
        ValueError: an image has no masks, or masks of a wrong number or shape; the message names the image.
    """
    check_masks(labels)
    # The query of each object, in the order of `targets`, which `padded` preserves. Unmatched objects get query 0, with
    # weight 0.
    query = torch.zeros_like(targets.class_ids)
    query = query.scatter(0, matching.target[-1], matching.query[-1] % masks.kernels.shape[1])
    share = torch.zeros_like(targets.boxes_cxcywh[:, 0]).scatter(
        0, matching.target[-1], weights[matching.image]
    )
    query = torch.zeros_like(padded.class_ids).masked_scatter(padded.real, query)
    share = torch.zeros_like(padded.boxes_cxcywh[..., 0]).masked_scatter(padded.real, share)
    target_masks = pool_masks(
        [label["masks"] for label in labels], grid.shapes[0], masks.stride, query.shape[1]
    )
    logits = masks.select_queries(query).logits()
    entropy, dice = mask_losses(logits, target_masks, padded.boxes_cxcywh, grid)
    return {"loss_mask": (entropy * share).sum(), "loss_dice": (dice * share).sum()}


def pool_masks(masks: Sequence[Tensor], shape: tuple[int, int], stride: int, max_objects: int) -> Tensor:
    """Compute the covered fraction of every pixel of the feature map.

    Args:
        masks: one [n, H_i, W_i] per image, 0 or 1 of any dtype, in the upper left corner of the padded image.
        shape: (h, w).
        stride: stride of the feature map, in pixels.
        max_objects: N.

    Returns:
        float32 [B, N, h, w] in 0..1, zeros on padding objects.
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
    logits: Tensor, target_masks: Tensor, boxes_cxcywh: Tensor, grid: TokenGrid
) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy and DICE loss of each mask, float [B, N] each, ignoring padding.

    Args:
        logits: float [B, N, h, w].
        target_masks: float [B, N, h, w] in 0..1.
        boxes_cxcywh: float [B, N, 4], boxes of the objects.
        grid: grid of the tokens; masks have the size of its first feature map.
    """
    height, width = logits.shape[-2:]
    cells = height * width
    logits, target = logits.flatten(2), target_masks.to(logits.dtype).flatten(2)
    valid = grid.valid[:, None, :cells]
    distance = (grid.centers_xy[:, None, :cells] - boxes_cxcywh[:, :, None, :2]).abs()
    sizes = torch.maximum(boxes_cxcywh[:, :, None, 2:], 2 * grid.sizes_wh[:, None, :cells])
    near = ((distance < sizes * (_SURROUNDINGS / 2)).all(-1) & valid).to(logits.dtype)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    entropy = (entropy * near).sum(-1) / near.sum(-1).clamp(min=1)
    probability = logits.sigmoid() * valid
    overlap = (probability * target).sum(-1)
    dice = 1 - (2 * overlap + 1) / (probability.sum(-1) + target.sum(-1) + 1)
    return entropy, dice
