"""Select the distinct tokens that become queries (DDQ, https://arxiv.org/abs/2303.12776).

The tokens with the highest scores mostly lie on the same few objects. A decoder that starts from such duplicates first
has to learn to suppress them, which is too slow for a short training. Duplicates are therefore removed before the
decoder, by class-aware non-maximum suppression; no suppression is needed after it.

B batch, S tokens, K candidates, Q queries, C classes. Each image is processed independently of the others in its batch.
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
    """Apply class-aware non-maximum suppression to a batch, without a loop over boxes or device synchronization.

    Greedy suppression keeps a box if and only if no kept box before it has the same class and an IoU with it above the
    threshold: kept[j] = not any(kept[i] and suppresses[i, j] for i < j). The result is the fixed point of this
    equation, found by iteration from "all boxes are kept":

    - Odd rounds give subsets of the fixed point and even rounds supersets, because keeping more boxes suppresses more.
    - After n rounds, every box at the end of a chain of at most n boxes is decided. A chain is a sequence of boxes each
      of which would suppress the next.

    The number of rounds is fixed, so that the loop can be exported. It is odd, so boxes that are still undecided at the
    end of longer chains are suppressed, and kept boxes never overlap.

    Args:
        boxes_xyxy: float [B, K, 4], best first.
        classes: int64 [B, K].
        threshold: the IoU above which the later of two boxes is suppressed.

    Returns:
        bool [B, K], True on boxes that are kept.
    """
    iou, _ = elementwise_iou(boxes_xyxy[:, :, None], boxes_xyxy[:, None])
    same = classes[:, :, None] == classes[:, None]
    # [b, i, j]: box i, if it is kept, suppresses the later box j
    suppresses = ((iou > threshold) & same).triu(1).to(torch.float32)
    kept = torch.ones_like(suppresses[:, :1])
    for _ in range(_ROUNDS):
        last, kept = kept, (kept @ suppresses == 0).to(torch.float32)
        if kept.device.type == "cpu" and may_branch_on_values() and torch.equal(kept, last):
            break  # the fixed point is reached
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

    1. Rank the tokens by score. Tokens that have the highest score of their 3 x 3 neighborhood for a class come first.
    2. Apply `suppress_duplicates` to the first ``candidates`` tokens only, since its cost is quadratic.
    3. Choose the first ``queries`` of the tokens that it keeps. If there are fewer, suppressed tokens fill the
       remaining places. They are marked, so that they do not become second detections of an object.

    Args:
        logits: float [B, S, C].
        boxes_cxcywh: float [B, S, 4].
        grid: grid of the tokens.
        queries: Q.
        candidates: K, at least Q.
        threshold: see `suppress_duplicates`.

    Returns:
        int64 [B, Q], indices of tokens, best first; and bool [B, Q], False on tokens that only fill a place: suppressed
        tokens, padding, or repeated tokens of an image with fewer tokens than queries.
    """
    logits = logits.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
    score, classes = logits.max(-1)
    # Three tiers: peaks, other tokens, padding. The gap between tiers is larger than the range of logits, so every
    # token of a tier ranks above all tokens of the next.
    gap = 4 * _LARGEST_LOGIT
    score = score - gap * (~_is_peak(logits, grid)) - 2 * gap * (~grid.valid)
    # An image may have fewer tokens than candidates: append dummy tokens, below all tiers, so that topk is valid.
    score = F.pad(score, (0, candidates), value=-4 * gap)
    best, index = score.topk(candidates, dim=1)
    last = logits.shape[1] - 1
    # A dummy repeats the last token. Peaks and other tokens score above the threshold, padding and dummies below.
    index, real = index.clamp(max=last), best > -2 * gap + _LARGEST_LOGIT
    boxes = boxes_cxcywh.gather(1, index[..., None].expand(-1, -1, 4))
    kept = suppress_duplicates(box_cxcywh_to_xyxy(boxes), classes.gather(1, index), threshold)
    # Kept candidates in order of score, then suppressed ones: ranks are distinct, which makes topk deterministic.
    rank = torch.arange(candidates, device=index.device) + candidates * (~kept)
    chosen = rank.topk(queries, dim=1, largest=False, sorted=True).indices
    return index.gather(1, chosen), (real & kept).gather(1, chosen)


def _is_peak(logits: Tensor, grid: TokenGrid) -> Tensor:
    """Return whether a token has the highest logit of its 3 x 3 neighborhood for any class, bool [B, S]."""
    peaks = []
    for tokens, valid, shape in zip(grid.per_map(logits), grid.per_map(grid.valid), grid.shapes, strict=True):
        image = tokens.masked_fill(~valid[..., None], -_LARGEST_LOGIT).transpose(1, 2).unflatten(2, shape)
        peaks.append((image >= F.max_pool2d(image, 3, 1, 1)).any(1).flatten(1))
    return torch.cat(peaks, 1)
