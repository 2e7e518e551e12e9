"""One model version on one device, loaded, checked and warm; batches that do not fit its memory are halved."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, Self, TypeVar, cast

import numpy as np
import torch

from detr.config import DetrConfig
from detr.inference.detector import Detections, ObjectDetector, PreparedImage
from detr.inference.optimize import Engine
from detr.model.segmentation import DetrForSegmentation
from raydetr.errors import ServingError
from raydetr.registry.models import ResolvedModel, local_folder
from raydetr.serving.segments import SegmentRequest, segments

Precision = Literal["float32", "bf16"]
T = TypeVar("T")
R = TypeVar("R")
REFERENCE_SIZE = (480, 640)
"""(height, width) in pixels of the image that a version answers before it is served."""


@dataclass(frozen=True)
class Failure:
    """Why one image of a batch has no result; a value, since the other images have theirs."""

    status: int
    """Of the HTTP answer."""
    message: str


OUT_OF_MEMORY = Failure(503, "The model's device has no memory left for an image of this size: try later.")


def in_parts(run: Callable[[Sequence[T]], Sequence[R]], batch: Sequence[T]) -> list[R | Failure]:
    """Run a batch; where the device's memory does not hold it, its halves, down to single images.

    Returns:
        for each item its result, or `OUT_OF_MEMORY` where not even the item alone fits.
    """
    try:
        return list(run(batch))
    except torch.OutOfMemoryError:
        # Not in here: the exception's frames still hold the tensors of the attempt.
        pass
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(batch) == 1:
        return [OUT_OF_MEMORY]
    middle = len(batch) // 2
    return in_parts(run, batch[:middle]) + in_parts(run, batch[middle:])


class LoadedModel:
    """See the file's docstring.

    Args:
        detector: finds boxes.
        segmenter: the same weights with their mask head; None for a model without one.
        label: of the version, for messages.
    """

    def __init__(self, detector: ObjectDetector, segmenter: ObjectDetector | None, label: str) -> None:
        self.detector, self.segmenter, self.label = detector, segmenter, label
        config = detector.model.config
        self.id2label: dict[int, str] = config.id2label
        self.stuff: list[int] = getattr(config, "stuff_label_ids", [])

    @classmethod
    def load(
        cls, model: ResolvedModel, device: str, precision: Precision = "float32", engine: Engine = "torch"
    ) -> Self:
        """Read a version's files.

        Args:
            model: from `registry.models.resolve`.
            device: torch's name of it.
            precision: bf16 runs it in bfloat16 but for the heads, with torch on a CPU by autocast.
            engine: what computes it; see `detr.inference.optimize.optimized`.
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
        """Answer a reference image of `REFERENCE_SIZE`, which also warms the model up.

        Raises:
            ServingError: an output is not finite, or there are not as many classes as labels.
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
                    raise ServingError(f"{self.label}: {name} of a reference image are not finite numbers.")
            classes = output.logits.shape[-1] - 1
            if classes != len(self.id2label):
                raise ServingError(
                    f"{self.label} has {classes} classes and {len(self.id2label)} labels: its config.json is not its own."
                )

    def detect(self, images: Sequence[PreparedImage]) -> list[Detections | Failure]:
        """Detections of images of one canonical shape; each equals that of the image alone."""
        return in_parts(self.detector.detect, images)

    def segment(self, jobs: Sequence[tuple[PreparedImage, SegmentRequest]]) -> list[dict[str, Any] | Failure]:
        """What `segments.segments` gives for each of some images of one canonical shape.

        Raises:
            ServingError: the model has no mask head.
        """
        return in_parts(self._segment, jobs)

    @torch.inference_mode()
    def _segment(self, jobs: Sequence[tuple[PreparedImage, SegmentRequest]]) -> list[dict[str, Any]]:
        if self.segmenter is None:
            raise ServingError(f"{self.label} has no mask head.")
        semantic = any(request.kind == "semantic" for _, request in jobs)
        least = min(request.threshold for _, request in jobs)
        outputs = self.segmenter.run([image for image, _ in jobs], None if semantic else least)
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
    """Whether the weights of a folder with this configuration have a mask head."""
    return "DetrForSegmentation" in (config.architectures or ())
