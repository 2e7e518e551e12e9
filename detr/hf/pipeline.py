"""`pipeline()`: detections or segments of images, as plain Python values.

Results have the format of transformers' pipelines, and the same values except for these intended differences:
transparent images are composited on white, 16-bit images keep their range, and the padding of a batch is cropped from
masks before they are resized.

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
    """Create a pipeline for a task and a model.

    Args:
        task: "object-detection" or "image-segmentation"; None is the task of the model.
        model: a model folder, a hub id `ORG/NAME`, which is downloaded, or a model object.
        image_processor: a folder or hub id, or an image processor; by default that of the model folder.
        device: device that the model runs on, or the index of a GPU; -1 is the CPU.
        device_map: another name of `device`. "auto", the default for a folder or hub id, uses a GPU if one is
            available. A model object stays on its device by default.
        dtype: of the model's parameters. "auto", the default, is the dtype of the saved weights, or that of the model
            object.
        torch_dtype: another name of `dtype`.
        revision: of a hub id.
        token: access token for a hub id; True uses the stored one, False sends none.
        local_files_only: for a hub id: use only files that were downloaded before.
        backend: of the image processor: see `detr.AutoImageProcessor`.
        use_fast: old name of `backend`: see there.
        model_kwargs: additional arguments of the model's `from_pretrained`. Arguments for files, such as `cache_dir`,
            also apply to the image processor.
        pad: None or "canonical": see `detr.hf.image_pipelines.ImagePipeline`.
        batch_size: images per forward pass.
        orientation: "apply" or "ignore" the EXIF orientation of images: see `detr.hf.image_pipelines.ImagePipeline`.
        options: default values for the options of a call, such as `threshold`: see `ObjectDetectionPipeline` and
            `ImageSegmentationPipeline`.

    Returns:
        `ObjectDetectionPipeline` or `ImageSegmentationPipeline`; call it with an image or a list of images.

    Raises:
        FileNotFoundError: the folder, file or model does not exist.
        RuntimeError: this machine has no such device.
        TypeError: an option or an argument in `model_kwargs` is unknown.
        ValueError: the task is unknown, the model has no masks for segmentation, or arguments contradict each other.
    """
    if task is not None and task not in _PIPELINES:
        raise ValueError(f"task is {task!r}: expected one of {tuple(_PIPELINES)}")
    if model is None:
        raise ValueError(
            "no model given: pass a model folder, a hub id such as 'facebook/detr-resnet-50' or a model"
        )
    if device is not None and device_map is not None:
        raise ValueError(f"give either device={device!r} or device_map={device_map!r}, not both")
    target_device = device_map if device is None else "cpu" if device == -1 else device
    file_arguments = {"revision": revision, "token": token, "local_files_only": local_files_only or None}
    file_arguments = {name: value for name, value in file_arguments.items() if value is not None}
    arguments = _merge(
        dict(model_kwargs or {}), {**file_arguments, "dtype": dtype, "torch_dtype": torch_dtype}
    )
    file_arguments = {name: arguments.pop(name) for name in FILE_ARGUMENTS & arguments.keys()}
    loaded: DetrPreTrainedModel
    if isinstance(model, str | Path):
        source = model
        model_task = _task_of(AutoConfig.from_pretrained(source, **file_arguments).architectures)
        task = task or model_task or "object-detection"
        _check_masks(task, model_task != "object-detection", source)
        auto = AutoModelForImageSegmentation if task == "image-segmentation" else AutoModelForObjectDetection
        arguments = _merge(arguments, {"device_map": target_device})
        loaded = auto.from_pretrained(source, **{"device_map": "auto"} | arguments | file_arguments)
    else:
        if model_kwargs:
            raise ValueError(
                f"model_kwargs {sorted(model_kwargs)} apply only to a model that is loaded from a folder or hub id"
            )
        model_task = _task_of([type(model).__name__])
        task = task or model_task or "object-detection"
        _check_masks(task, model_task == "image-segmentation", type(model).__name__)
        loaded = _convert(model, target_device, dtype, torch_dtype)
    if image_processor is None:
        if not isinstance(model, str | Path):
            raise ValueError(
                "no image processor given: pass image_processor=... together with a model object"
            )
        image_processor = model
    if isinstance(image_processor, str | Path):
        image_processor = AutoImageProcessor.from_pretrained(
            image_processor, backend=backend, use_fast=use_fast, **file_arguments
        )
    else:
        unused = {"backend": backend, "use_fast": use_fast} | (
            {} if isinstance(model, str | Path) else file_arguments
        )
        for name, value in unused.items():
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} applies only to an image processor that is loaded from a folder or hub id"
                )
    return _PIPELINES[task](
        loaded, image_processor, pad=pad, batch_size=batch_size, orientation=orientation, **options
    )


def _merge(model_kwargs: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the arguments of the pipeline into `model_kwargs`; raise an error if they contradict each other."""
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


def _convert(
    model: DetrPreTrainedModel,
    target_device: torch.device | str | int | None,
    dtype: torch.dtype | str | None,
    torch_dtype: torch.dtype | str | None,
) -> DetrPreTrainedModel:
    """Move a model object to the requested device and dtype."""
    from detr.checkpoint.load_save import resolve_device, resolve_dtype

    if target_device is not None:
        model = model.to(resolve_device(target_device))
    chosen = resolve_dtype(dtype, torch_dtype)
    return model if chosen is None else model.to(chosen)
