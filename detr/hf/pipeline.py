"""`pipeline()`: from images, wherever they are, to detections or segments as plain values.

The results have the form of transformers' pipelines, and its values where the two compute alike. Different on
purpose: transparent images are composited on white, 16-bit ones keep their range, and the padding of a batch is cut
off masks before they are resized.

    import detr

    detector = detr.pipeline("object-detection", model="path/to/model")
    detector("cats.jpg")  # [{"score": 0.998, "label": "cat", "box": {"xmin": 13, "ymin": 52, ...}}, ...]

    segmenter = detr.pipeline("image-segmentation", model="path/to/model")
    segmenter("cats.jpg")  # [{"score": 0.98, "label": "cat", "mask": <PIL image of mode L>}, ...]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from detr.hf.auto import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageSegmentation,
    AutoModelForObjectDetection,
)
from detr.hf.image_pipelines import ImagePipeline, ImageSegmentationPipeline, ObjectDetectionPipeline
from detr.image_processing.decode import Orientation
from detr.image_processing.processor import DetrImageProcessor
from detr.model_files import FILE_ARGUMENTS

if TYPE_CHECKING:
    from detr.model.pretrained import DetrPreTrainedModel

_PIPELINES: dict[str, type[ImagePipeline]] = {
    pipeline.task: pipeline for pipeline in (ObjectDetectionPipeline, ImageSegmentationPipeline)
}


def pipeline(
    task: str | None = None,
    model: str | Path | DetrPreTrainedModel | None = None,
    *,
    image_processor: str | Path | DetrImageProcessor | None = None,
    device: torch.device | str | int | None = None,
    device_map: torch.device | str | int | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    backend: str | None = None,
    use_fast: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    pad: str | None = None,
    batch_size: int = 1,
    orientation: Orientation = "apply",
    **options: Any,
) -> ImagePipeline:
    """A function from images to what is in them.

    Args:
        task: "object-detection" or "image-segmentation"; None is what the model was made for.
        model: a model folder, a hub id `ORG/NAME`, which asks for the network, or a model.
        image_processor: the same, or an image processor; by default the model folder's own.
        device: where the model runs: a device, or the index of a GPU, -1 being the CPU.
        device_map: the same under another name; "auto", the default for a folder or an id, is a GPU where there is
            one. A model that is given stays where it is.
        dtype: of the model's parameters; "auto", the default, is the one it was saved with, or has.
        torch_dtype: another name of `dtype`.
        revision: of a hub id.
        token: of a hub id: an access token; True is the stored one, False sends none.
        local_files_only: of a hub id: use what has been downloaded before.
        backend: of the image processor: see `detr.AutoImageProcessor`.
        use_fast: old name of `backend`: see there.
        model_kwargs: further arguments of the model's `from_pretrained`; those that concern files, such as
            `cache_dir`, also hold for the image processor.
        pad: None or "canonical": see `detr.hf.image_pipelines.ImagePipeline`.
        batch_size: images that the model sees at once.
        orientation: "apply" or "ignore" images' EXIF orientation: see `detr.hf.image_pipelines.ImagePipeline`.
        options: defaults of the call's options, such as `threshold`: see `ObjectDetectionPipeline` and
            `ImageSegmentationPipeline`.

    Returns:
        `ObjectDetectionPipeline` or `ImageSegmentationPipeline`; call it with an image or a list of images.

    Raises:
        FileNotFoundError: there is no such folder, file or model.
        RuntimeError: this machine has no such device.
        TypeError: an unknown option, or an unknown argument in `model_kwargs`.
        ValueError: another task, a model without what the task needs, or arguments that exclude each other.
    """
    if task is not None and task not in _PIPELINES:
        raise ValueError(f"task is {task!r}: expected one of {tuple(_PIPELINES)}")
    if model is None:
        raise ValueError(
            "there is no model: give a model folder, a hub id such as 'facebook/detr-resnet-50' or a model"
        )
    if device is not None and device_map is not None:
        raise ValueError(f"give either device={device!r} or device_map={device_map!r}, not both")
    place = device_map if device is None else "cpu" if device == -1 else device
    where = {"revision": revision, "token": token, "local_files_only": local_files_only or None}
    where = {name: value for name, value in where.items() if value is not None}
    arguments = _merged(dict(model_kwargs or {}), {**where, "dtype": dtype, "torch_dtype": torch_dtype})
    where = {name: arguments.pop(name) for name in FILE_ARGUMENTS & arguments.keys()}
    loaded: DetrPreTrainedModel
    if isinstance(model, str | Path):
        source = model
        made_for = _task_of(AutoConfig.from_pretrained(source, **where).architectures)
        task = task or made_for or "object-detection"
        _check_masks(task, made_for != "object-detection", source)
        auto = AutoModelForImageSegmentation if task == "image-segmentation" else AutoModelForObjectDetection
        arguments = _merged(arguments, {"device_map": place})
        loaded = auto.from_pretrained(source, **{"device_map": "auto"} | arguments | where)
    else:
        if model_kwargs:
            raise ValueError(
                f"model_kwargs {sorted(model_kwargs)} are for a model that is loaded, not a given one"
            )
        made_for = _task_of([type(model).__name__])
        task = task or made_for or "object-detection"
        _check_masks(task, made_for == "image-segmentation", type(model).__name__)
        loaded = _placed(model, place, dtype, torch_dtype)
    if image_processor is None:
        if not isinstance(model, str | Path):
            raise ValueError("there is no image processor: give image_processor=... together with a model")
        image_processor = model
    if isinstance(image_processor, str | Path):
        image_processor = AutoImageProcessor.from_pretrained(
            image_processor, backend=backend, use_fast=use_fast, **where
        )
    else:
        unused = {"backend": backend, "use_fast": use_fast} | ({} if isinstance(model, str | Path) else where)
        for name, value in unused.items():
            if value is not None:
                raise ValueError(f"{name}={value!r} is for what is loaded, not for a given image processor")
    return _PIPELINES[task](
        loaded, image_processor, pad=pad, batch_size=batch_size, orientation=orientation, **options
    )


def _merged(model_kwargs: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained`, each of which the pipeline and `model_kwargs` may give, but not both."""
    for name, value in own.items():
        if value is None:
            continue
        if model_kwargs.setdefault(name, value) != value:
            raise ValueError(f"{name}={value!r} contradicts model_kwargs, which has {model_kwargs[name]!r}")
    return model_kwargs


def _task_of(architectures: Sequence[str] | None) -> str | None:
    tasks = {"DetrForObjectDetection": "object-detection", "DetrForSegmentation": "image-segmentation"}
    return next((tasks[name] for name in architectures or () if name in tasks), None)


def _check_masks(task: str, has_masks: bool, what: object) -> None:
    if task == "image-segmentation" and not has_masks:
        raise ValueError(
            f"{what} detects objects and has no masks: 'image-segmentation' needs a DetrForSegmentation"
        )


def _placed(
    model: DetrPreTrainedModel,
    place: torch.device | str | int | None,
    dtype: torch.dtype | str | None,
    torch_dtype: torch.dtype | str | None,
) -> DetrPreTrainedModel:
    """A model that was given, on a device and of a dtype where these were asked for."""
    from detr.checkpoint.load_save import find_device, find_dtype

    if place is not None:
        model = model.to(find_device(place))
    chosen = find_dtype(dtype, torch_dtype)
    return model if chosen is None else model.to(chosen)
