"""Average the normalizers of the loss over processes.

Each process contributes the counts of its batch. A caller whose step has several micro-batches sums `target_counts` over
them and over the processes, and passes the sums to the loss instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detr.config import DetrConfig
from detr.loss.criterion import target_counts
from detr.loss.targets import Labels


def average_normalizers(
    labels: Labels,
    image_weights: Tensor | None,
    config: DetrConfig,
    num_boxes: float | Tensor | None,
    class_weight_sum: float | Tensor | None,
    device: torch.device,
) -> tuple[float | Tensor, float | Tensor]:
    """Replace normalizers that are None by their average over the default process group.

    With these normalizers, the average of the gradients of all processes equals the gradient of one process on the
    whole batch. This is a collective operation: all processes of the group must call it the same number of times.

    Args:
        labels: labels of this process.
        image_weights: float [B] or None.
        config: for Q and the class weight of "no object".
        num_boxes: returned unchanged if given; otherwise ``max(total, 1) / processes``.
        class_weight_sum: returned unchanged if given; otherwise ``total / processes``.
        device: device on which the process group communicates.
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
