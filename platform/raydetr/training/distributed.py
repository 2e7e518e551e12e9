"""Reduce the loss normalizers and the gradients of a step over the workers.

W workers must compute the gradient that one process computes on the global batch. DistributedDataParallel averages
the gradients of W losses, so each worker divides its loss by the *mean* of a normalizer over the workers: its sum over
all workers and micro-batches of the step, divided by W. The sum is clamped before the division by W. The original DETR
clamps after it, which shrinks the gradient of a step with fewer boxes than workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from detr.loss.criterion import target_counts
from raydetr.data.stream.micro_batch import TrainingBatch


@dataclass(frozen=True)
class StepTotals:
    """Sums of a step over all workers, and the loss normalizers computed from them.

    num_boxes: normalizer of the box losses: max(boxes, 1) / W.
    class_weight_sum: normalizer of the class loss: Σ over images of [min(n, Q) + eos · (Q − min(n, Q))] / W.
    images: number of images in the step.
    skipped: number of images that could not be decoded.
    signal: control signal of rank 0, see `signals`.
    """

    num_boxes: float
    class_weight_sum: float
    images: int
    skipped: int
    signal: int = 0


def step_totals(
    batches: Sequence[TrainingBatch], num_queries: int, eos_coefficient: float, signal: int = 0
) -> StepTotals:
    """Sum the target counts of a step over its micro-batches and all workers, with one small all-reduce.

    The loss is divided by these sums in `detr.loss.criterion` and `detr.loss.multiscale_criterion`.

    Args:
        batches: this worker's micro-batches of the step.
        num_queries: number of queries Q of the model.
        eos_coefficient: weight of the no-object class.
        signal: control signal on rank 0; 0 on other ranks, so that the sum is the signal of rank 0.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    sums[4] = signal
    for batch in batches:
        boxes, class_weight = target_counts(batch.labels, batch.weights, num_queries, eos_coefficient)
        images = float(batch.weights.sum())
        sums[:4] += torch.tensor([boxes, class_weight, images, len(batch.skipped)], dtype=torch.float64)
    boxes, class_weight, images, skipped, signal_sum = all_reduce(sums).tolist()
    workers = world_size()
    return StepTotals(
        num_boxes=max(boxes, 1.0) / workers,
        # In a step without images every loss term is 0, so the divisor only must not be 0.
        class_weight_sum=(class_weight if images else 1.0) / workers,
        images=int(images),
        skipped=int(skipped),
        signal=int(signal_sum),
    )


def mean_by_rank(
    _: Any,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch checks this annotation
) -> torch.futures.Future[Tensor]:
    """Average the gradients of the workers in rank order: a communication hook of DistributedDataParallel.

    The order of additions in an all-reduce depends on where a gradient lies in its bucket. DistributedDataParallel
    rebuilds its buckets, and divides differently, after the first step of a process. With three or more workers, a
    resumed run would therefore differ in the last bit from an uninterrupted one. This hook has each worker add up one
    part of the bucket in rank order (a reduce-scatter), then gathers the parts. It sends as many bytes as a ring
    all-reduce.
    """
    workers, gradients = world_size(), bucket.buffer()
    parts = F.pad(gradients, (0, -len(gradients) % workers))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts)
    dist.all_gather_into_tensor(parts, reduce(torch.add, received.chunk(workers)) / workers)
    gradients.copy_(parts[: len(gradients)])
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(gradients)
    return done


def all_reduce(values: Tensor) -> Tensor:
    """Sum a tensor over all workers; return it unchanged without torch.distributed."""
    if not dist.is_initialized():
        return values
    if dist.get_backend() == "nccl":
        values = values.cuda()
    dist.all_reduce(values)
    return values.cpu()


def world_size() -> int:
    """Return the number of workers in the default process group; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1
