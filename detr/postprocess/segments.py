"""Combine masks and scores of queries into a map of segments: shared by instance and panoptic segmentation.

The results are bitwise equal to those of transformers, in a quarter of the time: masks of rejected queries are not
read, and the others are resized and compared one by one.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Protocol, TypedDict

import torch
from torch import Tensor

from detr.postprocess.running_argmax import running_argmax
from detr.postprocess.view import View

NO_MASK_FOUND = -1
"""Value of all pixels in the map of an image without a query above the threshold."""


class SegmentationOutput(Protocol):
    """The fields of a model output that segmentation post-processing reads.

    Attributes:
        logits: float [batch, queries, classes + 1]; the last class is "no object".
        pred_masks: float [batch, queries, h, w], logits over the padded image.
    """

    logits: Tensor
    pred_masks: Tensor


@dataclass(frozen=True)
class SegmentRules:
    """The conditions for a query to become a segment, and the rules for its id.

    Attributes:
        threshold: the score of a query, the probability of its best class, must exceed it.
        mask_threshold: a pixel belongs to a query's own mask if probability times score is at least this.
        overlap_mask_area_threshold: the share of its own mask that a query wins against the others must exceed it.
        label_ids_to_fuse: classes whose segments are fused into one.
        merge_fused: give fused segments a single entry, and each segment a unique id. Without it they have an entry for
            each query, and segments of other classes after them can share an id, as in transformers.
    """

    threshold: float = 0.5
    mask_threshold: float = 0.5
    overlap_mask_area_threshold: float = 0.8
    label_ids_to_fuse: Set[int] = field(default_factory=frozenset)
    merge_fused: bool = False


class SegmentInfo(TypedDict):
    """A segment of an image.

    Attributes:
        id: value of its pixels in the map, from 1.
        label_id: its class.
        was_fused: whether segments of its class are fused into one.
        score: 0..1, rounded to 6 decimals.
    """

    id: int
    label_id: int
    was_fused: bool
    score: float


class SegmentedImage(TypedDict):
    """The segments of an image.

    Attributes:
        segmentation: int32 [height, width] on the device of the masks, 0 for no segment; without a query above the
            threshold filled with -1, and float32 unless integer maps are requested.
        segments_info: its segments.
    """

    segmentation: Tensor
    segments_info: list[SegmentInfo]


def segments_of_batch(
    outputs: SegmentationOutput, rules: SegmentRules, views: list[View], integer_maps: bool
) -> list[SegmentedImage]:
    """Compute the segments of each image.

    Args:
        outputs: of the model.
        rules: the rules for segments.
        views: of each image.
        integer_maps: make the map of an image without a query above the threshold int32 like the others, not float32.
    """
    best_scores, best_labels = outputs.logits.detach().softmax(-1).max(-1)
    is_candidate = best_labels.ne(outputs.logits.shape[-1] - 1) & (best_scores > rules.threshold)
    results: list[SegmentedImage] = []
    for masks, scores, labels, selected, view in zip(
        outputs.pred_masks.detach(), best_scores, best_labels, is_candidate, views
    ):
        if selected.any():
            segmentation, segments = segments_of_image(
                masks[selected], scores[selected], labels[selected], rules, view
            )
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
) -> tuple[Tensor, list[SegmentInfo]]:
    """Assign each pixel to the query whose probability times score is largest there, and drop poor segments.

    Args:
        masks: float [n, h, w], logits of the queries above the threshold.
        scores: float [n].
        labels: int64 [n].
        rules: the rules for segments; the caller has applied their `threshold`.
        view: of the image.

    Returns:
        The map int32 [height, width], 0 for no segment; and the segments.
    """
    own_areas = []

    def weighted() -> Iterator[Tensor]:
        for probability, score in zip(_sigmoid(masks), scores.view(-1, 1, 1)):
            resized = view.resize(probability[None])
            # A score with dimensions takes part in type promotion (a scalar would not), as in transformers.
            resized *= score
            # A comparison with a bool result takes three times as long. Sums of rows of 0 and 1 are exact in float32.
            inside = torch.ge(
                resized, rules.mask_threshold, out=torch.empty_like(resized, dtype=torch.float32)
            )
            own_areas.append(inside.sum(-1).long().sum())
            yield resized[0]

    winner = running_argmax(weighted()).flatten()
    won, own = torch.bincount(winner, minlength=len(masks)), torch.stack(own_areas)
    # A float32 ratio is compared with a float64 threshold, so that 4 / 5 exceeds 0.8, as in transformers.
    ratios = (won / own).tolist()
    valid = [
        won_area > 0 and own_area > 0 and ratio > rules.overlap_mask_area_threshold
        for won_area, own_area, ratio in zip(won.tolist(), own.tolist(), ratios)
    ]
    ids, segments = _assign_ids(valid, scores.tolist(), labels.tolist(), rules)
    table = torch.tensor(ids, dtype=torch.int32, device=masks.device)
    return table.index_select(0, winner).view(view.output_size(masks)), segments


def _sigmoid(masks: Tensor) -> Tensor:
    """Compute the sigmoid of float [n, h, w] so that equal logits give equal results.

    On a CPU torch computes full vectors and the last few elements of a tensor with different exponentials, which differ
    by one ulp. So 64 elements are appended and removed afterwards. In transformers the last elements are the end of the
    whole batch.
    """
    flat = torch.cat([masks.flatten(), masks.new_zeros(64)]).sigmoid_()
    return flat[: masks.numel()].view_as(masks)


def _assign_ids(
    valid: list[bool], scores: list[float], labels: list[int], rules: SegmentRules
) -> tuple[list[int], list[SegmentInfo]]:
    """Return the segment id of each query, 0 for none, and the segments."""
    ids, current, count = [0] * len(labels), 0, 0
    segments: list[SegmentInfo] = []
    fused: dict[int, SegmentInfo] = {}
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
