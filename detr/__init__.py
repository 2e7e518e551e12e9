"""DETR: detection with a transformer, in the API of the transformers DETR page.

The names are imported when they are first used: data tasks, which only resize images, then do without timm and
torchvision, 5 s of CPU in every new process.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detr.auto import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageSegmentation,
        AutoModelForObjectDetection,
    )
    from detr.config import DetrConfig
    from detr.detector import ObjectDetector
    from detr.image_processing.pillow_processor import DetrImageProcessorPil
    from detr.image_processing.processor import DetrImageProcessor
    from detr.metrics.coco import CocoEvaluator
    from detr.metrics.panoptic import PanopticEvaluator
    from detr.model import DetrForObjectDetection, DetrModel
    from detr.outputs import DetrModelOutput, DetrObjectDetectionOutput, DetrSegmentationOutput
    from detr.pipelines import pipeline
    from detr.segmentation import DetrForSegmentation

__all__ = [
    "AutoConfig",
    "AutoImageProcessor",
    "AutoModelForImageSegmentation",
    "AutoModelForObjectDetection",
    "CocoEvaluator",
    "DetrConfig",
    "DetrForObjectDetection",
    "DetrForSegmentation",
    "DetrImageProcessor",
    "DetrImageProcessorPil",
    "DetrModel",
    "DetrModelOutput",
    "DetrObjectDetectionOutput",
    "DetrSegmentationOutput",
    "ObjectDetector",
    "PanopticEvaluator",
    "pipeline",
]

_MODULES = {
    "AutoConfig": "auto",
    "AutoImageProcessor": "auto",
    "AutoModelForImageSegmentation": "auto",
    "AutoModelForObjectDetection": "auto",
    "CocoEvaluator": "metrics.coco",
    "DetrConfig": "config",
    "DetrForObjectDetection": "model",
    "DetrForSegmentation": "segmentation",
    "DetrImageProcessor": "image_processing.processor",
    "DetrImageProcessorPil": "image_processing.pillow_processor",
    "DetrModel": "model",
    "DetrModelOutput": "outputs",
    "DetrObjectDetectionOutput": "outputs",
    "DetrSegmentationOutput": "outputs",
    "ObjectDetector": "detector",
    "PanopticEvaluator": "metrics.panoptic",
    "pipeline": "pipelines",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'detr' has no attribute {name!r}")
    value = getattr(import_module(f"detr.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
