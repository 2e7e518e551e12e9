"""The losses of matched masks: focal loss and DICE loss, at the size of the target masks.

M matched masks, H x W the largest target mask of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ALPHA, GAMMA = 0.25, 2.0
"""Of the focal loss (https://arxiv.org/abs/1708.02002), as in both references."""

# Upsampled masks are large, 3.4 MB at 800 x 1066, and the loss needs several at once: so many pixels at a time.
_CHUNK_PIXELS = 8 * 1024**2


def mask_losses(
    logits: Tensor, masks: Sequence[Tensor], image: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Focal and DICE loss of each matched mask.

    Target masks smaller than the largest of the batch are padded with zeros at the bottom and on the right, and the
    predictions, which are of the padded batch, are stretched to the padded size: as in both references.

    Args:
        logits: float [M, h, w], the predictions.
        masks: one [n, H_i, W_i] per image, 0 or 1 of any dtype.
        image: int64 [M], the image of each match.
        target: int64 [M], index of its target among the targets of the whole batch.

    Returns:
        Two of float [M]: the mean over pixels of the focal loss; ``1 - (2 |p t| + 1) / (|p| + |t| + 1)``.
    """
    if not len(logits):
        return logits.sum((1, 2)), logits.sum((1, 2))
    height, width = (max(mask.shape[side] for mask in masks) for side in (1, 2))
    first = [0]
    for mask in masks:
        first.append(first[-1] + len(mask))
    owners = image.tolist()
    wanted = [masks[i][t - first[i]] for i, t in zip(owners, target.tolist(), strict=True)]
    size = max(1, _CHUNK_PIXELS // (height * width))
    focal, dice = [], []
    for start in range(0, len(wanted), size):
        part = logits[start : start + size]
        padded = torch.stack(
            [_pad(mask.to(logits.device), height, width) for mask in wanted[start : start + size]]
        )
        if len(wanted) > size and torch.is_grad_enabled():
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
    wanted = masks.to(logits.dtype)
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    of_truth = probability * wanted + (1 - probability) * (1 - wanted)
    alpha = ALPHA * wanted + (1 - ALPHA) * (1 - wanted)
    focal = (alpha * entropy * (1 - of_truth) ** GAMMA).mean((1, 2))
    overlap = (probability * wanted).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (probability.sum((1, 2)) + wanted.sum((1, 2)) + 1)
    return focal, dice
