"""Hungarian matching of predictions to targets, for all decoder layers together.

L decoder layers, B batch, Q queries, C classes, T objects in the batch, M matches per layer (the sum over images of
min(Q, objects)).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detr.boxes import box_cxcywh_to_xyxy, elementwise_generalized_iou
from detr.loss.targets import Labels, Targets, raise_faults


@dataclass(frozen=True)
class MatchingCost:
    """Weights of the three terms of the matching cost.

    Raises:
        ValueError: all are 0.
    """

    class_cost: float
    bbox_cost: float
    giou_cost: float

    def __post_init__(self) -> None:
        if not (self.class_cost or self.bbox_cost or self.giou_cost):
            raise ValueError("All costs of the Matcher can't be 0")


@dataclass(frozen=True)
class Matching:
    """The matched pairs of queries and targets.

    Attributes:
        query: int64 [L, M], indices into the flattened [B * Q] queries.
        target: int64 [L, M], indices into the T targets of the batch.
        image: int64 [M], indices of the images, the same in every layer.
    """

    query: Tensor
    target: Tensor
    image: Tensor


def matching_cost(logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, cost: MatchingCost) -> Tensor:
    """Compute the cost of every pair of a target and a query of its image.

    Args:
        logits: float [L, B, Q, C + 1].
        boxes_cxcywh: float [L, B, Q, 4].
        targets: on the same device.
        cost: weights of the terms.

    Returns:
        float [L, T, Q].
    """
    image_of_target = [image for image, count in enumerate(targets.counts) for _ in range(count)]
    image = torch.tensor(image_of_target).to(logits.device, non_blocking=True)
    target_boxes = targets.boxes_cxcywh[:, None]
    class_cost = -logits.softmax(-1)[:, image, :, targets.class_ids].transpose(0, 1)
    bbox_cost = (boxes_cxcywh[:, image] - target_boxes).abs().sum(-1)
    boxes_xyxy = box_cxcywh_to_xyxy(boxes_cxcywh)[:, image]
    giou_cost = -elementwise_generalized_iou(boxes_xyxy, box_cxcywh_to_xyxy(target_boxes))
    return cost.class_cost * class_cost + cost.bbox_cost * bbox_cost + cost.giou_cost * giou_cost


@torch.no_grad()
def hungarian_matching(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    targets: Targets,
    cost: MatchingCost,
    labels: Labels = (),
) -> Matching:
    """Match the targets of each image one-to-one to queries with minimum total cost, in every layer.

    An image with more targets than queries gets Q matches. A query with a non-finite prediction is matched only if no
    other query is left. There is a single copy from the device to the host, which also transfers the check of the label
    values.

    Args:
        logits: float [L, B, Q, C + 1].
        boxes_cxcywh: float [L, B, Q, 4].
        targets: see `detr.loss.targets.gather_targets`.
        cost: weights of the cost terms.
        labels: for the error message, if ``targets.faults`` is set.

    Returns:
        The matches, for each image and layer in ascending order of the query.

    Raises:
        ValueError: a label is invalid.
    """
    layers, batch, queries = logits.shape[:3]
    device = logits.device
    if sum(targets.counts) == 0:
        empty = torch.zeros(layers, 0, dtype=torch.int64, device=device)
        return Matching(empty, empty, empty[0])
    costs = matching_cost(logits, boxes_cxcywh, targets, cost)
    if targets.faults is None:
        on_host = costs.cpu().numpy()
    else:
        packed_costs = torch.cat((costs.flatten(), targets.faults.to(costs.dtype))).cpu()
        raise_faults(packed_costs[costs.numel() :] > 0, labels, logits.shape[-1] - 1)
        on_host = packed_costs[: costs.numel()].view(costs.shape).numpy()
    query, target = assign(on_host, targets.counts)
    image = np.repeat(np.arange(batch), [min(queries, count) for count in targets.counts])
    packed = torch.from_numpy(np.concatenate((query, target, image[None]))).to(device, non_blocking=True)
    return Matching(packed[:layers], packed[layers : 2 * layers], packed[-1])


def assign(
    costs: np.ndarray[Any, np.dtype[Any]], counts: Sequence[int]
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Solve the assignment problem of each image and layer.

    Args:
        costs: float [L, T, Q].
        counts: objects per image, length B; their sum is T.

    Returns:
        Flat query indices int64 [L, M] and flat target indices int64 [L, M], as in `Matching`.
    """
    # Imported here because the import takes 0.3 s, and inference does not need it.
    from scipy.optimize import linear_sum_assignment

    layers, _, queries = costs.shape
    offsets = np.concatenate(([0], np.cumsum(counts)))
    query, target = [], []
    for layer_costs in costs:
        for image, (start, end) in enumerate(itertools.pairwise(offsets)):
            rows, columns = linear_sum_assignment(replace_non_finite(layer_costs[start:end].T))
            query.append(rows + image * queries)
            target.append(columns + start)
    return np.concatenate(query).reshape(layers, -1), np.concatenate(target).reshape(layers, -1)


def replace_non_finite(cost: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """Replace non-finite costs float [Q, n], so that an assignment uses them only if it must.

    An assignment has at most min(Q, n) costs, so sums of finite costs differ by at most 2 min(Q, n) max |cost|. The
    replacement is larger than this difference. It is also small enough to preserve the precision of the finite costs,
    which would be lost in sums with the largest float.
    """
    finite = np.isfinite(cost)
    if finite.all():
        return cost
    largest = np.abs(cost[finite]).max(initial=1.0)
    return np.where(finite, cost, 2.0 * (min(cost.shape) + 1) * largest)
