"""DETR: detection with a transformer, in the API of the transformers DETR page."""

from detr.config import DetrConfig
from detr.image_processing.processor import DetrImageProcessor
from detr.model import DetrForObjectDetection, DetrModel
from detr.outputs import DetrModelOutput, DetrObjectDetectionOutput
from detr.pipeline import ObjectDetector

__all__ = [
    "DetrConfig",
    "DetrForObjectDetection",
    "DetrImageProcessor",
    "DetrModel",
    "DetrModelOutput",
    "DetrObjectDetectionOutput",
    "ObjectDetector",
]
