"""The configuration of a checkpoint of facebookresearch/detr, whose files hold tensors and no configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detr.checkpoint.key_maps import BACKBONE_PREFIX, from_original, is_original
from detr.config import default_labels

# Blocks of each stage and whether they are bottlenecks, to timm's name.
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
    """The fields of a `DetrConfig` that the shapes of the tensors tell.

    They do not tell dilation (DC5), names of classes, the number of heads of a detector (8 is taken, as in all
    published files) or anything about training: give these as overrides.

    Args:
        tensors: the file's content, in the original's layout.
        source: the file's name, for messages.
        classes_given: overrides say what the classes are, so the file may be without a class head, as those are
            that were made for fine-tuning.

    Raises:
        ValueError: this is no file of the original, its backbone is none of the ResNets, a tensor is missing, or
            nothing tells the number of classes.
    """
    if not is_original(tensors):
        raise ValueError(
            f"{source} is not a checkpoint of facebookresearch/detr; weights in other layouts are loaded from a folder "
            "that also holds config.json"
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
            f"{source} has no class head (class_embed), so nothing tells its classes; give num_labels=... or "
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
            f"{source}: a ResNet of {blocks} {kind} blocks is none of {sorted(_RESNETS.values())}"
        )
    return _RESNETS[blocks, bottleneck]


def _count(names: Mapping[str, Any], pattern: str) -> int:
    """One more than the largest number that the pattern finds."""
    return max((int(m[1]) for name in names if (m := re.match(pattern, name))), default=-1) + 1
