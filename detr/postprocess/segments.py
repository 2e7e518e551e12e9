"""From masks and scores of queries to a map of segments: what instance and panoptic segmentation share.

The results are transformers' to the bit, in a quarter of the time: masks of dropped queries are never touched, and
those kept are resized and compared one by one.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from detr.postprocess.running_argmax import running_argmax
from detr.postprocess.view import View

NO_MASK_FOUND = -1
"""Every pixel of the map of an image without a kept query."""


class SegmentationOutput(Protocol):
    """What post-processing reads of a segmentation model's output.

    Attributes:
        logits: float [batch, queries, classes + 1], the last class being "no object".
        pred_masks: float [batch, queries, h, w], logits over the padded image.
    """

    logits: Tensor
    pred_masks: Tensor


@dataclass(frozen=True)
class SegmentRules:
    """When a query becomes a segment, and of which id.

    Attributes:
        threshold: a query's score, the probability of its best class, must exceed it.
        mask_threshold: a pixel belongs to a query's own mask where probability times score is not less.
        overlap_mask_area_threshold: the part of its own mask that a query wins from the others must exceed it.
        label_ids_to_fuse: classes of which all segments are one.
        merge_fused: give these one entry, and every other segment an id of its own. Without it they have an entry for
            each query, and segments of other classes after them can get an id twice, as in transformers.
    """

    threshold: float = 0.5
    mask_threshold: float = 0.5
    overlap_mask_area_threshold: float = 0.8
    label_ids_to_fuse: Set[int] = field(default_factory=frozenset)
    merge_fused: bool = False


def segments_of_batch(
    outputs: SegmentationOutput, rules: SegmentRules, views: list[View], integer_maps: bool
) -> list[dict[str, Any]]:
    """Each image's `segmentation` [height, width] and `segments_info`.

    Args:
        outputs: of the model.
        rules: what becomes a segment.
        views: of each image.
        integer_maps: make the map of an image without a kept query int32 like the others, not float32.
    """
    best_scores, best_labels = outputs.logits.detach().softmax(-1).max(-1)
    kept = best_labels.ne(outputs.logits.shape[-1] - 1) & (best_scores > rules.threshold)
    results = []
    for masks, scores, labels, keep, view in zip(
        outputs.pred_masks.detach(), best_scores, best_labels, kept, views
    ):
        if keep.any():
            segmentation, segments = segments_of_image(masks[keep], scores[keep], labels[keep], rules, view)
        else:
            dtype = torch.int32 if integer_maps else torch.float32
            segmentation = torch.full(
                view.output_size(masks), NO_MASK_FOUND, dtype=dtype, device=masks.device
            )
            segments = []
        results.append({"segmentation": segmentation, "segments_info": segments})
    return results


def segments_of_image(
    masks: Tensor, scores: Tensor, labels: Tensor, rules: SegmentRules, view: View
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Give every pixel to the query whose probability times score is largest there, and drop poor segments.

    Args:
        masks: float [n, h, w], logits of the kept queries.
        scores: float [n].
        labels: int64 [n].
        rules: what becomes a segment; its `threshold` was applied.
        view: of the image.

    Returns:
        The map int32 [height, width], 0 where there is no segment; and a dict for each segment: `id`, `label_id`,
        `was_fused` and `score`.
    """
    own_areas = []

    def weighted() -> Iterator[Tensor]:
        for probability, score in zip(_sigmoid(masks), scores.view(-1, 1, 1)):
            resized = view.resize(probability[None])
            # A score of one dimension or more takes part in type promotion, as the reference's does.
            resized *= score
            # A bool from the comparison would take three times as long; a sum of rows is exact in float32.
            inside = torch.ge(
                resized, rules.mask_threshold, out=torch.empty_like(resized, dtype=torch.float32)
            )
            own_areas.append(inside.sum(-1).long().sum())
            yield resized[0]

    winner = running_argmax(weighted()).flatten()
    won, own = torch.bincount(winner, minlength=len(masks)), torch.stack(own_areas)
    # A ratio of float32 against a threshold of float64: 4 / 5 exceeds 0.8, as in the reference.
    ratios = (won / own).tolist()
    valid = [
        won_area > 0 and own_area > 0 and ratio > rules.overlap_mask_area_threshold
        for won_area, own_area, ratio in zip(won.tolist(), own.tolist(), ratios)
    ]
    ids, segments = _name_segments(valid, scores.tolist(), labels.tolist(), rules)
    table = torch.tensor(ids, dtype=torch.int32, device=masks.device)
    return table.index_select(0, winner).view(view.output_size(masks)), segments


def _sigmoid(masks: Tensor) -> Tensor:
    """The sigmoid of float [n, h, w], in which equal masks stay equal.

    On a CPU the last few elements of a tensor are computed by another exponential than full vectors, an ulp off; the
    elements appended here take their place. Transformers has them at the end of the batch.
    """
    flat = torch.cat([masks.flatten(), masks.new_zeros(64)]).sigmoid_()
    return flat[: masks.numel()].view_as(masks)


def _name_segments(
    valid: list[bool], scores: list[float], labels: list[int], rules: SegmentRules
) -> tuple[list[int], list[dict[str, Any]]]:
    """The id of each query, 0 for none, and the segments."""
    ids, current, count = [0] * len(labels), 0, 0
    segments: list[dict[str, Any]] = []
    fused: dict[int, dict[str, Any]] = {}
    for k, label in enumerate(labels):
        if not valid[k]:
            continue
        score = round(scores[k], 6)
        first = fused.get(label)
        if first is None:
            current = (count if rules.merge_fused else current) + 1
            count += 1
        else:
            current = first["id"]
        ids[k] = current
        if first is not None and rules.merge_fused:
            first["score"] = max(first["score"], score)
            continue
        fuse = label in rules.label_ids_to_fuse
        segments.append({"id": current, "label_id": label, "was_fused": fuse, "score": score})
        if fuse:
            fused.setdefault(label, segments[-1])
    return ids, segments
