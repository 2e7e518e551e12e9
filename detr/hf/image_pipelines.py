"""The pipelines that `detr.pipeline` makes: a model and its image processor as one function of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image

from detr.hf.image_source import DEFAULT_TIMEOUT, ImageSource, is_image_source, load_image
from detr.image_processing.decode import Orientation, check_orientation
from detr.image_processing.processor import DetrImageProcessor
from detr.image_processing.size import canonical_shape

if TYPE_CHECKING:
    from detr.model.pretrained import DetrPreTrainedModel

Result = list[dict[str, Any]]
"""What is found in one image."""

_Size = tuple[int, int]
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_PADDINGS = (None, "canonical")
_SUBTASKS = (None, "panoptic", "instance", "semantic")


@dataclass(frozen=True)
class _Sizes:
    """(height, width) of a batch: of each image as given, of each resized, and of the padded batch."""

    original: list[_Size]
    processed: list[_Size]
    padded: _Size


class ImagePipeline(ABC):
    """A model and its image processor as one function of images; `pipeline` makes them.

    Args:
        model: put into evaluation mode; it stays on its device and keeps its dtype.
        image_processor: prepares the images.
        pad: what an image is padded to. None: the largest of its batch, as transformers; then `batch_size` changes
            results a little. "canonical": a shape that follows from its own size, and only images of one shape share
            a batch; the results are those of `detr.ObjectDetector`, whatever the batch.
        batch_size: images that the model sees at once.
        orientation: "apply" turns images upright by their EXIF orientation, as transformers' pipelines do; "ignore"
            keeps the stored pixels, to which the annotations of most data sets refer.
        options: defaults of the call's options.

    Raises:
        ValueError: another padding or orientation, a batch size below 1.
        TypeError: an unknown option.
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
        self.batch_size = _at_least_one(batch_size)
        check_orientation(orientation)
        self.orientation = orientation
        self.options = self._checked(options)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
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
        """What the pipeline finds in one image or in many.

        Args:
            inputs: an http(s) URL, which needs the network; a path; base64, also as a data URI; an encoded image as
                bytes or as a file opened in binary mode; a Pillow image; a uint8 array or tensor of 0..255,
                [height, width], [channels, height, width] or [height, width, channels]. Or a list of these; or any
                other iterable, which is read as it is consumed.
            images: old name of `inputs`.
            batch_size: images that the model sees at once, by default the pipeline's.
            timeout: seconds to wait for a server; None for ever.
            options: see the class of the pipeline.

        Returns:
            A result for an image, a list of them for a list, an iterator for another iterable.

        Raises:
            ImageError: an image cannot be fetched or decoded.
            FileNotFoundError: there is no such file.
            TypeError: something that is not an image, or an unknown option.
            ValueError: an option has a value that cannot be used, or an array is not uint8 or its layout is not clear.
        """
        given: Any = images if inputs is None else inputs
        if given is None:
            raise ValueError("there is no image: give an address, a path, an image or a list of these")
        size = self.batch_size if batch_size is None else _at_least_one(batch_size)
        settings = self.options | self._checked(options)
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
    def _find(self, inputs: Mapping[str, Any], sizes: _Sizes, settings: Mapping[str, Any]) -> list[Result]:
        """Run the model on a batch; the result of each image."""

    def _checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        unknown = options.keys() - self._options
        if unknown:
            raise TypeError(
                f"the pipeline {self.task!r} has no option {', '.join(sorted(unknown))}: there are "
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
                found = self._run([tensors[index] for index in indices], padded, settings)
                results.update(zip(indices, found, strict=True))
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
        """Which images of a chunk share a batch, by what they are padded to; None is the largest of them."""
        if self.pad is None:
            return {None: list(range(len(tensors)))}
        groups: dict[_Size | None, list[int]] = {}
        for index, tensor in enumerate(tensors):
            groups.setdefault(canonical_shape(*self._processed_size(tensor)), []).append(index)
        return groups

    @torch.inference_mode()
    def _run(
        self, tensors: Sequence[torch.Tensor], padded: _Size | None, settings: Mapping[str, Any]
    ) -> list[Result]:
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
        return self._find(inputs, sizes, settings)

    def _processed_size(self, tensor: torch.Tensor) -> _Size:
        return self.image_processor.output_size(tensor.shape[-2], tensor.shape[-1])


class ObjectDetectionPipeline(ImagePipeline):
    """Images to boxes.

    The call's option is `threshold`, 0.5 by default: a detection's score must exceed it. A result is a list, in the
    order of the model's queries, of `{"score": float, "label": str, "box": {"xmin", "ymin", "xmax", "ymax": int}}`,
    corners in pixels of the image, cut off to whole numbers towards zero and not clipped to the image.
    """

    task = "object-detection"
    _options = frozenset({"threshold"})

    def _find(self, inputs: Mapping[str, Any], sizes: _Sizes, settings: Mapping[str, Any]) -> list[Result]:
        found = self.image_processor.post_process_object_detection(
            self.model(**inputs), settings.get("threshold", 0.5), sizes.original
        )
        names = self.model.config.id2label
        return [
            [
                {"score": score, "label": names[label], "box": dict(zip(_CORNERS, box, strict=True))}
                for score, label, box in zip(
                    one["scores"].tolist(), one["labels"].tolist(), one["boxes"].int().tolist(), strict=True
                )
            ]
            for one in found
        ]


class ImageSegmentationPipeline(ImagePipeline):
    """Images to masks.

    The call's options are `subtask` ("panoptic", the default, "instance" or "semantic"), `threshold` (0.9: a
    segment's score must exceed it), `mask_threshold` (0.5) and `overlap_mask_area_threshold` (0.5), which
    `post_process_panoptic_segmentation` describes, and `label_ids_to_fuse`, classes whose segments are one in the
    subtask "panoptic" (none). A result is a list of `{"score": float, "label": str, "mask": PIL image}`, the mask of
    mode L, 255 on the segment and 0 elsewhere, as large as the image; the score of a semantic class is None.
    """

    task = "image-segmentation"
    _options = frozenset(
        {"subtask", "threshold", "mask_threshold", "overlap_mask_area_threshold", "label_ids_to_fuse"}
    )

    def _checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        if options.get("subtask") not in _SUBTASKS:
            raise ValueError(f"subtask is {options['subtask']!r}: expected one of {_SUBTASKS[1:]}")
        return super()._checked(options)

    def _find(self, inputs: Mapping[str, Any], sizes: _Sizes, settings: Mapping[str, Any]) -> list[Result]:
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
        outputs = self.model(**inputs, min_score=threshold)  # masks that are dropped anyway are not computed
        thresholds = {
            "threshold": threshold,
            "mask_threshold": settings.get("mask_threshold", 0.5),
            "overlap_mask_area_threshold": settings.get("overlap_mask_area_threshold", 0.5),
        }
        if settings.get("subtask") == "instance":
            found = self.image_processor.post_process_instance_segmentation(outputs, **thresholds, **views)
        else:
            fuse = settings.get("label_ids_to_fuse") or ()
            found = self.image_processor.post_process_panoptic_segmentation(
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
            for one in found
        ]


def _mask(on: torch.Tensor) -> Image.Image:
    """A bool map [height, width] as a Pillow image of mode L, 255 where it is on."""
    return Image.fromarray(on.cpu().numpy().astype(np.uint8) * 255)


def _at_least_one(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: expected at least 1")
    return batch_size
