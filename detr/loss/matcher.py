"""Hungarian matching of predictions and targets, for all decoder layers at once.

L decoder layers, B batch, Q queries, C classes, T objects in the batch, M matches per layer: the sum over images of
min(Q, objects).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detr.boxes import box_cxcywh_to_xyxy, elementwise_generalized_iou
from detr.loss.targets import Targets, raise_faults


@dataclass(frozen=True)
class MatchingCost:
    """Weights of the three terms of the matching cost.

    Raises:
        ValueError: all are 0.
    """

    class_cost: float = 1.0
    bbox_cost: float = 5.0
    giou_cost: float = 2.0

    def __post_init__(self) -> None:
        if not (self.class_cost or self.bbox_cost or self.giou_cost):
            raise ValueError("All costs of the Matcher can't be 0")


@dataclass(frozen=True)
class Matching:
    """Which query is responsible for which target.

    Attributes:
        query: int64 [L, M], index into the flattened [B * Q] queries.
        target: int64 [L, M], index into the T targets of the batch.
        image: int64 [M], index of the image, the same in every layer.
    """

    query: Tensor
    target: Tensor
    image: Tensor


def matching_cost(logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, cost: MatchingCost) -> Tensor:
    """Cost of every pair of a target and a query of its image.

    Args:
        logits: float [L, B, Q, C + 1].
        boxes_cxcywh: float [L, B, Q, 4].
        targets: on the same device.
        cost: weights of the terms.

    Returns:
        float [L, T, Q].
    """
    owners = [image for image, count in enumerate(targets.counts) for _ in range(count)]
    image = torch.tensor(owners).to(logits.device, non_blocking=True)
    wanted = targets.boxes_cxcywh[:, None]
    class_cost = -logits.softmax(-1)[:, image, :, targets.class_ids].transpose(0, 1)
    bbox_cost = (boxes_cxcywh[:, image] - wanted).abs().sum(-1)
    boxes_xyxy = box_cxcywh_to_xyxy(boxes_cxcywh)[:, image]
    giou_cost = -elementwise_generalized_iou(boxes_xyxy, box_cxcywh_to_xyxy(wanted))
    return cost.class_cost * class_cost + cost.bbox_cost * bbox_cost + cost.giou_cost * giou_cost


@torch.no_grad()
def hungarian_matching(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    targets: Targets,
    cost: MatchingCost,
    labels: Sequence[Mapping[str, Any]] = (),
) -> Matching:
    """Match each image's targets one to one with queries at the least total cost, in every layer.

    Where an image has more targets than queries, min(Q, objects) are matched. A query whose prediction is not
    finite is matched only when no other is left. There is one copy from the device to the host, which also
    carries the check of the labels' values.

    Args:
        logits: float [L, B, Q, C + 1].
        boxes_cxcywh: float [L, B, Q, 4].
        targets: see `detr.loss.targets.gather_targets`.
        cost: weights of the cost terms.
        labels: for the error message, where ``targets.faults`` is set.

    Returns:
        The matching; within an image and layer in rising order of the query.

    Raises:
        ValueError: a label is wrong.
    """
    layers, batch, queries = logits.shape[:3]
    device = logits.device
    if sum(targets.counts) == 0:
        nothing = torch.zeros(layers, 0, dtype=torch.int64, device=device)
        return Matching(nothing, nothing, nothing[0])
    costs = matching_cost(logits, boxes_cxcywh, targets, cost)
    if targets.faults is None:
        on_host = costs.cpu().numpy()
    else:
        together = torch.cat((costs.flatten(), targets.faults.to(costs.dtype))).cpu()
        raise_faults(together[costs.numel() :] > 0, labels, logits.shape[-1] - 1)
        on_host = together[: costs.numel()].view(costs.shape).numpy()
    query, target = assign(on_host, targets.counts)
    image = np.repeat(np.arange(batch), [min(queries, count) for count in targets.counts])
    packed = torch.from_numpy(np.concatenate((query, target, image[None]))).to(device, non_blocking=True)
    return Matching(packed[:layers], packed[layers : 2 * layers], packed[-1])


def assign(
    costs: np.ndarray[Any, np.dtype[Any]], counts: Sequence[int]
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Solve the assignments.

    Args:
        costs: float [L, T, Q].
        counts: objects per image, length B; their sum is T.

    Returns:
        int64 [L, M] flat query and int64 [L, M] flat target indices, as in `Matching`.
    """
    from scipy.optimize import linear_sum_assignment  # a third of a second, which inference does without

    layers, _, queries = costs.shape
    offsets = np.concatenate(([0], np.cumsum(counts)))
    query, target = [], []
    for of_layer in costs:
        for image, (start, end) in enumerate(itertools.pairwise(offsets)):
            rows, columns = linear_sum_assignment(finite_cost(of_layer[start:end].T))
            query.append(rows + image * queries)
            target.append(columns + start)
    return np.concatenate(query).reshape(layers, -1), np.concatenate(target).reshape(layers, -1)


def finite_cost(cost: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """float [Q, n] with every value that is not finite replaced by one that no better choice can exceed.

    The replacement is larger than the sum of all other costs of any assignment, and small enough for the exact
    comparison of the rest (the largest float would swallow it in rounding).
    """
    finite = np.isfinite(cost)
    if finite.all():
        return cost
    largest = np.abs(cost[finite]).max(initial=1.0)
    return np.where(finite, cost, 2.0 * (min(cost.shape) + 1) * largest)
