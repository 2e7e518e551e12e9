"""The `Auto` classes of the DETR page: they look into a model folder and pick the class.

There is one architecture here, so the choice is small: which of the two image processors, and whether the folder is
a DETR at all.
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
    """Reads the configuration of a model folder or of a model on the hub."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        **kwargs: Any,
    ) -> DetrConfig:
        """The `DetrConfig` of a model; see `DetrConfig.from_pretrained`."""
        from detr.config import DetrConfig

        return DetrConfig.from_pretrained(source, **kwargs)


class AutoImageProcessor:
    """Reads the image processor of a model folder or of a model on the hub."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        backend: str | None = None,
        use_fast: bool | None = None,
        **kwargs: Any,
    ) -> DetrImageProcessor:
        """The image processor of a model.

        Args:
            source: a folder with `preprocessor_config.json` (or `processor_config.json`), that file itself, or a
                hub id `ORG/NAME`, which asks for the network.
            backend: whose numbers the resize gives: "torchvision" (`DetrImageProcessor`, the default whatever the
                file names, as in transformers) or "pil" (`DetrImageProcessorPil`).
            use_fast: old name: True is "torchvision", False is "pil".
            kwargs: see `DetrImageProcessor.from_pretrained`.

        Raises:
            FileNotFoundError: there is no such folder, file or model.
            ValueError: another backend, one that contradicts `use_fast`, the processor of another architecture, or a
                value that cannot be used.
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
        found = settings.get("image_processor_type") or settings.get("feature_extractor_type")
        if found is not None and found not in _PROCESSOR_TYPES:
            raise ValueError(f"{file} has the image processor {found!r}, which is not one of DETR's")
        return processors[backend].from_settings(settings, file, **overrides)


class AutoModelForObjectDetection:
    """Loads a model folder, or a model of the hub, as `DetrForObjectDetection`."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs: Any) -> DetrForObjectDetection:
        """The model, in evaluation mode; a segmentation model gives its detector.

        Args:
            source: a folder, or a hub id `ORG/NAME`, which asks for the network.
            kwargs: see `detr.checkpoint.load_save.load_model`.

        Raises:
            FileNotFoundError: there is no such folder, file or model.
            ValueError: it is another architecture, or the weights do not fit the configuration.
        """
        from detr.model.detection import DetrForObjectDetection

        return DetrForObjectDetection.from_pretrained(source, **kwargs)


class AutoModelForImageSegmentation:
    """Loads a model folder, or a model of the hub, as `DetrForSegmentation`."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs: Any) -> DetrForSegmentation:
        """The model, in evaluation mode; a detection model gives a detector with a mask head yet to be trained.

        Args:
            source: a folder, or a hub id `ORG/NAME`, which asks for the network.
            kwargs: see `detr.checkpoint.load_save.load_model`.

        Raises:
            FileNotFoundError: there is no such folder, file or model.
            ValueError: it is another architecture, or the weights do not fit the configuration.
        """
        from detr.model.segmentation import DetrForSegmentation

        return DetrForSegmentation.from_pretrained(source, **kwargs)
