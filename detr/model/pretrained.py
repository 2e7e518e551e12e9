"""Base class of the models: loading, saving, optimization and activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from detr.checkpoint.load_save import DEFAULT_MAX_SHARD_SIZE, load_model, save_model, warn_about_transformers
from detr.config import DetrConfig, EngineName
from detr.inference.optimize import check_conversion, optimized
from detr.model.engine import OptimizableModel
from detr.model.multiscale.decoder import RefiningDecoder
from detr.model.multiscale.dense_head import DenseHead
from detr.model.transformer import Decoder, Encoder


class DetrPreTrainedModel(OptimizableModel):
    """Base class of the DETR models.

    Args:
        config: the configuration.
    """

    supports_gradient_checkpointing = True

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        if not isinstance(config, DetrConfig):
            raise TypeError(f"config must be a DetrConfig, got {type(config).__name__}")
        self.config = config

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        low_cpu_mem_usage: object = None,  # noqa: ARG003
        **kwargs: Any,
    ) -> Self:
        """Load a model folder, a hub model or a ``.pth`` file; see `detr.checkpoint.load_save.load_model`.

        ``low_cpu_mem_usage`` has no effect, as in transformers 5: at most two copies of the weights are in memory.
        """
        return load_model(cls, folder, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_function: Callable[..., Any] | None = None,  # noqa: ARG002
        max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
        safe_serialization: bool = True,
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``; see `detr.checkpoint.load_save.save_model`.

        Log a warning if transformers would load the model but predict differently.

        Args:
            save_directory: the folder; created if missing.
            is_main_process: False writes nothing; in distributed training one process writes.
            state_dict: gathered weights, such as ``accelerator.get_state_dict(model)``; default those of the model.
            save_function: has no effect, as in transformers, because no pickled files are written.
            max_shard_size: see `detr.checkpoint.load_save.save_model`.
            safe_serialization: must be True; pickled weights can be loaded but not saved.

        Raises:
            ValueError: see `detr.checkpoint.load_save.save_model`; or ``safe_serialization`` is False.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False: weights are written as safetensors only")
        if is_main_process:
            warn_about_transformers(self)
            save_model(self, save_directory, max_shard_size, state_dict)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Return the number of parameters. Buffers, such as those of frozen batch norm, are not included."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def optimize(
        self, pack: bool = True, dtype: torch.dtype | None = None, engine: EngineName = "torch"
    ) -> Self:
        """Return a faster copy for inference, of the same class, with the same outputs.

        For the arguments see `detr.inference.optimize.optimized`.
        """
        return optimized(self, pack, dtype, engine)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute activations in the backward pass instead of storing them, in the transformer and the dense head.

        Args:
            activation_checkpointing_kwargs: keywords of `torch.utils.checkpoint.checkpoint`; ``use_reentrant`` defaults
                to False.
            every_n_layers: must be 1: every layer is recomputed.
            offload: must be False: stored activations stay on the device.

        Raises:
            ValueError: ``every_n_layers`` or ``offload`` has another value.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(
                f"every_n_layers={every_n_layers}, offload={offload} is not supported: use every_n_layers=1 and "
                "offload=False"
            )
        self._set_checkpointing({"use_reentrant": False, **(activation_checkpointing_kwargs or {})})

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Alias of `activation_checkpointing_enable`, called by older versions of transformers."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Undo `activation_checkpointing_enable`."""
        self._set_checkpointing(None)

    gradient_checkpointing_disable = activation_checkpointing_disable

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return any(getattr(module, "checkpointing", None) is not None for module in self.modules())

    def _set_checkpointing(self, kwargs: dict[str, Any] | None) -> None:
        for module in self.modules():
            if isinstance(module, Encoder | Decoder | RefiningDecoder | DenseHead):
                module.checkpointing = kwargs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.is_optimized:
            check_conversion(self, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
