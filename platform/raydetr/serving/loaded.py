"""One loaded model version on one device. Batches that do not fit into the device memory are halved."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal, Self, TypeVar, cast

import numpy as np
import torch

from detr.config import DetrConfig, EngineName
from detr.inference.detector import Detections, ObjectDetector, PreparedImage
from detr.model.segmentation import DetrForSegmentation
from raydetr.errors import ServingError
from raydetr.registry.models import ResolvedModel, local_folder
from raydetr.serving.segments import ResponseFields, SegmentRequest, segments

Precision = Literal["float32", "bf16"]
T = TypeVar("T")
R = TypeVar("R")
REFERENCE_SIZE = (480, 640)
"""(height, width) in pixels of the image that a version must answer before it is served."""


@dataclass(frozen=True)
class Failure:
    """Why one image of a batch has no result. A value and not an exception, because the other images have results."""

    status: int
    """HTTP status of the response."""
    message: str


OUT_OF_MEMORY = Failure(
    503, "The model's device has no memory left for an image of this size: try again later."
)


def run_halving(run: Callable[[Sequence[T]], Sequence[R]], batch: Sequence[T]) -> list[R | Failure]:
    """Run a batch. If the device runs out of memory, run its halves instead, down to single images.

    Returns:
        the result of each item, or `OUT_OF_MEMORY` if the item does not fit even alone.
    """
    try:
        return list(run(batch))
    except torch.OutOfMemoryError:
        # Retry below, not here: the frames of the exception still hold the tensors of this attempt.
        pass
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(batch) == 1:
        return [OUT_OF_MEMORY]
    middle = len(batch) // 2
    return run_halving(run, batch[:middle]) + run_halving(run, batch[middle:])


class LoadedModel:
    """A model version that is loaded on a device.

    Args:
        detector: detects boxes.
        segmenter: the same weights with the mask head; None for a model without one.
        label: name of the version, for messages.
    """

    def __init__(self, detector: ObjectDetector, segmenter: ObjectDetector | None, label: str) -> None:
        self.detector, self.segmenter, self.label = detector, segmenter, label
        config = detector.model.config
        self.id2label: dict[int, str] = config.id2label
        self.stuff: list[int] = getattr(config, "stuff_label_ids", [])

    @classmethod
    def load(
        cls, model: ResolvedModel, device: str, precision: Precision = "float32", engine: EngineName = "torch"
    ) -> Self:
        """Load a version from its files.

        Args:
            model: from `registry.models.resolve`.
            device: torch device.
            precision: bf16 runs all but the heads in bfloat16; torch on a CPU uses autocast.
            engine: inference engine, see `detr.inference.optimize.optimized`.
        """
        folder = local_folder(model)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        if not has_masks(DetrConfig.from_pretrained(folder)):
            return cls(
                ObjectDetector.from_pretrained(folder, device, dtype, engine=engine), None, model.label
            )
        whole = ObjectDetector.from_pretrained(folder, device, dtype, masks=True, engine=engine)
        with_masks = cast(DetrForSegmentation, whole.model)
        detector = ObjectDetector(with_masks.detr, whole.image_processor, device, dtype)
        return cls(detector, whole, model.label)

    def check(self) -> None:
        """Run the model on a reference image of `REFERENCE_SIZE`, which also warms it up.

        Raises:
            ServingError: an output is not finite, or the numbers of classes and labels differ.
        """
        channels = 1 if self.detector.image_processor.keeps_gray else 3
        noise = np.random.default_rng(0).integers(0, 256, (channels, *REFERENCE_SIZE), np.uint8)
        image = self.detector.prepare(torch.from_numpy(noise))
        outputs = [self.detector.run([image])]
        if self.segmenter is not None:
            outputs.append(self.segmenter.run([image]))
        for output in outputs:
            for name in ("logits", "pred_boxes", "pred_masks"):
                values = getattr(output, name, None)
                if values is not None and not torch.isfinite(values).all():
                    raise ServingError(
                        f"{self.label}: {name} of a reference image are not finite: check its weights."
                    )
            classes = output.logits.shape[-1] - 1
            if classes != len(self.id2label):
                raise ServingError(
                    f"{self.label} has {classes} classes and {len(self.id2label)} labels: check id2label in its "
                    "config.json."
                )

    def detect(self, images: Sequence[PreparedImage]) -> list[Detections | Failure]:
        """Detect objects in images of one canonical shape. Each result equals that of the image alone."""
        return run_halving(self.detector.detect, images)

    def segment(self, jobs: Sequence[tuple[PreparedImage, SegmentRequest]]) -> list[ResponseFields | Failure]:
        """Return the output of `segments.segments` for images of one canonical shape.

        Raises:
            ServingError: the model has no mask head.
        """
        return run_halving(self._segment, jobs)

    @torch.inference_mode()
    def _segment(self, jobs: Sequence[tuple[PreparedImage, SegmentRequest]]) -> list[ResponseFields]:
        if self.segmenter is None:
            raise ServingError(f"{self.label} has no mask head.")
        semantic = any(request.kind == "semantic" for _, request in jobs)
        # Masks are only computed for queries above the threshold; semantic segmentation needs those of all queries.
        min_threshold = min(request.threshold for _, request in jobs)
        outputs = self.segmenter.run([image for image, _ in jobs], None if semantic else min_threshold)
        logits, masks = outputs.logits.float(), outputs.pred_masks.float()
        return [
            segments(
                SimpleNamespace(logits=logits[i : i + 1], pred_masks=masks[i : i + 1]),
                image,
                request,
                self.id2label,
                self.stuff,
            )
            for i, (image, request) in enumerate(jobs)
        ]


def has_masks(config: DetrConfig) -> bool:
    """Check whether a model with this configuration has a mask head."""
    return "DetrForSegmentation" in (config.architectures or ())
