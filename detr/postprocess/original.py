"""The post-processing that the DETR page cites by its old names, with the meaning it had in the original code."""

from typing import Any

from detr.postprocess.detection import DetectionOutput, detections_of_all_queries
from detr.postprocess.sizes import TargetSizes


def post_process(outputs: DetectionOutput, target_sizes: TargetSizes) -> list[dict[str, Any]]:
    """All queries of each image as detections, whatever their score: what COCO's evaluation takes.

    Args:
        outputs: of the model.
        target_sizes: (height, width) of each image in pixels, as a list or a tensor [batch, 2].

    Returns:
        A dict for each image: `scores` float [queries], `labels` int64 [queries], the best class that is not "no
        object", and `boxes` float [queries, 4], corners in pixels of its target size.

    Raises:
        ValueError: the number of target sizes is not that of the images.
    """
    scores, labels, boxes = detections_of_all_queries(outputs, target_sizes)
    return [
        {"scores": score, "labels": label, "boxes": box} for score, label, box in zip(scores, labels, boxes)
    ]
