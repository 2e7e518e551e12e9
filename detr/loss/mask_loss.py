"""Losses of matched masks: focal loss and DICE loss, at the size of the target masks.

M matched masks, H x W size of the largest target mask of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ALPHA, GAMMA = 0.25, 2.0
"""Parameters of the focal loss (https://arxiv.org/abs/1708.02002), as in the original and in transformers."""

# Number of pixels per chunk of masks. Upsampled masks are large (3.4 MB at 800 x 1066), and the loss needs several
# tensors of this size at the same time.
_CHUNK_PIXELS = 8 * 1024**2


def mask_losses(
    logits: Tensor, masks: Sequence[Tensor], image: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute focal and DICE loss of each matched mask.

    As in the original and in transformers, target masks are padded with zeros at the bottom and on the right to the
    size of the largest in the batch, and predictions, which cover the padded images, are resized to that size.

    Args:
        logits: float [M, h, w], the predictions.
        masks: one [n, H_i, W_i] per image, 0 or 1 of any dtype.
        image: int64 [M], the image of each match.
        target: int64 [M], the index of its target among the targets of the whole batch.

    Returns:
        The mean over pixels of the focal loss, and the DICE loss ``1 - (2 |p t| + 1) / (|p| + |t| + 1)`` of
        probabilities p and target t, float [M] each.
    """
    if not len(logits):
        return logits.sum((1, 2)), logits.sum((1, 2))
    height, width = (max(mask.shape[side] for mask in masks) for side in (1, 2))
    first = [0]
    for mask in masks:
        first.append(first[-1] + len(mask))
    target_masks = [masks[i][t - first[i]] for i, t in zip(image.tolist(), target.tolist(), strict=True)]
    size = max(1, _CHUNK_PIXELS // (height * width))
    focal, dice = [], []
    for start in range(0, len(target_masks), size):
        part = logits[start : start + size]
        padded = torch.stack(
            [_pad(mask.to(logits.device), height, width) for mask in target_masks[start : start + size]]
        )
        if len(target_masks) > size and torch.is_grad_enabled():
            losses = checkpoint(_losses, part, padded, use_reentrant=False)
        else:
            losses = _losses(part, padded)
        focal.append(losses[0])
        dice.append(losses[1])
    return torch.cat(focal), torch.cat(dice)


def _pad(mask: Tensor, height: int, width: int) -> Tensor:
    return F.pad(mask, (0, width - mask.shape[1], 0, height - mask.shape[0]))


def _losses(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.interpolate(logits[:, None], size=masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    target = masks.to(logits.dtype)
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    target_probability = probability * target + (1 - probability) * (1 - target)
    alpha = ALPHA * target + (1 - ALPHA) * (1 - target)
    focal = (alpha * entropy * (1 - target_probability) ** GAMMA).mean((1, 2))
    overlap = (probability * target).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (probability.sum((1, 2)) + target.sum((1, 2)) + 1)
    return focal, dice
