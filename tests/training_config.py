"""A configuration of training for tests: a small new DETR that needs no download."""

from typing import Any

from raydetr.flat_keys import override
from raydetr.training.config import TrainConfig
from raydetr.training.recipes import detr_small


def small_config(**settings: Any) -> TrainConfig:
    """Return a configuration with some settings, by flat name."""
    plain = {"query_groups": 1, "dense_loss_weight": 0.0, "locality_init": False, "eos_coefficient": 0.1}
    lengths = {"steps": 2800, "checkpoint_every": 400, "max_grad_norm": 0.5}
    return override(detr_small(), **(plain | lengths | settings))
