"""`DetrImageProcessor`: converts images and annotations to model inputs and labels, and model outputs to detections."""

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from detr.image_processing.annotations import (
    Labels,
    check_annotations,
    detection_labels,
    pad_masks,
    relate_to_padded,
    resize_labels,
    to_relative_boxes,
)
from detr.image_processing.batch import BatchFeature
from detr.image_processing.layouts import ImageInput, image_to_tensor, list_images
from detr.image_processing.masks import resize_map, torch_nearest_indices
from detr.image_processing.panoptic import check_panoptic, panoptic_labels
from detr.image_processing.pixels import (
    BILINEAR,
    channel_values,
    clear_padding,
    normalize,
    pad_to_batch,
    resize,
)
from detr.image_processing.segment_map import SegmentMap
from detr.image_processing.settings import pad_size_dict, read_settings, size_dict, write_settings
from detr.image_processing.size import output_size
from detr.model_files import ModelFiles
from detr.postprocess.methods import PostProcessingMethods

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_FORMATS = ("coco_detection", "coco_panoptic")
_BOX_REFERENCES = ("image", "padded_batch")
_TENSOR_TYPES = ("pt", "np", None)


@dataclass(kw_only=True)
class DetrImageProcessor(PostProcessingMethods):
    """Prepare images and COCO annotations for DETR, like transformers' class of this name.

    The steps are: convert to RGB, resize, rescale, normalize, and pad with zeros at the bottom and on the right. Every
    attribute can be overridden for one call: `processor(images, do_pad=False)`.

    Attributes:
        format: format of the annotations, "coco_detection" or "coco_panoptic".
        do_resize, size, resample: resize to `size` (one of the forms of `output_size`, an int for the shortest edge, or
            (height, width)) with one of Pillow's filters, given by its number; 2 is bilinear.
        do_rescale, rescale_factor: multiply pixels by the factor.
        do_normalize, image_mean, image_std: subtract the mean and divide by the standard deviation of each channel.
        do_convert_annotations: convert boxes to cxcywh in 0..1; otherwise they stay corners in pixels of the resized
            image. The default is the value of `do_normalize`.
        do_pad, pad_size: pad to the largest height and width of the batch, or to `pad_size` (a dict, (height,
            width) or the side of a square), and return the pixel mask; True by default.
        do_convert_rgb: convert gray, transparent and 16-bit images to 8-bit RGB (`convert_to_rgb`). Use False for a
            model whose `num_channels` is not 3. Transformers converts only on request, and otherwise fails on these.
        boxes_relative_to: what the labels' `size` and relative boxes refer to. "image": the resized image without
            padding, as the pretrained weights and the post-processing expect. "padded_batch": the padded image, as in
            transformers since its pull request 28363. The two agree for images that are not padded.
        scale_keypoints: scale keypoints with the image; transformers leaves them in pixels of the original image.

    Args:
        max_size: old name of the longest edge, used with an int `size`.
        pad_and_return_pixel_mask: old name of `do_pad`, used if `do_pad` is not given.

    Raises:
        ValueError: a setting has an invalid value.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values", "pixel_mask"]
    _is_fast: ClassVar[bool] = True

    format: str = "coco_detection"
    do_resize: bool = True
    size: Any = None
    resample: int = BILINEAR
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: float | Sequence[float] = IMAGENET_MEAN
    image_std: float | Sequence[float] = IMAGENET_STD
    do_convert_annotations: bool | None = None
    do_pad: bool | None = None
    pad_size: Any = None
    do_convert_rgb: bool = True
    boxes_relative_to: str = "image"
    scale_keypoints: bool = False
    max_size: InitVar[int | None] = None
    pad_and_return_pixel_mask: InitVar[bool | None] = None

    def __post_init__(self, max_size: int | None, pad_and_return_pixel_mask: bool | None) -> None:
        self.size = size_dict(800 if self.size is None else self.size, max_size)
        output_size(1, 1, self.size)  # raises if the keys are invalid
        self.pad_size = None if self.pad_size is None else pad_size_dict(self.pad_size)
        self.resample = int(self.resample)
        self.image_mean, self.image_std = _channels(self.image_mean), _channels(self.image_std)
        if self.do_pad is None:
            self.do_pad = pad_and_return_pixel_mask is not False
        elif pad_and_return_pixel_mask not in (None, self.do_pad):
            raise ValueError(
                f"pad_and_return_pixel_mask={pad_and_return_pixel_mask} contradicts do_pad={self.do_pad}; they are "
                "the same setting"
            )
        if self.do_convert_annotations is None:
            self.do_convert_annotations = self.do_normalize
        if self.format not in _FORMATS:
            raise ValueError(f"format is {self.format!r}: expected one of {_FORMATS}")
        if self.boxes_relative_to not in _BOX_REFERENCES:
            raise ValueError(
                f"boxes_relative_to is {self.boxes_relative_to!r}: expected one of {_BOX_REFERENCES}"
            )
        if self.do_normalize and not channel_values(self.image_std, None).all():
            raise ValueError(f"image_std is {self.image_std}: pixels cannot be divided by zero")

    def __call__(self, images: Any, annotations: Any = None, **kwargs: Any) -> BatchFeature:
        """Call `preprocess`."""
        return self.preprocess(images, annotations, **kwargs)

    def preprocess(
        self,
        images: Any,
        annotations: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        return_segmentation_masks: bool | None = None,
        masks_path: str | Path | None = None,
        *,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        device: torch.device | str | None = None,
        **overrides: Any,
    ) -> BatchFeature:
        """Convert images, and optionally annotations, to model inputs and labels.

        Args:
            images: an image or a list of images: PIL, numpy or torch; gray [height, width], or with channels first
                or last; values 0..255 (for 0..1 set `do_rescale=False`).
            annotations: for each image {"image_id": int, "annotations": [COCO objects]}, or for the format
                "coco_panoptic" {"image_id": int, "file_name": str, "segments_info": [COCO segments]}.
            return_segmentation_masks: also return `masks` in the labels; by default only for "coco_panoptic".
            masks_path: folder of the PNGs that panoptic annotations name.
            return_tensors: "pt" for stacked tensors, "np" for numpy arrays, None for lists of tensors.
            input_data_format: "channels_first" or "channels_last", needed if the shape of an array is ambiguous.
            device: device to process the images on; labels are moved there too.
            overrides: attributes of the processor for this call; None means the processor's own value.

        Returns:
            `pixel_values` float32 [batch, channels, height, width], normalized; with `do_pad`, `pixel_mask` int64
            [batch, height, width], 1 on the image and 0 on padding; with annotations, `labels`, one dict for each
            image: see `detr.image_processing.annotations`.

        Raises:
            ValueError: annotations are invalid, the layout or channels of an image cannot be inferred, images of
                unequal size would be stacked without padding, or `pad_size` is smaller than an image.
            FileNotFoundError: a PNG of panoptic annotations does not exist.
            TypeError: an input is not an image, or an override is unknown.
        """
        if return_tensors not in _TENSOR_TYPES:
            raise ValueError(f"return_tensors is {return_tensors!r}: expected one of {_TENSOR_TYPES}")
        given_overrides = {name: value for name, value in overrides.items() if value is not None}
        if "pad_and_return_pixel_mask" in given_overrides:
            given_overrides.setdefault("do_pad", given_overrides["pad_and_return_pixel_mask"])
        settings = replace(self, **given_overrides)
        given = list_images(images)
        if not given:
            raise ValueError("there are no images: expected at least one")
        tensors = [settings.to_tensor(image, input_data_format).to(device=device) for image in given]
        originals = [(image.shape[-2], image.shape[-1]) for image in tensors]
        sizes = [settings.output_size(*size) for size in originals]
        labels = None
        if annotations is not None:
            labels = settings._labels(annotations, originals, sizes, return_segmentation_masks, masks_path)
        resized = [settings.resize(tensor) for tensor in tensors]

        data: dict[str, Any] = {}
        if settings.do_pad:
            padded_size = settings._padded_size(sizes)
            pixels, pixel_mask = pad_to_batch(resized, padded_size)
            data["pixel_values"] = settings.rescale_and_normalize(pixels)
            clear_padding(data["pixel_values"], sizes)
            data["pixel_mask"] = pixel_mask
            labels = None if labels is None else [pad_masks(label, padded_size) for label in labels]
            if labels is not None and settings.boxes_relative_to == "padded_batch":
                rescale_boxes = bool(settings.do_convert_annotations)
                labels = [relate_to_padded(label, padded_size, rescale_boxes) for label in labels]
        else:
            images = [settings.rescale_and_normalize(image) for image in resized]
            data["pixel_values"] = images if return_tensors is None else _stack(images, tensors)
        if labels is not None:
            data["labels"] = [BatchFeature(label).to(device) for label in labels]
        return _as_type(data, return_tensors)

    def pad_and_create_pixel_mask(self, images: Any, return_tensors: str | None = None) -> BatchFeature:
        """Pad processed images to the largest of them, for a custom `collate_fn`; the DETR page cites this name.

        Args:
            images: list of tensors or arrays [channels, height, width].
            return_tensors: as in `preprocess`.

        Returns:
            `pixel_values` and `pixel_mask`, as `preprocess` returns them.
        """
        tensors = [torch.as_tensor(image) for image in images]
        size = _largest([(image.shape[-2], image.shape[-1]) for image in tensors])
        pixel_values, pixel_mask = pad_to_batch(tensors, size)
        return _as_type({"pixel_values": pixel_values, "pixel_mask": pixel_mask}, return_tensors)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, use_fast: bool | None = None, **kwargs: Any) -> Self:
        """Load a processor saved by this class or by transformers.

        Args:
            source: a model folder with `preprocessor_config.json` (old layouts are read too), that file itself, or a
                hub id `ORG/NAME`, of which only this file is downloaded.
            use_fast: must be True for the class that resizes with torch and False for the Pillow class;
                `AutoImageProcessor` selects the class by it.
            kwargs: arguments of `detr.model_files.ModelFiles` (`revision`, `cache_dir`, `token`, `local_files_only`,
                `force_download`, `subfolder`), and attributes that replace those of the file.

        Raises:
            FileNotFoundError: the folder, file or model does not exist.
            TypeError: an attribute is unknown.
            ValueError: the file is not a JSON object or holds an invalid value, or `use_fast` requests the other class.
        """
        if use_fast is not None and use_fast != cls._is_fast:
            raise ValueError(
                f"use_fast={use_fast} is not {cls.__name__}: use "
                f"{'DetrImageProcessor' if use_fast else 'DetrImageProcessorPil'}, or AutoImageProcessor"
            )
        files, overrides = ModelFiles.open(source, **kwargs)
        return cls.from_settings(*read_settings(files), **overrides)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], file: Path, **overrides: Any) -> Self:
        """Create from the settings of a file, which errors name; see `from_dict`."""
        try:
            return cls.from_dict(settings, **overrides)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], **overrides: Any) -> Self:
        """Build a processor from the entries of `preprocessor_config.json`; unknown entries are ignored."""
        known = {field.name for field in fields(cls)} | {"max_size", "pad_and_return_pixel_mask"}
        given = {name: value for name, value in settings.items() if name in known and value is not None}
        # Drop old names if the file or an override has the new ones.
        if "do_pad" in overrides or ("do_pad" in given and "pad_and_return_pixel_mask" not in overrides):
            given.pop("pad_and_return_pixel_mask", None)
        elif "pad_and_return_pixel_mask" in overrides:
            given.pop("do_pad", None)
        if "size" in overrides or isinstance(given.get("size"), Mapping):
            given.pop("max_size", None)
            if "max_size" in overrides and "size" in given:
                given["size"] = {**given["size"], "longest_edge": None}
        return cls(**given | overrides)

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of `preprocessor_config.json`: those of transformers, and our own if not the default."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("pad_size", "do_convert_rgb", "boxes_relative_to", "scale_keypoints"):
            if settings[name] == getattr(DetrImageProcessor, name):
                del settings[name]
        for name in ("image_mean", "image_std"):
            if isinstance(settings[name], Sequence):
                settings[name] = list(settings[name])
        # Transformers writes the same name for its Pillow class: the reader selects one of the two.
        return settings | {"image_processor_type": "DetrImageProcessor"}

    def save_pretrained(self, folder: str | Path) -> list[str]:
        """Write `preprocessor_config.json` to a folder, which is created if missing; returns the path of the file."""
        return [str(write_settings(self.to_dict(), folder))]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) before padding of an image of `height` x `width` pixels."""
        return output_size(height, width, self.size) if self.do_resize else (height, width)

    @property
    def keeps_gray(self) -> bool:
        """Whether gray images stay at one channel: `image_mean` and `image_std` are lists of one value."""
        return all(
            isinstance(values, Sequence) and len(values) == 1 for values in (self.image_mean, self.image_std)
        )

    def to_tensor(self, image: ImageInput, input_data_format: str | None = None) -> torch.Tensor:
        """Convert an image to [channels, height, width] with the settings of this processor: see `image_to_tensor`."""
        return image_to_tensor(image, self.do_convert_rgb, input_data_format, self.keeps_gray)

    def resize(self, image: torch.Tensor) -> torch.Tensor:
        """Resize an image, uint8 or float [channels, height, width], with the settings of this processor; same dtype."""
        return resize(image, self.output_size(image.shape[-2], image.shape[-1]), self.resample)

    def rescale_and_normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Rescale and normalize pixels [..., channels, height, width] after the resize, on any device.

        Returns:
            float32 of the same shape. Without `do_normalize`, the pixels times the factor, or unchanged without
            `do_rescale`.

        Raises:
            ValueError: the mean or the standard deviation has the wrong number of values for the channels.
        """
        if not self.do_normalize:
            return images * self.rescale_factor if self.do_rescale else images
        factor = self.rescale_factor if self.do_rescale else None
        mean, std = channel_values(self.image_mean, factor), channel_values(self.image_std, factor)
        if not {len(mean), len(std)} <= {1, images.shape[-3]}:
            raise ValueError(
                f"an image has {images.shape[-3]} channels, but image_mean has {len(mean)} values and image_std "
                f"{len(std)}: give one for each channel"
            )
        return normalize(images, mean.to(images.device), std.to(images.device))

    def resize_map(self, values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Resize masks or label maps, bool or int [..., height, width], with nearest-neighbor sampling."""
        return resize_map(values, size, torch_nearest_indices)

    def _labels(
        self,
        annotations: Any,
        originals: Sequence[tuple[int, int]],
        sizes: Sequence[tuple[int, int]],
        return_masks: bool | None,
        masks_path: str | Path | None,
    ) -> list[Labels]:
        """Compute the labels of images that are resized from `originals` to `sizes`, before padding."""
        if isinstance(annotations, Mapping):
            annotations = [annotations]
        if self.format == "coco_panoptic":
            folder = check_panoptic(annotations, len(sizes), masks_path)
            panoptic = [panoptic_labels(a, folder, *original) for a, original in zip(annotations, originals)]
            return [
                self._resize_labels(label, size, segments if return_masks is not False else None)
                for (label, segments), size in zip(panoptic, sizes)
            ]
        check_annotations(annotations, len(sizes))
        return [
            self._resize_labels(
                detection_labels(annotation, *original, return_masks=bool(return_masks)), size
            )
            for annotation, original, size in zip(annotations, originals, sizes)
        ]

    def _resize_labels(
        self, labels: Labels, size: tuple[int, int], segments: SegmentMap | None = None
    ) -> Labels:
        """Apply the resize of the image to `size` to its labels; masks are extracted from the resized `segments`."""
        if self.do_resize:
            labels = resize_labels(labels, size, self.scale_keypoints)
        if segments is not None:
            resized = SegmentMap(self.resize_map(segments.numbers, size), segments.segments)
            labels = labels | {"masks": resized.masks()}
        elif "masks" in labels:
            labels = labels | {"masks": self.resize_map(labels["masks"], size)}
        return to_relative_boxes(labels) if self.do_convert_annotations else labels

    def _padded_size(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return _largest(sizes) if self.pad_size is None else (self.pad_size["height"], self.pad_size["width"])


def _channels(values: float | Sequence[float]) -> float | tuple[float, ...]:
    return values if isinstance(values, int | float) else tuple(values)


def _largest(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def _stack(images: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack images into a batch that shares no memory with the input images `given`."""
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"images of unequal shapes {sorted(shapes)} cannot be stacked: set do_pad=True or return_tensors=None"
        )
    if len(images) == 1 and images[0] is not given[0]:
        return images[0][None]
    if images[0].stride(0) != 1:
        return torch.stack(list(images))
    # Stay channels-last (interleaved), as decoders and the resize write images: converting to planar takes as long as
    # the resize.
    first = images[0]
    batch = torch.empty(
        (len(images), *first.shape),
        dtype=first.dtype,
        device=first.device,
        memory_format=torch.channels_last,
    )
    for into, image in zip(batch, images):
        into.copy_(image)
    return batch


def _as_type(data: dict[str, Any], return_tensors: str | None) -> BatchFeature:
    """Leave tensors as they are ("pt"), or convert them to numpy arrays ("np") or batches to lists of tensors (None)."""
    if return_tensors == "np":
        for name in data:
            if name == "labels":
                data[name] = [_as_type(labels, "np") for labels in data[name]]
            else:
                data[name] = data[name].cpu().numpy()
    elif return_tensors is None:
        for name in ("pixel_values", "pixel_mask"):
            if name in data:
                data[name] = list(data[name])
    return BatchFeature(data)
