"""Build the model that a run starts from: a new one, with or without backbone weights, or one to fine-tune."""

import importlib.util
from pathlib import Path

import torch

from detr import DetrConfig, DetrForObjectDetection, DetrForSegmentation
from detr.image_processing.processor import DetrImageProcessor
from detr.model.backbone import load_pretrained_backbone
from detr.multiscale_config import MultiScaleConfig
from raydetr.data.shards import Manifest
from raydetr.errors import ConfigError
from raydetr.flat_keys import flatten
from raydetr.registry import models, tracking
from raydetr.training.config import TrainConfig


def build_model(config: TrainConfig, manifest: Manifest) -> DetrForObjectDetection | DetrForSegmentation:
    """Build the model before the first step, as a function of the configuration and its seed alone.

    Args:
        config: the architecture, or the model to fine-tune.
        manifest: the classes.

    Raises:
        ConfigError: the backbone or its weights are not available, or a detector to freeze has other classes.
    """
    torch.manual_seed(config.run.seed)
    kind = DetrForSegmentation if config.run.segments else DetrForObjectDetection
    chosen = {
        name: value for name, value in flatten(config.loss).items() if name in DetrConfig.__annotations__
    }
    chosen["trainable_backbone_stages"] = config.model.trainable_backbone_stages
    if config.model.model:
        resolved = models.resolve(config.model.model, tracking.resolve_uri(config.tracking.tracking_uri))
        model = kind.from_pretrained(
            resolved.folder, id2label=manifest.id2label, dropout=config.model.dropout, **chosen
        )
        _match_class_head(model, config, DetrConfig.from_pretrained(resolved.folder).id2label)
    else:
        model = _new_model(kind, config, manifest, chosen)
    if config.model.freeze_detector and isinstance(model, DetrForSegmentation):
        model.freeze_detector()
    # Stored in config.json: panoptic post-processing merges all segments of a stuff class into one.
    things = {category["id"]: category.get("isthing", 1) for category in manifest.categories}
    stuff = [label for label, category in enumerate(manifest.category_ids) if not things[category]]
    if stuff or hasattr(model.config, "stuff_label_ids"):
        model.config.stuff_label_ids = stuff
    return model


def _match_class_head(
    model: DetrForObjectDetection | DetrForSegmentation, config: TrainConfig, previous: dict[int, str]
) -> None:
    """Reinitialize the class head if it was trained for other classes, or for the same ones in another order."""
    classes = model.config.id2label
    if previous == classes:
        return
    if config.model.freeze_detector:
        raise ConfigError(
            f"--freeze-detector: {config.model.model} detects {_join(previous)}, but the data have {_join(classes)}: train a "
            "detector on these data first (--recipe panoptic-boxes), or remove --freeze-detector."
        )
    # With another number of classes, `from_pretrained` has already created a new head.
    detector = model.detr if isinstance(model, DetrForSegmentation) else model
    if len(previous) == len(classes):
        detector.reset_class_head()


def _join(names: dict[int, str]) -> str:
    listed = ", ".join(names[label] for label in sorted(names)[:5])
    return f"{len(names)} classes ({listed}{', …' if len(names) > 5 else ''})"


def _new_model(
    kind: type[DetrForObjectDetection] | type[DetrForSegmentation],
    config: TrainConfig,
    manifest: Manifest,
    chosen: dict[str, float | bool],
) -> DetrForObjectDetection | DetrForSegmentation:
    model = kind(
        DetrConfig(
            backbone=config.model.architecture.backbone,
            backbone_kwargs={"out_indices": list(config.model.architecture.backbone_out_indices)},
            use_pretrained_backbone=config.model.architecture.backbone_weights == "timm",
            d_model=config.model.architecture.d_model,
            encoder_layers=config.model.architecture.encoder_layers,
            decoder_layers=config.model.architecture.decoder_layers,
            encoder_attention_heads=config.model.architecture.attention_heads,
            decoder_attention_heads=config.model.architecture.attention_heads,
            encoder_ffn_dim=config.model.architecture.ffn_dim,
            decoder_ffn_dim=config.model.architecture.ffn_dim,
            num_queries=config.model.architecture.num_queries,
            dropout=config.model.dropout,
            compat=config.model.architecture.compat,
            multi_scale=MultiScaleConfig(nms_threshold=config.model.architecture.nms_threshold)
            if config.model.architecture.multi_scale
            else None,
            id2label=manifest.id2label,
            **chosen,
        )
    )
    if config.model.architecture.backbone_weights not in ("", "timm"):
        load_pretrained_backbone(model, weights_file(config.model.architecture.backbone_weights))
    return model


def image_processor(config: TrainConfig) -> DetrImageProcessor:
    """Return the image processor of the model, which resizes images for evaluation and serving."""
    return DetrImageProcessor(
        size={"shortest_edge": config.data.test_edge, "longest_edge": config.data.augmentation.longest_edge}
    )


def weights_file(source: str) -> str:
    """Return the file of `--backbone-weights`: a path unchanged, or for package:NAME the .pth file in that package.

    Raises:
        ConfigError: the package is not installed, or does not contain exactly one .pth file.
    """
    if not source.startswith("package:"):
        return source
    name = source.removeprefix("package:")
    package = importlib.util.find_spec(name)
    files = (
        [
            file
            for folder in (package.submodule_search_locations or [])
            for file in Path(folder).rglob("*.pth")
        ]
        if package
        else []
    )
    if len(files) != 1:
        raise ConfigError(
            f"--backbone-weights {source}: Python package {name} "
            f"{'does not contain exactly one .pth file' if package else 'is not installed'}; give a file instead."
        )
    return str(files[0])
