"""`ObjectDetector`: the one place where images become detections, for evaluation, serving and prediction alike.

In two steps, so that they can run in different processes: `prepare_image` is CPU work on one image and needs no
model, `ObjectDetector.detect` runs the model on a batch. Every image is padded to a shape that is a function of its
own size alone (`canonical_shape`), and only images of one shape share a batch: what is detected in an image does not
depend on its neighbours.

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
    # they import timm, which tasks that only prepare images do without
    from detr.inference.optimize import Engine
    from detr.model.detection import DetrForObjectDetection
    from detr.model.segmentation import DetrForSegmentation


_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image ready for the model; can be pickled.

    Attributes:
        pixels: uint8 [3, *shape], the resized image in the upper left corner, zeros elsewhere.
        size: (height, width) of the resized image.
        original_size: (height, width) of the image as it was given.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    original_size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """The canonical (height, width) that the image is padded to; images of one shape can share a batch."""
        return self.pixels.shape[1], self.pixels.shape[2]


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections in one image, the highest score first.

    Attributes:
        scores: float32 [Q] in 0..1.
        labels: int64 [Q], class indices of the model (names: `model.config.id2label`).
        boxes_xyxy: float32 [Q, 4], corners in pixels of the original image; not clipped to it.
        queries: int64 [Q], which of the model's queries it was.
    """

    scores: np.ndarray
    labels: np.ndarray
    boxes_xyxy: np.ndarray
    queries: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def to_dicts(self, id2label: Mapping[int, str]) -> list[dict[str, Any]]:
        """The detections as plain values, ready for JSON.

        Args:
            id2label: class index to name.

        Returns:
            for each `{"score", "label", "label_id", "box": {"xmin", "ymin", "xmax", "ymax"}}`.
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
    """The share of the pixels that is padding where images of these (height, width) have their canonical shapes.

    Args:
        sizes: of at least one image, resized.
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
    """Decode, convert, resize and pad one image. Needs no model; safe to call from several threads; CPU only.

    Args:
        image: an encoded image, a Pillow image, or a uint8 tensor [channels, height, width] of 0..255.
        image_processor: its conversion and resize are applied.
        orientation: of encoded images: see `decode_image`.

    Raises:
        ImageError: the bytes cannot be decoded, or would take too long to decode (`ImageCostError`).
        ValueError: a tensor of another dtype, or channels that cannot be converted.
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
    """A model and its image processor as one: images in, detections out.

    Args:
        model: moved to `device` and to evaluation mode.
        image_processor: its resize, rescale and normalisation are applied; its padding is replaced by the canonical
            one.
        device: where the model runs.
        dtype: what it computes in. For float16 and bfloat16 the weights stay as they are and autocast decides, unless
            the model comes from ``optimize(dtype=...)``.
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
        if not self._autocast and not self.model.is_optimized:  # whose heads have a dtype of their own
            self.model.to(dtype)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        masks: bool = False,
        engine: "Engine" = "torch",
    ) -> Self:
        """Load a model folder: model.safetensors, config.json and preprocessor_config.json; made fast (`optimize`).

        Args:
            folder: of the model.
            device: where the model runs.
            dtype: what it computes in.
            masks: load it with its mask head.
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
        """See `prepare_image`; with this detector's image processor."""
        return prepare_image(image, self.image_processor)

    @torch.inference_mode()
    def detect(self, prepared: Sequence[PreparedImage], top_k: int | None = None) -> list[Detections]:
        """Run the model on images of one canonical shape.

        Args:
            prepared: images from `prepare`; none gives an empty list.
            top_k: how many detections to keep of each image, by score; None keeps all queries.

        Raises:
            ValueError: the images have different canonical shapes.
        """
        if not prepared:
            return []
        return self.detections(self.run(prepared), prepared, top_k)

    def detect_image(self, image: bytes | Image.Image | torch.Tensor) -> list[dict[str, Any]]:
        """All detections in one image, see `prepare`, as plain values, see `Detections.to_dicts`."""
        return self.detect([self.prepare(image)])[0].to_dicts(self.model.config.id2label)

    @torch.inference_mode()
    def run(self, prepared: Sequence[PreparedImage], min_score: float | None = None) -> Any:
        """The model's own output for images of one canonical shape, of which there is at least one.

        Args:
            prepared: the images.
            min_score: of a model with a mask head: compute only the masks that are wanted, see
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
        """What `run` returned, as detections; see `detect`."""
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
    """Bool [B, *shape], true on the image of each size in the upper left corner."""
    heights, widths = torch.tensor(sizes, device=device).unbind(1)
    rows = torch.arange(shape[0], device=device) < heights[:, None]
    columns = torch.arange(shape[1], device=device) < widths[:, None]
    return rows[:, :, None] & columns[:, None, :]


def _to_numpy(*tensors: torch.Tensor) -> Any:
    return [tensor.cpu().numpy() for tensor in tensors]
