"""Distinct queries (DDQ, https://arxiv.org/abs/2303.12776): the tokens that a decoder starts from.

The best tokens of an image mostly lie on the same few objects. Queries that start from duplicates have to unlearn each
other's predictions, which costs a short training; so duplicates are removed before the decoder by class-aware
non-maximum suppression, and none is needed after it.

B batch, S tokens, K candidates, Q queries, C classes. Everything is a function of one image alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.boxes import box_cxcywh_to_xyxy, elementwise_iou
from detr.model.capture import may_branch_on_values
from detr.model.multiscale.tokens import TokenGrid

_ROUNDS = 31
_LARGEST_LOGIT = 16.0


@torch.no_grad()
def suppress_duplicates(boxes_xyxy: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Class-aware non-maximum suppression of a batch, without a loop over boxes and without waiting for a device.

    A box is kept iff no kept box before it has its class and an IoU with it above the threshold. Iterating this
    definition from "all are kept" gives, in turn, supersets and subsets of the greedy result, which agree after as many
    rounds as the longest chain of boxes of which each one would suppress the next. The number of rounds is fixed and odd, so
    that it can be exported, and what a longer chain leaves undecided is suppressed: kept boxes never overlap.

    Args:
        boxes_xyxy: float [B, K, 4], best first.
        classes: int64 [B, K].
        threshold: IoU above which the later box is suppressed.

    Returns:
        bool [B, K], True where kept.
    """
    iou, _ = elementwise_iou(boxes_xyxy[:, :, None], boxes_xyxy[:, None])
    same = classes[:, :, None] == classes[:, None]
    # [b, i, j]: box i, if kept, suppresses the later box j
    suppresses = ((iou > threshold) & same).triu(1).to(torch.float32)
    kept = torch.ones_like(suppresses[:, :1])
    for _ in range(_ROUNDS):
        last, kept = kept, (kept @ suppresses == 0).to(torch.float32)
        if kept.device.type == "cpu" and may_branch_on_values() and torch.equal(kept, last):
            break  # every further round gives the same
    return kept[:, 0] > 0


@torch.no_grad()
def distinct_tokens(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    grid: TokenGrid,
    *,
    queries: int,
    candidates: int,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """Choose the tokens that become queries.

    Tokens that are the best of their 3 x 3 neighborhood for a class come first; the best ``candidates`` go through
    suppression, since its cost is quadratic; the best of those that it keeps are chosen. Where fewer remain than there are
    queries, suppressed ones fill the places and do not count: they would be detections of objects that others have.

    Args:
        logits: float [B, S, C].
        boxes_cxcywh: float [B, S, 4].
        grid: of the tokens.
        queries: Q.
        candidates: K, at least Q.
        threshold: see `suppress_duplicates`.

    Returns:
        int64 [B, Q], indices of tokens, best first; and bool [B, Q], False on a token that is suppressed, padding, or a
        repeated one of an image with fewer tokens than queries.
    """
    logits = logits.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
    score, classes = logits.max(-1)
    # tiers that no logit can cross: peaks, other tokens, padding
    gap = 4 * _LARGEST_LOGIT
    score = score - gap * (~_is_peak(logits, grid)) - 2 * gap * (~grid.valid)
    # as many more as there are candidates: an image may have fewer tokens
    score = F.pad(score, (0, candidates), value=-4 * gap)
    best, index = score.topk(candidates, dim=1)
    last = logits.shape[1] - 1
    index, real = index.clamp(max=last), best > -2 * gap + _LARGEST_LOGIT
    boxes = boxes_cxcywh.gather(1, index[..., None].expand(-1, -1, 4))
    kept = suppress_duplicates(box_cxcywh_to_xyxy(boxes), classes.gather(1, index), threshold)
    rank = torch.arange(candidates, device=index.device) + candidates * (~kept)
    chosen = rank.topk(queries, dim=1, largest=False, sorted=True).indices
    return index.gather(1, chosen), (real & kept).gather(1, chosen)


def _is_peak(logits: Tensor, grid: TokenGrid) -> Tensor:
    """bool [B, S]: whether a token has the highest logit of its 3 x 3 neighborhood, for any class."""
    peaks = []
    for of_map, valid, shape in zip(grid.per_map(logits), grid.per_map(grid.valid), grid.shapes, strict=True):
        image = of_map.masked_fill(~valid[..., None], -_LARGEST_LOGIT).transpose(1, 2).unflatten(2, shape)
        peaks.append((image >= F.max_pool2d(image, 3, 1, 1)).any(1).flatten(1))
    return torch.cat(peaks, 1)
