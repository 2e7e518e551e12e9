"""AdamW with a learning rate of its own for the backbone, the schedule, and the moving average of the weights."""

import math

import torch
from torch import Tensor, nn

from raydetr.training.config import TrainConfig


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in two groups: the rest and the backbone (DETR, section A.4)."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    rest = [parameter for name, parameter in named if "backbone" not in name]
    backbone = [parameter for name, parameter in named if "backbone" in name]
    groups = [{"params": rest, "peak": config.learning_rate}]
    if backbone:
        groups.append({"params": backbone, "peak": config.backbone_learning_rate})
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def schedule(step: int, config: TrainConfig) -> float:
    """The share of the peak learning rate at a step: a pure function, so that a resumed run needs no state."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    done = step / config.steps
    if config.schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "constant":
        return warmup
    return warmup * (1.0 if done < config.lr_drop_at else 0.1)


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> dict[str, float]:
    """Set every group's learning rate for a step.

    Returns:
        `learning_rate` of the transformer and, where it is trained, `backbone_learning_rate`.
    """
    share = schedule(step, config)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    names = ("learning_rate", "backbone_learning_rate")
    return {name: float(group["lr"]) for name, group in zip(names, optimizer.param_groups, strict=False)}


class MovingAverage:
    """Exponential moving average of a model's trainable parameters (the others do not move)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step; early on the decay is smaller, so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, list(self.parameters), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages with the model's weights; a second call undoes it."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(held)

    def state_dict(self) -> list[Tensor]:
        """The averages, in the order of the model's trainable parameters."""
        return self.values

    @torch.no_grad()
    def load_state_dict(self, values: list[Tensor]) -> None:
        """Restore what `state_dict` returned."""
        for own, value in zip(self.values, values, strict=True):
            own.copy_(value)
