"""`ObjectDetector` converts images to detections. Evaluation, serving and prediction all use it.

There are two steps, which can run in different processes. `prepare_image` preprocesses one image on the CPU and needs no
model. `ObjectDetector.detect` runs the model on a batch.

Each image is padded to a shape that depends on its own size alone (`canonical_shape`), and only images of equal shape
share a batch. So the detections in an image do not depend on the other images of its batch.

B batch, Q queries.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL import Image

from detr.image_processing.decode import Orientation, decode_image, open_image
from detr.image_processing.processor import DetrImageProcessor
from detr.image_processing.size import canonical_shape
from detr.postprocess import detections_of_all_queries

if TYPE_CHECKING:
    # These import timm, which tasks that only prepare images do not need.
    from detr.config import EngineName
    from detr.model.detection import DetrForObjectDetection
    from detr.model.segmentation import DetrForSegmentation


_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """A preprocessed image, the input of `ObjectDetector.detect`; can be pickled.

    Attributes:
        pixels: uint8 [3, *shape], the resized image in the upper left corner, zeros elsewhere.
        size: (height, width) of the resized image.
        original_size: (height, width) of the original image.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    original_size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """The canonical (height, width) that the image is padded to; images of equal shape can share a batch."""
        return self.pixels.shape[1], self.pixels.shape[2]


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections in one image, sorted by descending score.

    Attributes:
        scores: float32 [Q] in 0..1.
        labels: int64 [Q], class indices of the model (names: `model.config.id2label`).
        boxes_xyxy: float32 [Q, 4], corners in pixels of the original image; not clipped to it.
        queries: int64 [Q], index of the query that predicted the detection.
    """

    scores: np.ndarray
    labels: np.ndarray
    boxes_xyxy: np.ndarray
    queries: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def to_dicts(self, id2label: Mapping[int, str]) -> list[dict[str, Any]]:
        """Convert the detections to plain Python values, ready for JSON.

        Args:
            id2label: class index to name.

        Returns:
            For each detection `{"score", "label", "label_id", "box": {"xmin", "ymin", "xmax", "ymax"}}`.
        """
        return [
            {
                "score": score,
                "label": id2label[label],
                "label_id": label,
                "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box)),
            }
            for score, label, box in zip(self.scores.tolist(), self.labels.tolist(), self.boxes_xyxy.tolist())
        ]


def padding_share(sizes: Iterable[tuple[int, int]]) -> float:
    """Compute the share of pixels that are padding when images are padded to their canonical shapes.

    Args:
        sizes: (height, width) of at least one resized image.
    """
    sizes = list(sizes)
    filled = sum(height * width for height, width in sizes)
    return 1 - filled / sum(math.prod(canonical_shape(*size)) for size in sizes)


def prepare_image(
    image: bytes | Image.Image | torch.Tensor,
    image_processor: DetrImageProcessor,
    *,
    orientation: Orientation = "ignore",
) -> PreparedImage:
    """Decode, convert, resize and pad one image on the CPU. Needs no model; thread-safe.

    Args:
        image: an encoded image, a Pillow image, or a uint8 tensor [channels, height, width] of 0..255.
        image_processor: its conversion and resize are applied.
        orientation: EXIF orientation of encoded images: see `decode_image`.

    Raises:
        ImageError: the bytes cannot be decoded, or would take too long to decode (`ImageCostError`).
        ValueError: a tensor has another dtype, or its channels cannot be converted.
    """
    if isinstance(image, bytes):
        decode = open_image if image_processor.keeps_gray else decode_image
        image = decode(image, orientation=orientation)
    tensor = image_processor.to_tensor(image, "channels_first")
    if tensor.dtype != torch.uint8:
        raise ValueError(f"an image tensor is {tensor.dtype}: expected torch.uint8, values 0..255")
    resized = image_processor.resize(tensor)
    height, width = resized.shape[-2:]
    pixels = np.zeros((resized.shape[0], *canonical_shape(height, width)), np.uint8)
    pixels[:, :height, :width] = resized.numpy()
    return PreparedImage(pixels, (height, width), (tensor.shape[-2], tensor.shape[-1]))


class ObjectDetector:
    """A model with its image processor: images in, detections out.

    Args:
        model: moved to `device` and put into evaluation mode.
        image_processor: its resize, rescale and normalization are applied; its padding is replaced by the canonical
            one.
        device: device that the model runs on.
        dtype: dtype of the computation. For float16 and bfloat16 the weights are not converted and the model runs under
            autocast, unless it comes from ``optimize(dtype=...)``.
    """

    def __init__(
        self,
        model: "DetrForObjectDetection | DetrForSegmentation",
        image_processor: DetrImageProcessor,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.image_processor = image_processor
        self.model = model.to(self.device).eval()
        if (
            not self._autocast and not self.model.is_optimized
        ):  # the heads of an optimized model keep their own dtype
            self.model.to(dtype)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        masks: bool = False,
        engine: "EngineName" = "torch",
    ) -> Self:
        """Load a model folder (model.safetensors, config.json, preprocessor_config.json) and optimize the model.

        Args:
            folder: of the model.
            device: device that the model runs on.
            dtype: dtype of the computation.
            masks: load the model with its mask head.
            engine: see `detr.inference.optimize.optimized`.

        Raises:
            FileNotFoundError: the folder or one of the files is missing.
            ValueError: the files do not fit together, or the engine cannot compute the model.
            ImportError: the engine is not installed.
        """
        from detr.model.detection import DetrForObjectDetection
        from detr.model.segmentation import DetrForSegmentation

        kind = DetrForSegmentation if masks else DetrForObjectDetection
        half, on_cpu = dtype in _HALF, torch.device(device).type == "cpu"
        model = kind.from_pretrained(folder, dtype=torch.float32 if half else dtype).to(device)
        if on_cpu and engine == "torch":
            fast = model.optimize(pack=not half)
        else:
            fast = model.optimize(dtype=dtype if half else None, engine=engine)
        return cls(fast, DetrImageProcessor.from_pretrained(folder), device, dtype)

    def prepare(self, image: bytes | Image.Image | torch.Tensor) -> PreparedImage:
        """Prepare an image with the image processor of this detector; see `prepare_image`."""
        return prepare_image(image, self.image_processor)

    @torch.inference_mode()
    def detect(self, prepared: Sequence[PreparedImage], top_k: int | None = None) -> list[Detections]:
        """Detect objects in images of equal canonical shape.

        Args:
            prepared: images from `prepare`; may be empty.
            top_k: number of detections to return for each image, those with the highest scores; None returns all
                queries.

        Raises:
            ValueError: the images have different canonical shapes.
        """
        if not prepared:
            return []
        return self.detections(self.run(prepared), prepared, top_k)

    def detect_image(self, image: bytes | Image.Image | torch.Tensor) -> list[dict[str, Any]]:
        """Detect objects in one image (see `prepare`); returns all detections as in `Detections.to_dicts`."""
        return self.detect([self.prepare(image)])[0].to_dicts(self.model.config.id2label)

    @torch.inference_mode()
    def run(self, prepared: Sequence[PreparedImage], min_score: float | None = None) -> Any:
        """Run the model on at least one image, all of equal canonical shape, and return its output.

        Args:
            prepared: the images.
            min_score: for a model with a mask head: compute only masks of queries with a higher score, see
                `DetrForSegmentation.forward`.

        Raises:
            ValueError: the images have different canonical shapes.
        """
        shapes = sorted({image.pixels.shape for image in prepared})
        if len(shapes) > 1:
            raise ValueError(
                f"images of shapes {shapes} cannot share a batch: group them by PreparedImage.shape"
            )
        pixels = torch.from_numpy(np.stack([image.pixels for image in prepared])).to(self.device)
        pixel_values, mask = self.image_processor.rescale_and_normalize(pixels), None
        if any(image.size != image.shape for image in prepared):
            mask = _pixel_mask([image.size for image in prepared], prepared[0].shape, self.device)
            pixel_values = pixel_values * mask[:, None]
        pixel_values = pixel_values.to(torch.float32 if self._autocast else self.dtype)
        with torch.autocast(self.device.type, self.dtype, enabled=self._autocast):
            if min_score is None:
                return self.model(pixel_values, pixel_mask=mask)
            return self.model(pixel_values, pixel_mask=mask, min_score=min_score)

    @staticmethod
    def detections(
        outputs: Any, prepared: Sequence[PreparedImage], top_k: int | None = None
    ) -> list[Detections]:
        """Convert the output of `run` to detections; see `detect`."""
        scores, labels, boxes = detections_of_all_queries(
            outputs, [image.original_size for image in prepared]
        )
        scores, order = scores.float().sort(descending=True, stable=True)
        return [
            Detections(score[:top_k], label[rank][:top_k], box[rank][:top_k], rank[:top_k])
            for score, rank, label, box in zip(*_to_numpy(scores, order, labels, boxes.float()))
        ]

    @property
    def _autocast(self) -> bool:
        return self.dtype in _HALF and next(self.model.parameters()).dtype not in _HALF


def _pixel_mask(
    sizes: Sequence[tuple[int, int]], shape: tuple[int, int], device: torch.device
) -> torch.Tensor:
    """Return bool [B, *shape], True on the image of each size in the upper left corner."""
    heights, widths = torch.tensor(sizes, device=device).unbind(1)
    rows = torch.arange(shape[0], device=device) < heights[:, None]
    columns = torch.arange(shape[1], device=device) < widths[:, None]
    return rows[:, :, None] & columns[:, None, :]


def _to_numpy(*tensors: torch.Tensor) -> Any:
    return [tensor.cpu().numpy() for tensor in tensors]
