"""What `learning.py` compares, and on what: recipes, data sets and the sizes of images and networks."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from detr.augment import AugmentSpec


@dataclass(frozen=True)
class Recipe:
    """What may differ between the runs: training, and for "multi-scale" the network.

    library: detr, transformers, or "transformers repaired": see `_of_transformers`.
    network: fields of `DetrConfig` in which the network differs from that of the task.
    warmup: share of the time in which the learning rate rises.
    """

    library: str = "detr"
    network: Mapping[str, Any] = field(default_factory=dict)
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
            "num_queries": 100,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "class_cost": 2.0,
        },
        learning_rate=6e-4,
        backbone_learning_rate=1.5e-4,
        clip_norm=5.0,
        warmup=0.02,
        schedule="cosine",
        dropout=0.0,
        ema_decay=0.998,
    ),
}


@dataclass(frozen=True)
class Task:
    """A data set and the network and image sizes for it."""

    masks: bool
    out_indices: tuple[int, ...]
    num_queries: int
    test_edge: int
    augmentation: AugmentSpec
    train: tuple[str, str] = ("train.json", "images")
    val: tuple[str, str] = ("val.json", "images")


SMALL = {
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
}
"""The transformer that a CPU can train; on a GPU it is that of DETR."""

SMALL_IMAGES = AugmentSpec(
    shortest_edges=(160, 176, 192),
    longest_edge=256,
    crop_shortest_edges=(192, 224, 256),
    crop_sizes=(144, 240),
)

TASKS = {
    "bccd": Task(
        masks=False,
        out_indices=(1, 2, 3),
        num_queries=40,
        test_edge=192,
        augmentation=SMALL_IMAGES,
    ),
    "balloon": Task(
        masks=True,
        out_indices=(0, 1, 2, 3),
        num_queries=20,
        test_edge=192,
        augmentation=SMALL_IMAGES,
    ),
}

_ON_GPU = Task(
    masks=False, out_indices=(1, 2, 3, 4), num_queries=100, test_edge=800, augmentation=AugmentSpec()
)
_COCO128 = ("annotations/instances_train2017.json", "train2017")
ON_GPU = {"bccd": _ON_GPU, "coco128": replace(_ON_GPU, train=_COCO128, val=_COCO128)}
"""Of coco128 the images that are trained on are scored: there are too few to learn what else is in COCO."""
