"""From one sigmoid per class to the one softmax over classes and "no object" that DETR's outputs have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST = 1e-7
"""Probability of "no object" at least, so that its logarithm is finite."""


def softmax_logits(logits: Tensor) -> Tensor:
    """Logits of C + 1 classes whose softmax has the sigmoid score of the best class as its probability.

    Other classes keep their scores too where all scores add up to at most 1; else they share what the best one leaves.
    So the best class and its score, which is what post-processing reads, are always those of the sigmoids.

    Args:
        logits: float [..., C], before the sigmoid.

    Returns:
        float [..., C + 1], normalized: their softmax is their exponential.
    """
    best, index = logits.max(-1, keepdim=True)
    is_best = torch.arange(logits.shape[-1], device=logits.device) == index
    others = logits.sigmoid().masked_fill(is_best, 0).sum(-1, keepdim=True)
    # 1 - sigmoid(best), without its rounding where that is nearly 0
    left = (-best).sigmoid().clamp(min=_LEAST)
    # In logarithms: a score of 1e-20 keeps its order among the others. Softplus is exact in ONNX too, where the logarithm
    # of a sigmoid would have the error of a fast sigmoid.
    shrink = (left / others.clamp(min=_LEAST)).clamp(max=1).log()
    classes = -F.softplus(-logits) + torch.where(is_best, 0.0, shrink)
    nothing = (left - others).clamp(min=_LEAST).log()
    return torch.cat((classes, nothing), -1)
