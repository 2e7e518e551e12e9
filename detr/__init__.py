"""DETR: end-to-end object detection and segmentation with a transformer, with the API of the transformers DETR page.

Every example of that page runs with ``from detr import ...``. Outputs, losses and files are the same.

Detect objects in three lines::

    detect = detr.pipeline("object-detection", model="runs/mine/model")  # or a hub id, which is downloaded
    for detection in detect("photo.jpg"):
        print(detection["label"], detection["score"], detection["box"])

The same step by step. For masks, use `DetrForSegmentation` and ``post_process_panoptic_segmentation``::

    processor = detr.DetrImageProcessor.from_pretrained(folder)
    model = detr.DetrForObjectDetection.from_pretrained(folder)
    inputs = processor(image, return_tensors="pt")  # pixel_values float32 [1, 3, H, W], pixel_mask int64 [1, H, W]
    outputs = model(**inputs)  # logits float [1, queries, classes + 1], pred_boxes float [1, queries, 4]
    processor.post_process_object_detection(outputs, target_sizes=[(height, width)])

A new model, or a trained one with other classes::

    model = detr.DetrForObjectDetection(detr.DetrConfig(backbone="resnet50", num_labels=3))
    model = detr.DetrForObjectDetection.from_pretrained(folder, id2label={0: "cat", 1: "dog"})
    loss = model(**processor(images, annotations, return_tensors="pt")).loss

Metrics: `CocoEvaluator` (average precision of boxes and masks) and `PanopticEvaluator` (PQ). The results of
`ObjectDetector` do not depend on the batch. Intended differences from transformers: docs/detr.md.

Names are imported on first use, and timm and torchvision when a network is built. Data tasks, which only resize images,
thus save 2 s of CPU time in every new process.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detr.config import DetrConfig
    from detr.hf.auto import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageSegmentation,
        AutoModelForObjectDetection,
    )
    from detr.hf.pipeline import pipeline
    from detr.image_processing.pillow_processor import DetrImageProcessorPil
    from detr.image_processing.processor import DetrImageProcessor
    from detr.inference.detector import ObjectDetector
    from detr.metrics.coco import CocoEvaluator
    from detr.metrics.panoptic import PanopticEvaluator
    from detr.model.detection import DetrForObjectDetection, DetrModel
    from detr.model.outputs import DetrModelOutput, DetrObjectDetectionOutput, DetrSegmentationOutput
    from detr.model.segmentation import DetrForSegmentation

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
    "AutoConfig": "hf.auto",
    "AutoImageProcessor": "hf.auto",
    "AutoModelForImageSegmentation": "hf.auto",
    "AutoModelForObjectDetection": "hf.auto",
    "CocoEvaluator": "metrics.coco",
    "DetrConfig": "config",
    "DetrForObjectDetection": "model.detection",
    "DetrForSegmentation": "model.segmentation",
    "DetrImageProcessor": "image_processing.processor",
    "DetrImageProcessorPil": "image_processing.pillow_processor",
    "DetrModel": "model.detection",
    "DetrModelOutput": "model.outputs",
    "DetrObjectDetectionOutput": "model.outputs",
    "DetrSegmentationOutput": "model.outputs",
    "ObjectDetector": "inference.detector",
    "PanopticEvaluator": "metrics.panoptic",
    "pipeline": "hf.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'detr' has no attribute {name!r}")
    value = getattr(import_module(f"detr.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
