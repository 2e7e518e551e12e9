"""The one place where this library talks to other processes: the normalisers of the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from detr.config import DetrConfig
from detr.loss.criterion import Labels, target_counts


def average_normalisers(
    labels: Labels,
    image_weights: Tensor | None,
    config: DetrConfig,
    num_boxes: float | Tensor | None,
    class_weight_sum: float | Tensor | None,
    device: torch.device,
) -> tuple[float | Tensor, float | Tensor]:
    """Fill in the normalisers that are None with their average over the default process group.

    With them the average of the processes' gradients is the gradient of one process on the whole batch. Every
    process of the group has to call this equally often: it is a collective operation.

    Args:
        labels: this process's labels.
        image_weights: float [B] or None.
        config: for Q and the class weight of "no object".
        num_boxes: kept where given; else ``max(total, 1) / processes``.
        class_weight_sum: kept where given; else ``total / processes``.
        device: where the process group communicates.
    """
    if num_boxes is not None and class_weight_sum is not None:
        return num_boxes, class_weight_sum
    counts = target_counts(labels, image_weights, config.num_queries, config.eos_coefficient)
    total = torch.tensor(
        counts, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device
    )
    torch.distributed.all_reduce(total)
    world_size = torch.distributed.get_world_size()
    if num_boxes is None:
        num_boxes = total[0].clamp(min=1) / world_size
    if class_weight_sum is None:
        class_weight_sum = total[1] / world_size
    return num_boxes, class_weight_sum
