"""Convert logits and boxes to detections."""

from typing import Protocol, TypedDict

import torch

from detr.boxes import box_cxcywh_to_xyxy
from detr.postprocess.sizes import TargetSizes, check_count


class DetectionOutput(Protocol):
    """The fields of a model output that detection post-processing reads.

    Attributes:
        logits: float [batch, queries, classes + 1]; the last class is "no object".
        pred_boxes: float [batch, queries, 4], cxcywh relative to the image, 0..1.
    """

    logits: torch.Tensor
    pred_boxes: torch.Tensor


class ImageDetections(TypedDict):
    """The detections in an image.

    Attributes:
        scores: float [n] in 0..1.
        labels: int64 [n], the best class that is not "no object".
        boxes: float [n, 4], corners in pixels of the target size, or relative to the image without target sizes.
    """

    scores: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor


def detections_of_all_queries(
    outputs: DetectionOutput, target_sizes: TargetSizes | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the score, label and box of every query, in the order of the model.

    Args:
        outputs: of the model.
        target_sizes: (height, width) of each image in pixels, as a list or a tensor [batch, 2].

    Returns:
        Scores float32 (float64 for float64) [batch, queries]; labels int64 [batch, queries], the best class that is not
        "no object"; boxes xyxy float [batch, queries, 4] in pixels of the target size, or relative to the image without
        target sizes. Boxes are not clipped to the image.

    Raises:
        ValueError: the number of target sizes is not that of the images.
    """
    if target_sizes is not None:
        check_count(target_sizes, len(outputs.logits))
    # bfloat16 has 8 bits of precision: around 640 pixels its values are 4 pixels apart.
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
    """Convert to float32; float64 stays unchanged."""
    return values if values.dtype == torch.float64 else values.float()


def post_process_object_detection(
    outputs: DetectionOutput, threshold: float = 0.5, target_sizes: TargetSizes | None = None
) -> list[ImageDetections]:
    """Return the detections of each image with a score above `threshold`, in the order of the model.

    Args:
        outputs: of the model.
        threshold: the score of a detection must exceed it.
        target_sizes: (height, width) of each image in pixels, as a list or a tensor [batch, 2].

    Returns:
        A dict for each image: `scores` float [n], `labels` int64 [n] and `boxes` float [n, 4], corners in pixels of
        its target size, or relative to the image without target sizes.

    Raises:
        ValueError: the number of target sizes is not that of the images.
    """
    scores, labels, boxes = detections_of_all_queries(outputs, target_sizes)
    return [
        {"scores": score[is_above], "labels": label[is_above], "boxes": box[is_above]}
        for score, label, box, is_above in zip(scores, labels, boxes, scores > threshold, strict=True)
    ]
