"""The model that a run starts from: new, with or without pretrained backbone weights, or one to fine-tune."""

import importlib.util
from pathlib import Path

import torch

from detr import DetrConfig, DetrForObjectDetection
from detr.backbone import load_pretrained_backbone
from raydetr.config import TrainConfig
from raydetr.data.shards import Manifest
from raydetr.errors import ConfigError
from raydetr.registry import models, tracking


def build_model(config: TrainConfig, manifest: Manifest) -> DetrForObjectDetection:
    """The model before the first step: a function of the configuration and its seed alone.

    Args:
        config: names the architecture, or the model to fine-tune.
        manifest: gives the classes.

    Raises:
        ConfigError: the backbone or its weights cannot be had.
    """
    torch.manual_seed(config.seed)
    if config.model:
        resolved = models.resolve(config.model, tracking.resolve_uri(config.tracking_uri))
        return DetrForObjectDetection.from_pretrained(
            resolved.folder, id2label=manifest.id2label, auxiliary_loss=config.auxiliary_loss
        )
    model = DetrForObjectDetection(
        DetrConfig(
            backbone=config.backbone,
            backbone_kwargs={"out_indices": list(config.backbone_out_indices)},
            trainable_backbone_stages=config.trainable_backbone_stages,
            d_model=config.d_model,
            encoder_layers=config.encoder_layers,
            decoder_layers=config.decoder_layers,
            encoder_attention_heads=config.attention_heads,
            decoder_attention_heads=config.attention_heads,
            encoder_ffn_dim=config.ffn_dim,
            decoder_ffn_dim=config.ffn_dim,
            num_queries=config.num_queries,
            dropout=config.dropout,
            auxiliary_loss=config.auxiliary_loss,
            id2label=manifest.id2label,
        )
    )
    if config.backbone_weights:
        load_pretrained_backbone(model, weights_file(config.backbone_weights))
    return model


def weights_file(source: str) -> str:
    """The file of `--backbone-weights`: a path as it is; for package:NAME the .pth file that the package carries.

    Raises:
        ConfigError: the package is not installed or carries none.
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
            f"{'carries no single .pth file' if package else 'is not installed'}; give a file instead."
        )
    return str(files[0])
