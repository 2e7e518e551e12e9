"""The `Auto` classes of the DETR page, which select the class for a model folder.

There is only one architecture. So they select one of the two image processors, and reject folders that are not DETR.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detr.config import DetrConfig
    from detr.image_processing.processor import DetrImageProcessor
    from detr.model.detection import DetrForObjectDetection
    from detr.model.segmentation import DetrForSegmentation

_PROCESSOR_TYPES = (
    "DetrImageProcessor",
    "DetrImageProcessorFast",
    "DetrImageProcessorPil",
    "DetrFeatureExtractor",
)


class AutoConfig:
    """Load the configuration of a model folder or of a model on the hub."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        **kwargs: Any,
    ) -> DetrConfig:
        """Load the `DetrConfig` of a model; see `DetrConfig.from_pretrained`."""
        from detr.config import DetrConfig

        return DetrConfig.from_pretrained(source, **kwargs)


class AutoImageProcessor:
    """Load the image processor of a model folder or of a model on the hub."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        backend: str | None = None,
        use_fast: bool | None = None,
        **kwargs: Any,
    ) -> DetrImageProcessor:
        """Load the image processor of a model.

        Args:
            source: a folder with `preprocessor_config.json` (or `processor_config.json`), that file itself, or a
                hub id `ORG/NAME`, which is downloaded.
            backend: library whose resize is reproduced: "torchvision" (`DetrImageProcessor`) or "pil"
                (`DetrImageProcessorPil`). The default is "torchvision", whatever class the file names, as in
                transformers.
            use_fast: old name of `backend`: True is "torchvision", False is "pil".
            kwargs: see `DetrImageProcessor.from_pretrained`.

        Raises:
            FileNotFoundError: the folder, file or model does not exist.
            ValueError: the backend is unknown or contradicts `use_fast`, the processor is that of another architecture,
                or the file has an invalid value.
        """
        from detr.image_processing.pillow_processor import DetrImageProcessorPil
        from detr.image_processing.processor import DetrImageProcessor
        from detr.image_processing.settings import read_settings
        from detr.model_files import ModelFiles

        if use_fast is not None:
            named = "torchvision" if use_fast else "pil"
            if backend not in (None, named):
                raise ValueError(f"use_fast={use_fast} contradicts backend={backend!r}; give one of them")
            backend = named
        backend = backend or "torchvision"
        processors = {"torchvision": DetrImageProcessor, "pil": DetrImageProcessorPil}
        if backend not in processors:
            raise ValueError(f"backend is {backend!r}: expected one of {tuple(processors)}")
        files, overrides = ModelFiles.open(source, **kwargs)
        settings, file = read_settings(files)
        kind = settings.get("image_processor_type") or settings.get("feature_extractor_type")
        if kind is not None and kind not in _PROCESSOR_TYPES:
            raise ValueError(f"{file} has the image processor {kind!r}, which is not one of DETR's")
        return processors[backend].from_settings(settings, file, **overrides)


class AutoModelForObjectDetection:
    """Load a model folder or a model on the hub as `DetrForObjectDetection`."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs: Any) -> DetrForObjectDetection:
        """Load a model in evaluation mode; of a segmentation model only the detector is loaded.

        Args:
            source: a folder, or a hub id `ORG/NAME`, which is downloaded.
            kwargs: see `detr.checkpoint.load_save.load_model`.

        Raises:
            FileNotFoundError: the folder, file or model does not exist.
            ValueError: the model has another architecture, or the weights do not fit the configuration.
        """
        from detr.model.detection import DetrForObjectDetection

        return DetrForObjectDetection.from_pretrained(source, **kwargs)


class AutoModelForImageSegmentation:
    """Load a model folder or a model on the hub as `DetrForSegmentation`."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs: Any) -> DetrForSegmentation:
        """Load a model in evaluation mode; a detection model gets an untrained mask head.

        Args:
            source: a folder, or a hub id `ORG/NAME`, which is downloaded.
            kwargs: see `detr.checkpoint.load_save.load_model`.

        Raises:
            FileNotFoundError: the folder, file or model does not exist.
            ValueError: the model has another architecture, or the weights do not fit the configuration.
        """
        from detr.model.segmentation import DetrForSegmentation

        return DetrForSegmentation.from_pretrained(source, **kwargs)
