"""Infer the configuration of a checkpoint of facebookresearch/detr, which contains only tensors, from their shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detr.checkpoint.key_maps import BACKBONE_PREFIX, from_original, is_original
from detr.config import default_labels

# timm's name by the number of blocks of each stage and whether they are bottlenecks.
_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((2, 2, 2, 2), True): "resnet26",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
_HEADS = 8


def original_config(
    tensors: Mapping[str, Tensor], source: str, *, classes_given: bool = False
) -> dict[str, Any]:
    """Infer the fields of a `DetrConfig` from the shapes of the tensors.

    Shapes do not determine dilation (DC5), class names, settings of training, and the number of attention heads of a
    detector (assumed to be 8, as in all published files). Pass these as overrides.

    Args:
        tensors: the content of the file, in the layout of the original.
        source: name of the file, for messages.
        classes_given: whether overrides define the classes. The file may then lack a class head, like published files
            for fine-tuning.

    Raises:
        ValueError: this is not a checkpoint of facebookresearch/detr, its backbone is not a known ResNet, a tensor is
            missing, or the number of classes is unknown.
    """
    if not is_original(tensors):
        raise ValueError(
            f"{source} is not a checkpoint of facebookresearch/detr; to load weights in another layout, give a folder "
            "that also contains config.json"
        )
    shapes = {name.removeprefix("detr."): tuple(t.shape) for name, t in from_original(tensors).items()}

    def size_of(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise ValueError(
                f"{source} is an incomplete checkpoint of facebookresearch/detr: it has no {name}"
            )
        return shapes[name]

    queries, dim = size_of("model.query_position_embeddings.weight")
    head = shapes.get("mask_head.lay1.weight")
    heads = _HEADS if head is None else head[0] - dim
    learned = "model.position_embedding.row_embeddings.weight" in shapes
    config: dict[str, Any] = {
        "backbone": _backbone(shapes, source),
        "num_channels": size_of(f"model.{BACKBONE_PREFIX}conv1.weight")[1],
        "num_queries": queries,
        "d_model": dim,
        "encoder_layers": _count(shapes, r"model\.encoder\.layers\.(\d+)\."),
        "decoder_layers": _count(shapes, r"model\.decoder\.layers\.(\d+)\."),
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "position_embedding_type": "learned" if learned else "sine",
        "compat": "original",
    }
    for stack in ("encoder", "decoder"):
        if config[f"{stack}_layers"]:
            config[f"{stack}_ffn_dim"] = size_of(f"model.{stack}.layers.0.fc1.weight")[0]
    classes = shapes.get("class_labels_classifier.weight")
    if classes is not None:
        config["id2label"] = default_labels(classes[0] - 1)
    elif not classes_given:
        raise ValueError(
            f"{source} has no class head (class_embed), so the number of classes is unknown; give num_labels=... or "
            "id2label={...} for a new class head"
        )
    return config


def _backbone(shapes: Mapping[str, tuple[int, ...]], source: str) -> str:
    prefix = re.escape(f"model.{BACKBONE_PREFIX}")
    blocks = tuple(_count(shapes, rf"{prefix}layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    bottleneck = f"model.{BACKBONE_PREFIX}layer1.0.conv3.weight" in shapes
    if (blocks, bottleneck) not in _RESNETS:
        kind = "bottleneck" if bottleneck else "basic"
        raise ValueError(
            f"{source}: a ResNet of {blocks} {kind} blocks is not supported, only {sorted(_RESNETS.values())}"
        )
    return _RESNETS[blocks, bottleneck]


def _count(names: Mapping[str, Any], pattern: str) -> int:
    """Return one more than the largest number that the pattern matches; 0 if it matches no name."""
    return max((int(m[1]) for name in names if (m := re.match(pattern, name))), default=-1) + 1
