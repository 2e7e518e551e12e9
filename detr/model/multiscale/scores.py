"""Convert a sigmoid score per class to a softmax over classes and "no object", as in the outputs of DETR."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_PROBABILITY = 1e-7
"""Minimum probability of "no object", so that its logarithm is finite."""


def softmax_logits(logits: Tensor) -> Tensor:
    """Convert sigmoid logits of C classes to softmax logits of C + 1 classes.

    The probability of the best class is its sigmoid score. The other classes also have their sigmoid scores, if all
    scores add up to at most 1; otherwise, their scores are scaled to add up to 1 minus the best score. The best class
    and its score, which are what post-processing uses, are therefore always those of the sigmoids.

    Args:
        logits: float [..., C], before the sigmoid.

    Returns:
        float [..., C + 1], log-probabilities: their softmax is their exponential.
    """
    best, index = logits.max(-1, keepdim=True)
    is_best = torch.arange(logits.shape[-1], device=logits.device) == index
    others = logits.sigmoid().masked_fill(is_best, 0).sum(-1, keepdim=True)
    # 1 - sigmoid(best), without cancellation near 0
    remaining = (-best).sigmoid().clamp(min=_MIN_PROBABILITY)
    # Computed in logarithms, so that scores as small as 1e-20 keep their order. log(sigmoid(x)) = -softplus(-x), which
    # is also exact in ONNX, where sigmoid is a fast approximation.
    log_scale = (remaining / others.clamp(min=_MIN_PROBABILITY)).clamp(max=1).log()
    classes = -F.softplus(-logits) + torch.where(is_best, 0.0, log_scale)
    no_object = (remaining - others).clamp(min=_MIN_PROBABILITY).log()
    return torch.cat((classes, no_object), -1)
