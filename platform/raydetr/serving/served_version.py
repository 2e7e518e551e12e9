"""A served model version as the HTTP ingress needs it."""

from dataclasses import dataclass
from typing import Self

from detr.config import DetrConfig
from detr.image_processing.processor import DetrImageProcessor
from raydetr.registry.models import ResolvedModel, local_folder
from raydetr.responses import ModelInfo
from raydetr.serving.loaded import has_masks


@dataclass(frozen=True)
class ServedVersion:
    """A served model version. A request uses the same one from start to finish."""

    model: ResolvedModel
    info: ModelInfo
    image_processor: DetrImageProcessor
    id2label: dict[int, str]
    tasks: tuple[str, ...]

    def prepares_differently_from(self, other: "ServedVersion") -> bool:
        """Check whether images prepared for one version cannot be used by the other."""
        return self.image_processor.to_dict() != other.image_processor.to_dict()

    @classmethod
    def of(cls, model: ResolvedModel) -> Self:
        """Read a version from its files."""
        folder = local_folder(model)
        config = DetrConfig.from_pretrained(folder)
        return cls(
            model,
            ModelInfo(name=model.name or model.label, version=model.version),
            DetrImageProcessor.from_pretrained(folder),
            config.id2label,
            ("detect", "segment") if has_masks(config) else ("detect",),
        )
