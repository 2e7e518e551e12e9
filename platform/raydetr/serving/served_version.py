"""The model version that answers requests, as the HTTP side knows it."""

from dataclasses import dataclass
from typing import Self

from detr.config import DetrConfig
from detr.image_processing.processor import DetrImageProcessor
from raydetr.registry.models import ResolvedModel, local_folder
from raydetr.serving.loaded import has_masks
from raydetr.serving.schemas import ModelInfo


@dataclass(frozen=True)
class ServedVersion:
    """A model version as the HTTP side knows it; a request uses the same one from start to finish."""

    model: ResolvedModel
    info: ModelInfo
    image_processor: DetrImageProcessor
    id2label: dict[int, str]
    tasks: tuple[str, ...]

    def prepares_otherwise_than(self, other: "ServedVersion") -> bool:
        """Whether an image prepared for one version is none for the other."""
        return self.image_processor.to_dict() != other.image_processor.to_dict()

    @classmethod
    def of(cls, model: ResolvedModel) -> Self:
        """Read it from the version's files."""
        folder = local_folder(model)
        config = DetrConfig.from_pretrained(folder)
        return cls(
            model,
            ModelInfo(name=model.name or model.label, version=model.version),
            DetrImageProcessor.from_pretrained(folder),
            config.id2label,
            ("detect", "segment") if has_masks(config) else ("detect",),
        )
