"""What all DETR models can do besides computing: load, save, count, freeze."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from detr.checkpoint import DEFAULT_MAX_SHARD_SIZE, load_model, save_model
from detr.config import DetrConfig
from detr.fast import Engine, optimized
from detr.transformer import Decoder, Encoder


class DetrPreTrainedModel(nn.Module):
    """Base of the DETR models.

    Args:
        config: the configuration.

    Attributes:
        config: the configuration it was built from.
    """

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        if not isinstance(config, DetrConfig):
            raise TypeError(f"config must be a DetrConfig, got {type(config).__name__}")
        self.config = config

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> Self:
        """Load a model folder, a model of the hub or a ``.pth`` file; see `detr.checkpoint.load_model`."""
        return load_model(cls, folder, **kwargs)

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE) -> None:
        """Write ``config.json`` and ``model.safetensors``; see `detr.checkpoint.save_model`."""
        save_model(self, folder, max_shard_size)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of parameters (buffers, such as frozen batch norm, are not counted)."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def optimize(self, pack: bool = True, dtype: torch.dtype | None = None, engine: Engine = "torch") -> Self:
        """A faster copy for inference, of the same class and with the same outputs; see `detr.fast.optimized`."""
        return optimized(self, pack, dtype, engine)

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """Recompute the transformer's layers in the backward pass instead of keeping their activations."""
        for module in self.modules():
            if isinstance(module, Encoder | Decoder):
                module.gradient_checkpointing = enable

    def gradient_checkpointing_disable(self) -> None:
        """Undo `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(False)
