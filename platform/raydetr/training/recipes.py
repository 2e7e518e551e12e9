"""Presets of `--recipe`: a `TrainConfig` for each purpose. Flags override single fields.

The settings of detr-r50 are the paper's (Carion et al. 2020, section 4 and appendix A.4) and the original code's:
AdamW at 1e-4, the backbone at 1e-5, weight decay 1e-4, gradient clipping at 0.1, dropout 0.1, and a learning rate that
drops to a tenth after two thirds of the steps.
"""

from dataclasses import replace

from raydetr.errors import ConfigError
from raydetr.training.config import ARCHITECTURE, TrainConfig

_MULTI_SCALE = TrainConfig(
    multi_scale=True,
    encoder_layers=1,
    decoder_layers=1,
    num_queries=100,
    class_cost=2.0,
    learning_rate=1.5e-3,
    backbone_learning_rate=4e-4,
    max_grad_norm=5.0,
    steps=600,
    warmup_steps=20,
    checkpoint_every=200,
    shortest_edges=(160, 176, 192),
    longest_edge=256,
    test_edge=192,
    crop=True,
    crop_shortest_edges=(192, 224, 256),
    crop_sizes=(144, 240),
)

# The demo scenes have at most 4 objects, each 15 to 50 % of the image in size, so stride 4 adds nothing to stride 8.
_SCENES = replace(
    _MULTI_SCALE,
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

_DETR_SMALL = TrainConfig(
    query_groups=4,
    dense_loss_weight=1.0,
    locality_init=True,
    eos_coefficient=0.3,
    max_grad_norm=1.0,
    steps=1400,
    checkpoint_every=200,
)

_DETR_R50 = TrainConfig(
    backbone="resnet50",
    backbone_out_indices=(1, 2, 3, 4),
    backbone_weights="timm",
    d_model=256,
    encoder_layers=6,
    decoder_layers=6,
    ffn_dim=2048,
    num_queries=100,
    dropout=0.1,
    micro_batch_size=2,
    micro_batches=8,
    learning_rate=1e-4,
    backbone_learning_rate=1e-5,
    max_grad_norm=0.1,
    warmup_steps=0,
    schedule="step",
    lr_drop_at=2 / 3,
    steps=300_000,
    ema_decay=0.0,
    shortest_edges=(480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
    longest_edge=1333,
    test_edge=800,
    crop=True,
    crop_shortest_edges=(400, 500, 600),
    crop_sizes=(384, 600),
    checkpoint_every=1000,
)

RECIPES = {
    "multi-scale": _MULTI_SCALE,
    "scenes": _SCENES,
    "detr-small": _DETR_SMALL,
    "detr-r50": _DETR_R50,
    "fine-tune": replace(
        _DETR_R50,
        steps=6000,
        warmup_steps=200,
        schedule="cosine",
        ema_decay=0.9997,
        checkpoint_every=500,
    ),
    "panoptic": replace(_DETR_R50, task="panoptic", num_queries=100),
    "panoptic-boxes": replace(_DETR_R50, task="panoptic-boxes"),
    "masks": replace(
        _DETR_R50,
        task="panoptic",
        freeze_detector=True,
        model="models:/raydetr@challenger",
        steps=185_000,
        lr_drop_at=0.6,
    ),
}
"""Presets by name.

    multi-scale     the default: the multi-scale architecture on your own images; learns from an ImageNet backbone
                    within minutes on two cores
    scenes          the same on the demo scenes
    detr-small      a small DETR on two cores, for models that transformers can load
    detr-r50        the paper's detector from an ImageNet backbone; 40 epochs of COCO by default (the paper's 500 epochs
                    are 3.7 million steps of 16 images)
    fine-tune       fine-tune a detector (--model) on your own classes
    panoptic        boxes and masks of things and stuff, trained jointly
    panoptic-boxes  the first of two stages: boxes of things and stuff
    masks           the second stage: the mask head alone, 25 epochs of COCO (--task instance for instance masks)
"""

DEFAULT = "multi-scale"


def require_model_flags(config: TrainConfig, recipe: str) -> None:
    """Check that the flags fit the recipe and the model.

    Raises:
        ConfigError: fine-tune without a model, or architecture flags together with a model, which has its own.
    """
    if recipe == "fine-tune" and not config.model:
        raise ConfigError("--recipe fine-tune starts from an existing model: give it as --model.")
    given = [name for name in ARCHITECTURE if getattr(config, name) != getattr(RECIPES[recipe], name)]
    if config.model and given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(
            f"{flags}: the architecture is that of --model {config.model}; remove {'it' if len(given) == 1 else 'them'}, "
            "or train a new model without --model."
        )
