"""Recipes, data sets, and image and network sizes that `learning.py` compares."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from detr import DetrConfig
from detr.image_processing.augment_spec import AugmentSpec
from detr.multiscale_config import MultiScaleConfig


@dataclass(frozen=True)
class Recipe:
    """Settings in which runs differ: training, and for some the network.

    library: detr, torchvision, transformers, or "transformers repaired": see `learning_networks`.
    network: fields of `DetrConfig` in which the network differs from that of the task; for torchvision, arguments of
        `TorchvisionDetector`.
    out_indices: maps of the backbone; None: those of the task. Map i has stride 2 ** (i + 1).
    warmup: fraction of the time in which the learning rate rises.
    """

    library: str = "detr"
    network: Mapping[str, Any] = field(default_factory=dict)
    out_indices: tuple[int, ...] | None = None
    query_groups: int = 1
    cell_loss: float = 0.0
    local_attention: bool = False
    auxiliary_loss: bool = True
    mask_weight: float = 1.0
    learning_rate: float = 1e-4
    backbone_learning_rate: float = 1e-5
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    warmup: float = 0.0
    schedule: str = "step"
    dropout: float = 0.1
    eos_coefficient: float = 0.1
    ema_decay: float = 0.0
    batch_size: int = 4


_TORCHVISION = Recipe(
    library="torchvision",
    out_indices=(1, 2, 3, 4),
    learning_rate=4e-4,
    backbone_learning_rate=1e-4,
    clip_norm=5.0,
    warmup=0.02,
    schedule="cosine",
    ema_decay=0.998,
)

RECIPES = {
    "reference": Recipe(library="transformers", auxiliary_loss=False),
    "repaired": Recipe(library="transformers repaired", auxiliary_loss=False),
    "plain": Recipe(),
    "better": Recipe(
        query_groups=4,
        cell_loss=1.0,
        local_attention=True,
        mask_weight=3.0,
        learning_rate=6e-4,
        backbone_learning_rate=1e-4,
        clip_norm=1.0,
        warmup=0.02,
        schedule="cosine",
        dropout=0.0,
        eos_coefficient=0.3,
        ema_decay=0.998,
    ),
    "multi-scale": Recipe(
        network={
            "multi_scale": {},
            "encoder_layers": 1,
            "decoder_layers": 1,
            "class_cost": 2.0,
        },
        out_indices=(1, 2, 3),
        learning_rate=1.5e-3,
        backbone_learning_rate=4e-4,
        clip_norm=5.0,
        warmup=0.02,
        schedule="cosine",
        dropout=0.0,
        ema_decay=0.998,
    ),
    "faster-rcnn": replace(_TORCHVISION, network={"kind": "faster-rcnn"}),
    # without a map of stride 4, as in torchvision: with one, AP on bccd was 0.33 after 3 minutes
    "fcos": replace(_TORCHVISION, network={"kind": "fcos"}, out_indices=(2, 3, 4)),
}

_FIXED = ("library", "network")


def change(recipe: Recipe, changes: Sequence[str]) -> tuple[Recipe, dict[str, Any]]:
    """Change settings of a recipe, for an ablation.

    Args:
        recipe: the recipe.
        changes: "NAME=VALUE" strings. NAME is a field of `Recipe`, of `MultiScaleConfig` for the multi-scale recipe,
            or of `DetrConfig`; for torchvision's detectors, "width". VALUE is JSON, or a word.

    Returns:
        The changed recipe, and the changed settings by name.

    Raises:
        ValueError: unknown setting, or a value of another type; the message names it.
    """
    recipe_fields = {each.name: each for each in fields(Recipe) if each.name not in _FIXED}
    network_fields: set[str] = {"width"} if recipe.library == "torchvision" else DetrConfig.keywords()
    multi_scale_fields = (
        {each.name for each in fields(MultiScaleConfig)} if "multi_scale" in recipe.network else set()
    )
    settings = dict(_parse(each) for each in changes)
    for name, value in settings.items():
        if name in recipe_fields:
            recipe = replace(recipe, **{name: _check_type(name, value, recipe_fields[name].default)})
        elif name in multi_scale_fields:
            multi_scale = {**recipe.network["multi_scale"], name: value}
            recipe = replace(recipe, network={**recipe.network, "multi_scale": multi_scale})
        elif name in network_fields:
            recipe = replace(recipe, network={**recipe.network, name: value})
        else:
            known = sorted({*recipe_fields, *multi_scale_fields, *network_fields})
            similar = ", ".join(difflib.get_close_matches(name, known, n=3)) or ", ".join(known)
            raise ValueError(f"--set {name}: this recipe has no such setting; it has {similar}")
    if recipe.library != "torchvision":
        try:
            DetrConfig(backbone="efficientnet_lite0", **recipe.network)
        except (TypeError, ValueError) as error:
            raise ValueError(f"--set {' '.join(changes)}: {error}") from error
    return recipe, settings


def _parse(change: str) -> tuple[str, Any]:
    name, equals, text = change.partition("=")
    if not name or not equals:
        raise ValueError(f"--set {change}: expected NAME=VALUE")
    try:
        return name, json.loads(text)
    except json.JSONDecodeError:
        return name, text


def _check_type(name: str, value: Any, default: Any) -> Any:
    """Check that a value has the type of the recipe's default; convert a list of indices to a tuple."""
    if name == "out_indices" and isinstance(value, list) and all(type(each) is int for each in value):
        return tuple(value)
    if type(value) is type(default) or (type(value) is int and type(default) is float):
        return value
    kind = "a list of numbers" if name == "out_indices" else type(default).__name__
    raise ValueError(f"--set {name}={value}: expected {kind}")


