"""From a model's outputs to detections and segments, in pixels of the original images."""

from detr.postprocess.detection import (
    DetectionOutput,
    detections_of_all_queries,
    post_process_object_detection,
)
from detr.postprocess.sizes import TargetSizes

__all__ = [
    "DetectionOutput",
    "TargetSizes",
    "detections_of_all_queries",
    "post_process_object_detection",
]
