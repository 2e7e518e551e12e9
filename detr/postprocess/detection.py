"""From a model's logits and boxes to detections."""

from typing import Any, Protocol

import torch

from detr.boxes import box_cxcywh_to_xyxy
from detr.postprocess.sizes import TargetSizes, check_count


class DetectionOutput(Protocol):
    """What post-processing reads of a model's output.

    Attributes:
        logits: float [batch, queries, classes + 1], the last class being "no object".
        pred_boxes: float [batch, queries, 4], cxcywh relative to the image, 0..1.
    """

    logits: torch.Tensor
    pred_boxes: torch.Tensor


def detections_of_all_queries(
    outputs: DetectionOutput, target_sizes: TargetSizes | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score, label and box of every query, in the model's order.

    Args:
        outputs: of the model.
        target_sizes: (height, width) of each image in pixels, as a list or a tensor [batch, 2].

    Returns:
        Scores float32 (float64 for float64) [batch, queries]; labels int64 [batch, queries], the best class that is not "no object"; boxes
        xyxy float [batch, queries, 4] in pixels of the target size, without one relative to the image. They are not
        clipped to it.

    Raises:
        ValueError: the number of target sizes is not that of the images.
    """
    if target_sizes is not None:
        check_count(target_sizes, len(outputs.logits))
    # bfloat16 has 8 bits of precision: of 640 pixels it tells every fourth
    scores, labels = at_least_float32(outputs.logits).softmax(-1)[..., :-1].max(-1)
    boxes = box_cxcywh_to_xyxy(at_least_float32(outputs.pred_boxes))
    if target_sizes is not None:
        if isinstance(target_sizes, torch.Tensor):
            height, width = target_sizes.unbind(1)
        else:
            height, width = torch.tensor([tuple(size) for size in target_sizes], dtype=torch.float32).unbind(
                1
            )
        boxes = boxes * torch.stack([width, height, width, height], dim=1).to(boxes.device)[:, None]
    return scores, labels, boxes


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """Half precision as float32; float64 as it is."""
    return values if values.dtype == torch.float64 else values.float()


def post_process_object_detection(
    outputs: DetectionOutput, threshold: float = 0.5, target_sizes: TargetSizes | None = None
) -> list[dict[str, Any]]:
    """The detections of each image with a score above `threshold`, in the model's order.

    Args:
        outputs: of the model.
        threshold: a score must exceed it.
        target_sizes: (height, width) of each image in pixels, as a list or a tensor [batch, 2].

    Returns:
        A dict for each image: `scores` float [n], `labels` int64 [n] and `boxes` float [n, 4], corners in pixels of
        its target size, without one relative to the image.

    Raises:
        ValueError: the number of target sizes is not that of the images.
    """
    scores, labels, boxes = detections_of_all_queries(outputs, target_sizes)
    return [
        {"scores": score[keep], "labels": label[keep], "boxes": box[keep]}
        for score, label, box, keep in zip(scores, labels, boxes, scores > threshold, strict=True)
    ]
