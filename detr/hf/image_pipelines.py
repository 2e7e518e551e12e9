"""The pipelines that `detr.pipeline` creates: a model with its image processor, called with images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import numpy as np
import torch
from PIL import Image

from detr.hf.image_source import DEFAULT_TIMEOUT, ImageSource, is_image_source, load_image
from detr.image_processing.decode import Orientation, check_orientation
from detr.image_processing.processor import DetrImageProcessor
from detr.image_processing.size import canonical_shape

if TYPE_CHECKING:
    from detr.model.pretrained import DetrPreTrainedModel


class Corners(TypedDict):
    """A box in pixels of the image, truncated toward zero and not clipped to the image."""

    xmin: int
    ymin: int
    xmax: int
    ymax: int


class DetectedObject(TypedDict):
    """An object of "object-detection"."""

    score: float
    label: str
    box: Corners


class LabeledMask(TypedDict):
    """A segment of "image-segmentation".

    Attributes:
        score: None in semantic segmentation.
        mask: mode L, of the size of the image, 255 on the segment and 0 elsewhere.
    """

    score: float | None
    label: str
    mask: Image.Image


Result = list[DetectedObject] | list[LabeledMask]
"""The detections or segments of one image."""

_Size = tuple[int, int]
_PADDINGS = (None, "canonical")
_SUBTASKS = (None, "panoptic", "instance", "semantic")


@dataclass(frozen=True)
class _Sizes:
    """(height, width) of each original image, of each resized image, and of the padded batch."""

    original: list[_Size]
    processed: list[_Size]
    padded: _Size


class ImagePipeline(ABC):
    """A model with its image processor, called with images; created by `pipeline`.

    Args:
        model: put into evaluation mode; it stays on its device and keeps its dtype.
        image_processor: preprocesses the images.
        pad: how images are padded. None pads to the largest image of the batch, as in transformers; then `batch_size`
            changes results slightly. "canonical" pads to a shape that depends on the size of the image alone, and only
            images of equal shape share a batch; then the results are those of `detr.ObjectDetector`, whatever the
            batch.
        batch_size: images per forward pass.
        orientation: "apply" rotates images upright by their EXIF orientation, as transformers' pipelines do; "ignore"
            keeps the stored pixels, to which the annotations of most data sets refer.
        options: default values for the options of a call.

    Raises:
        ValueError: `pad` or `orientation` has another value, or `batch_size` is below 1.
        TypeError: an option is unknown.
    """

    task: ClassVar[str]
    _options: ClassVar[frozenset[str]]

    def __init__(
        self,
        model: DetrPreTrainedModel,
        image_processor: DetrImageProcessor,
        *,
        pad: str | None = None,
        batch_size: int = 1,
        orientation: Orientation = "apply",
        **options: Any,
    ) -> None:
        if pad not in _PADDINGS:
            raise ValueError(f"pad is {pad!r}: expected None or 'canonical'")
        self.model = model.eval()
        self.image_processor = image_processor
        self.pad = pad
        self.batch_size = _check_batch_size(batch_size)
        check_orientation(orientation)
        self.orientation = orientation
        self.options = self._check_options(options)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    def __call__(
        self,
        inputs: ImageSource | Iterable[ImageSource] | None = None,
        *,
        images: ImageSource | Iterable[ImageSource] | None = None,
        batch_size: int | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        **options: Any,
    ) -> Result | list[Result] | Iterator[Result]:
        """Run the pipeline on one or many images.

        Args:
            inputs: an http(s) URL, which is downloaded; a path; base64, also as a data URI; an encoded image as bytes
                or as a file opened in binary mode; a Pillow image; a uint8 array or tensor of 0..255, [height, width],
                [channels, height, width] or [height, width, channels]. Or a list of these, or any other iterable,
                which is read lazily.
            images: old name of `inputs`.
            batch_size: images per forward pass; by default that of the pipeline.
            timeout: seconds to wait for a server; None waits forever.
            options: see the class of the pipeline.

        Returns:
            A result for an image, a list of results for a list, an iterator for another iterable.

        Raises:
            ImageError: an image cannot be fetched or decoded.
            FileNotFoundError: a file does not exist.
            TypeError: an input is not an image, or an option is unknown.
            ValueError: an option has an invalid value, or an array is not uint8 or its layout is ambiguous.
        """
        given: Any = images if inputs is None else inputs
        if given is None:
            raise ValueError("no image given: pass a URL, a path, an image or a list of these")
        size = self.batch_size if batch_size is None else _check_batch_size(batch_size)
        settings = self.options | self._check_options(options)
        if is_image_source(given) and not (isinstance(given, np.ndarray | torch.Tensor) and given.ndim > 3):
            return next(self._results([given], 1, timeout, settings))
        if isinstance(given, Mapping | Set) or not isinstance(given, Iterable):
            raise TypeError(
                f"the input is a {type(given).__name__}: expected an image (URL, path, base64, bytes, binary file, PIL "
                "image, uint8 array or tensor) or a list of images"
            )
        results = self._results(given, size, timeout, settings)
        return list(results) if isinstance(given, list | tuple | np.ndarray | torch.Tensor) else results

    @abstractmethod
    def _predict(
        self, inputs: Mapping[str, Any], sizes: _Sizes, settings: Mapping[str, Any]
    ) -> Sequence[Result]:
        """Run the model on a batch and return the result of each image."""

    def _check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        unknown = options.keys() - self._options
        if unknown:
            raise TypeError(
                f"the pipeline {self.task!r} has no option {', '.join(sorted(unknown))}: expected one of "
                f"{', '.join(sorted(self._options))}"
            )
        return dict(options)

    def _results(
        self,
        sources: Iterable[ImageSource],
        batch_size: int,
        timeout: float | None,
        settings: Mapping[str, Any],
    ) -> Iterator[Result]:
        remaining = iter(sources)
        while chunk := list(islice(remaining, batch_size)):
            tensors = [self._pixels(source, timeout) for source in chunk]
            results: dict[int, Result] = {}
            for padded, indices in self._groups(tensors).items():
                batch = self._run([tensors[index] for index in indices], padded, settings)
                results.update(zip(indices, batch, strict=True))
            yield from (results[index] for index in range(len(chunk)))

    def _pixels(self, source: ImageSource, timeout: float | None) -> torch.Tensor:
        image = load_image(source, timeout, self.orientation)
        tensor = self.image_processor.to_tensor(image)
        if tensor.dtype != torch.uint8 and not isinstance(image, Image.Image):
            raise ValueError(
                f"an image array is {tensor.dtype}: expected uint8, values 0..255; scale values of 0..1 by 255 and round"
            )
        return tensor

    def _groups(self, tensors: Sequence[torch.Tensor]) -> dict[_Size | None, list[int]]:
        """Group the images of a chunk into batches by their padded size; None pads to the largest of the chunk."""
        if self.pad is None:
            return {None: list(range(len(tensors)))}
        groups: dict[_Size | None, list[int]] = {}
        for index, tensor in enumerate(tensors):
            groups.setdefault(canonical_shape(*self._processed_size(tensor)), []).append(index)
        return groups

    @torch.inference_mode()
    def _run(
        self, tensors: Sequence[torch.Tensor], padded: _Size | None, settings: Mapping[str, Any]
    ) -> Sequence[Result]:
        pad_size = None if padded is None else {"height": padded[0], "width": padded[1]}
        inputs = self.image_processor(
            list(tensors),
            return_tensors="pt",
            input_data_format="channels_first",
            pad_size=pad_size,
            do_pad=None if padded is None else True,
        ).to(self.device, self.model.dtype)
        sizes = _Sizes(
            original=[(tensor.shape[-2], tensor.shape[-1]) for tensor in tensors],
            processed=[self._processed_size(tensor) for tensor in tensors],
            padded=(inputs["pixel_values"].shape[-2], inputs["pixel_values"].shape[-1]),
        )
        return self._predict(inputs, sizes, settings)

    def _processed_size(self, tensor: torch.Tensor) -> _Size:
        return self.image_processor.output_size(tensor.shape[-2], tensor.shape[-1])


class ObjectDetectionPipeline(ImagePipeline):
    """Detect objects as boxes.

    A call has the option `threshold` (0.5): the score of a detection must exceed it. A result is a list, in the order
    of the model's queries, of `{"score": float, "label": str, "box": {"xmin", "ymin", "xmax", "ymax": int}}`. The box
    is in pixels of the image, truncated toward zero and not clipped to the image.
    """

    task = "object-detection"
    _options = frozenset({"threshold"})

    def _predict(
        self, inputs: Mapping[str, Any], sizes: _Sizes, settings: Mapping[str, Any]
    ) -> list[list[DetectedObject]]:
        detections = self.image_processor.post_process_object_detection(
            self.model(**inputs), settings.get("threshold", 0.5), sizes.original
        )
        names = self.model.config.id2label
        return [
            [
                {
                    "score": score,
                    "label": names[label],
                    "box": {"xmin": xmin, "ymin": ymin, "xmax": xmax, "ymax": ymax},
                }
                for score, label, (xmin, ymin, xmax, ymax) in zip(
                    one["scores"].tolist(), one["labels"].tolist(), one["boxes"].int().tolist(), strict=True
                )
            ]
            for one in detections
        ]


class ImageSegmentationPipeline(ImagePipeline):
    """Segment images into masks.

    A call has these options, with defaults in parentheses: `subtask` ("panoptic"; also "instance" and "semantic");
    `threshold` (0.9), which the score of a segment must exceed; `mask_threshold` (0.5) and
    `overlap_mask_area_threshold` (0.5), see `post_process_panoptic_segmentation`; and `label_ids_to_fuse` (none),
    classes whose segments are fused into one in the subtask "panoptic".

    A result is a list of `{"score": float, "label": str, "mask": PIL image}`. The mask has mode L and the size of the
    image, with 255 on the segment and 0 elsewhere. The score of a semantic class is None.
    """

    task = "image-segmentation"
    _options = frozenset(
        {"subtask", "threshold", "mask_threshold", "overlap_mask_area_threshold", "label_ids_to_fuse"}
    )

    def _check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        if options.get("subtask") not in _SUBTASKS:
            raise ValueError(f"subtask is {options['subtask']!r}: expected one of {_SUBTASKS[1:]}")
        return super()._check_options(options)

    def _predict(
        self, inputs: Mapping[str, Any], sizes: _Sizes, settings: Mapping[str, Any]
    ) -> list[list[LabeledMask]]:
        names = self.model.config.id2label
        views: dict[str, Any] = {
            "target_sizes": sizes.original,
            "processed_sizes": sizes.processed,
            "padded_size": sizes.padded,
        }
        if settings.get("subtask") == "semantic":
            maps = self.image_processor.post_process_semantic_segmentation(self.model(**inputs), **views)
            return [
                [
                    {"score": None, "label": names[label], "mask": _mask(one == label)}
                    for label in torch.unique(one).tolist()
                ]
                for one in maps
            ]
        threshold = settings.get("threshold", 0.9)
        outputs = self.model(**inputs, min_score=threshold)  # skips masks that would be dropped
        thresholds = {
            "threshold": threshold,
            "mask_threshold": settings.get("mask_threshold", 0.5),
            "overlap_mask_area_threshold": settings.get("overlap_mask_area_threshold", 0.5),
        }
        if settings.get("subtask") == "instance":
            segmented = self.image_processor.post_process_instance_segmentation(
                outputs, **thresholds, **views
            )
        else:
            fuse = settings.get("label_ids_to_fuse") or ()
            segmented = self.image_processor.post_process_panoptic_segmentation(
                outputs, **thresholds, label_ids_to_fuse=fuse, merge_fused=bool(fuse), **views
            )
        return [
            [
                {
                    "score": segment["score"],
                    "label": names[segment["label_id"]],
                    "mask": _mask(one["segmentation"] == segment["id"]),
                }
                for segment in one["segments_info"]
            ]
            for one in segmented
        ]


def _mask(inside: torch.Tensor) -> Image.Image:
    """Convert a bool map [height, width] to a Pillow image of mode L, 255 for True."""
    return Image.fromarray(inside.cpu().numpy().astype(np.uint8) * 255)


def _check_batch_size(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: expected at least 1")
    return batch_size
