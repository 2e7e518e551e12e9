"""What the workers of a step tell each other: two sums, and their gradients.

W workers must compute the gradient of one process on the global batch. DistributedDataParallel averages the
gradients of W losses, so each worker's loss is divided by the *average* of a normaliser over the workers: the sum
over all workers and all their micro-batches of the step, over W. Clamping comes before the division by W; the
original clamps after it, which shrinks the gradient of a step with fewer boxes than workers.
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
    """Sums over all workers of a step, and the normalisers made of them.

    num_boxes: normaliser of the box losses: max(boxes, 1) / W.
    class_weight_sum: normaliser of the class loss: Σ over images of [min(n, Q) + eos · (Q − min(n, Q))] / W.
    images: images trained on.
    skipped: images that could not be decoded.
    signal: what rank 0 has to say, see `signals`.
    """

    num_boxes: float
    class_weight_sum: float
    images: int
    skipped: int
    signal: int = 0


def step_totals(
    batches: Sequence[TrainingBatch], num_queries: int, eos_coefficient: float, signal: int = 0
) -> StepTotals:
    """Sum the targets of a step over its micro-batches and workers, with one small all-reduce.

    Args:
        batches: this worker's micro-batches of the step.
        num_queries: Q of the model.
        eos_coefficient: weight of the no-object class.
        signal: of rank 0, 0 on the others.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    sums[4] = signal
    for batch in batches:
        boxes, class_weight = target_counts(batch.labels, batch.weights, num_queries, eos_coefficient)
        images = float(batch.weights.sum())
        sums[:4] += torch.tensor([boxes, class_weight, images, len(batch.skipped)], dtype=torch.float64)
    boxes, class_weight, images, skipped, said = all_reduce(sums).tolist()
    workers = world_size()
    return StepTotals(
        num_boxes=max(boxes, 1.0) / workers,
        # Without a single image every term is 0 times its weight; any divisor but 0 will do.
        class_weight_sum=(class_weight if images else 1.0) / workers,
        images=int(images),
        skipped=int(skipped),
        signal=int(said),
    )


def mean_by_rank(
    _: Any,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch checks this very name
) -> torch.futures.Future[Tensor]:
    """Hook of DistributedDataParallel: the mean of the workers' gradients, added up in the order of their ranks.

    The order of an all-reduce depends on where in a bucket a gradient lies, and DistributedDataParallel lays it
    elsewhere, and divides differently, after the first step of a process: from three workers on a run that was resumed
    would differ in the last bit from one that was not. Each worker adds up its part of the bucket; as many bytes cross
    the network as in the ring of an all-reduce.
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
    """The sum of a tensor over all workers; the tensor itself without torch.distributed."""
    if not dist.is_initialized():
        return values
    if dist.get_backend() == "nccl":
        values = values.cuda()
    dist.all_reduce(values)
    return values.cpu()


def world_size() -> int:
    """Workers of the default group; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1