@dataclass(frozen=True)
class Task:
    """A data set, with the network and image sizes for it.

    folder: folder in `../shared/data`, or "scenes", which are generated.
    out_indices, num_queries: settings of the DETR network.
    max_objects: objects per image; the multi-scale network has at least 100 queries, or this number if it is larger.
    train, val: annotation file and folder of images.
    """

    folder: str
    masks: bool
    out_indices: tuple[int, ...]
    num_queries: int
    test_edge: int
    augmentation: AugmentSpec
    max_objects: int = 100
    train: tuple[str, str] = ("train.json", "images")
    val: tuple[str, str] = ("val.json", "images")

    def at_edge(self, edge: int) -> "Task":
        """Scale all lengths in proportion to another test edge, rounded to multiples of 16 pixels."""
        spec = self.augmentation

        def scaled(lengths: Sequence[int]) -> tuple[int, ...]:
            return tuple(max(round(each * edge / self.test_edge / 16), 1) * 16 for each in lengths)

        minimum, maximum = scaled(spec.crop_sizes)
        return replace(
            self,
            test_edge=edge,
            augmentation=replace(
                spec,
                shortest_edges=scaled(spec.shortest_edges),
                longest_edge=scaled([spec.longest_edge])[0],
                crop_shortest_edges=scaled(spec.crop_shortest_edges),
                crop_sizes=(minimum, maximum),
            ),
        )


SMALL = {
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
}
"""Transformer size for training on a CPU; on a GPU, that of DETR is used."""

_ON_CPU = Task(
    folder="bccd",
    masks=False,
    out_indices=(1, 2, 3),
    num_queries=40,
    test_edge=192,
    augmentation=AugmentSpec(
        shortest_edges=(160, 176, 192),
        longest_edge=256,
        crop_shortest_edges=(192, 224, 256),
        crop_sizes=(144, 240),
    ),
)
_COCO128 = ("annotations/instances_train2017.json", "train2017")
_SCENES = AugmentSpec(shortest_edges=(112, 128, 144), longest_edge=213, crop=False)
"""The augmentation of the recipe `scenes`."""

TASKS = {
    "bccd": _ON_CPU,
    "balloon": replace(_ON_CPU, folder="balloon", masks=True, out_indices=(0, 1, 2, 3), num_queries=20),
    "balloon-boxes": replace(_ON_CPU, folder="balloon", num_queries=30),
    "nuclei": replace(_ON_CPU, folder="nuclei", num_queries=150, max_objects=150),
    "nuts": replace(_ON_CPU, folder="nuts", num_queries=20),
    "coco128": replace(_ON_CPU, folder="coco128", num_queries=100, train=_COCO128, val=_COCO128),
    "scenes": replace(
        _ON_CPU,
        folder="scenes",
        num_queries=20,
        test_edge=128,
        augmentation=_SCENES,
        train=("train/annotations/instances.json", "train/images"),
        val=("val/annotations/instances.json", "val/images"),
    ),
}

_ON_GPU = replace(
    _ON_CPU, out_indices=(1, 2, 3, 4), num_queries=100, test_edge=800, augmentation=AugmentSpec()
)
ON_GPU = {
    "bccd": _ON_GPU,
    "coco128": replace(_ON_GPU, folder="coco128", train=_COCO128, val=_COCO128),
}
"""coco128 is scored on its training images: it is too small to generalize to other images of COCO."""
