"""Convert model outputs to detections and segments in pixels of the original images.

`post_process_object_detection`, `post_process_semantic_segmentation`, `post_process_instance_segmentation` and
`post_process_panoptic_segmentation` return the same as transformers' methods of these names, with additional keyword
arguments. `post_process`, `post_process_segmentation`, `post_process_instance` and `post_process_panoptic` are those of
the original code. The image processors have all of them as methods.
"""

from detr.postprocess.detection import (
    DetectionOutput,
    ImageDetections,
    detections_of_all_queries,
    post_process_object_detection,
)
from detr.postprocess.instance import InstanceSegmentation, post_process_instance_segmentation
from detr.postprocess.original import (
    ImageMasks,
    OriginalDetections,
    post_process,
    post_process_instance,
    post_process_segmentation,
)
from detr.postprocess.original_panoptic import OriginalSegment, PanopticImage, post_process_panoptic
from detr.postprocess.panoptic import post_process_panoptic_segmentation
from detr.postprocess.segments import SegmentationOutput, SegmentedImage, SegmentInfo
from detr.postprocess.semantic import SemanticSegmentation, post_process_semantic_segmentation
from detr.postprocess.sizes import TargetSizes

__all__ = [
    "DetectionOutput",
    "ImageDetections",
    "ImageMasks",
    "InstanceSegmentation",
    "OriginalDetections",
    "OriginalSegment",
    "PanopticImage",
    "SegmentInfo",
    "SegmentationOutput",
    "SegmentedImage",
    "SemanticSegmentation",
    "TargetSizes",
    "detections_of_all_queries",
    "post_process",
    "post_process_instance",
    "post_process_instance_segmentation",
    "post_process_object_detection",
    "post_process_panoptic",
    "post_process_panoptic_segmentation",
    "post_process_segmentation",
    "post_process_semantic_segmentation",
]
