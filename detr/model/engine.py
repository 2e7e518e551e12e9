"""The interface of engines, such as `torch.compile` in training, or OpenVINO and CUDA graphs in inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from detr.config import DetrConfig


class Engine(Protocol):
    """Computes a function of a module in another way than by calling it."""

    def __call__(self, compute: Callable[..., Any], /, *inputs: Any, **options: Any) -> Any:
        """Return the result of ``compute(*inputs, **options)``."""


class WithEngine:
    """Base of the modules that have a function which an engine may compute.

    Attributes:
        engine: computes this function; None calls it.
    """

    engine: Engine | None = None

    def _run(self, compute: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        if self.engine is None:
            return compute(*inputs, **options)
        return self.engine(compute, *inputs, **options)


class OptimizableModel(nn.Module):
    """Base of the models that `detr.inference.optimize` copies and optimizes.

    Attributes:
        config: the configuration that the model was built from.
        is_optimized: whether the model was returned by `optimize`; it can then be neither trained nor saved.
        predicts_masks: whether the model has a mask head.
    """

    config: DetrConfig
    is_optimized = False
    predicts_masks = False
