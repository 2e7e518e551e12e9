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
    from detr.model import DetrForObjectDetection
    from detr.segmentation import DetrForSegmentation

_PROCESSORS = {"torchvision": "DetrImageProcessor", "pil": "DetrImageProcessorPil"}
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
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> DetrConfig:
        """The `DetrConfig` of a model.

        Args:
            source: a folder with `config.json`, or a hub id `ORG/NAME`, which asks for the network.
            revision: of a hub id.
            local_files_only: of a hub id: use what has been downloaded before.
            overrides: fields of the configuration that replace the file's.

        Raises:
            FileNotFoundError: there is no such folder, file or model.
            ValueError: it is the configuration of another architecture, or holds a value that cannot be used.
        """
        from detr.checkpoint import model_folder
        from detr.config import DetrConfig

        return DetrConfig.from_pretrained(model_folder(source, revision, local_files_only), **overrides)


class AutoImageProcessor:
    """Reads the image processor of a model folder or of a model on the hub."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        backend: str | None = None,
        use_fast: bool | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> DetrImageProcessor:
        """The image processor of a model.

        Args:
            source: a folder with `preprocessor_config.json` (or `processor_config.json`), that file itself, or a
                hub id `ORG/NAME`, which asks for the network.
            backend: whose numbers the resize gives: "torchvision" (`DetrImageProcessor`, the default whatever the
                file names, as in transformers) or "pil" (`DetrImageProcessorPil`).
            use_fast: old name: True is "torchvision", False is "pil"; `backend` wins.
            revision: of a hub id.
            local_files_only: of a hub id: use what has been downloaded before.
            overrides: attributes of the processor that replace those of the file.

        Raises:
            FileNotFoundError: there is no such folder, file or model.
            ValueError: another backend, the processor of another architecture, or a value that cannot be used.
        """
        import detr
        from detr.image_processing.settings import read_settings

        if backend is None:
            backend = "pil" if use_fast is False else "torchvision"
        if backend not in _PROCESSORS:
            raise ValueError(f"backend is {backend!r}: expected one of {tuple(_PROCESSORS)}")
        path = Path(source)
        if not path.exists():
            from detr.checkpoint import model_folder  # imports timm, which data tasks do without

            path = model_folder(source, revision, local_files_only)
        settings = read_settings(path)
        found = settings.get("image_processor_type") or settings.get("feature_extractor_type")
        if found is not None and found not in _PROCESSOR_TYPES:
            raise ValueError(f"{source} has the image processor {found!r}, which is not one of DETR's")
        processor: DetrImageProcessor = getattr(detr, _PROCESSORS[backend]).from_dict(settings, **overrides)
        return processor


class AutoModelForObjectDetection:
    """Loads a model folder, or a model of the hub, as `DetrForObjectDetection`."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs: Any) -> DetrForObjectDetection:
        """The model, in evaluation mode; a segmentation model gives its detector.

        Args:
            source: a folder, or a hub id `ORG/NAME`, which asks for the network.
            kwargs: see `detr.checkpoint.load_model`: `device_map`, `dtype`, `revision`, `local_files_only`,
                `num_labels` and other fields of the configuration.

        Raises:
            FileNotFoundError: there is no such folder, file or model.
            ValueError: it is another architecture, or the weights do not fit the configuration.
        """
        from detr.model import DetrForObjectDetection

        return DetrForObjectDetection.from_pretrained(source, **kwargs)


class AutoModelForImageSegmentation:
    """Loads a model folder, or a model of the hub, as `DetrForSegmentation`."""

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs: Any) -> DetrForSegmentation:
        """The model, in evaluation mode; a detection model gives a detector with a mask head yet to be trained.

        Args:
            source: a folder, or a hub id `ORG/NAME`, which asks for the network.
            kwargs: see `detr.checkpoint.load_model`: `device_map`, `dtype`, `revision`, `local_files_only`,
                `num_labels` and other fields of the configuration.

        Raises:
            FileNotFoundError: there is no such folder, file or model.
            ValueError: it is another architecture, or the weights do not fit the configuration.
        """
        from detr.segmentation import DetrForSegmentation

        return DetrForSegmentation.from_pretrained(source, **kwargs)
