"""AdamW with a separate backbone learning rate, learning-rate schedules, and a moving average of the weights."""

import math
from typing import assert_never

import torch
from torch import Tensor, nn

from raydetr.training.config import OptimizerConfig


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters, in two groups: all but the backbone, and the backbone (DETR, A.4)."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    rest = [parameter for name, parameter in named if "backbone" not in name]
    backbone = [parameter for name, parameter in named if "backbone" in name]
    groups = [{"params": rest, "peak": config.learning_rate}]
    if backbone:
        groups.append({"params": backbone, "peak": config.backbone_learning_rate})
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def schedule(step: int, config: OptimizerConfig) -> float:
    """Return the learning rate at a step as a fraction of its peak.

    A pure function of the step, so a resumed run needs no scheduler state.
    """
    # Rises in steps of 1 / (warmup_steps + 1), so that step 0 already trains.
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    done = step / config.steps
    if config.schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "constant":
        return warmup
    if config.schedule == "step":
        return warmup * (1.0 if done < config.lr_drop_at else 0.1)
    assert_never(config.schedule)


def set_learning_rates(
    optimizer: torch.optim.Optimizer, step: int, config: OptimizerConfig
) -> dict[str, float]:
    """Set the learning rate of every parameter group for a step.

    Returns:
        `learning_rate` of the transformer and, if the backbone is trained, `backbone_learning_rate`.
    """
    fraction = schedule(step, config)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * fraction
    names = ("learning_rate", "backbone_learning_rate")
    return {name: float(group["lr"]) for name, group in zip(names, optimizer.param_groups, strict=False)}


class MovingAverage:
    """Exponential moving average of a model's trainable parameters; frozen parameters do not change."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after a step; early steps use a smaller decay, so that the initial weights fade out."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, list(self.parameters), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Swap the averages with the model's weights; a second call restores them."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            raw = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(raw)

    def state_dict(self) -> list[Tensor]:
        """Return the averages, in the order of the model's trainable parameters."""
        return self.values

    @torch.no_grad()
    def load_state_dict(self, values: list[Tensor]) -> None:
        """Load the averages that `state_dict` returned."""
        for own, value in zip(self.values, values, strict=True):
            own.copy_(value)
