"""What all DETR models can do besides computing: load, save, count, freeze."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from detr.checkpoint.load_save import DEFAULT_MAX_SHARD_SIZE, load_model, save_model, warn_about_transformers
from detr.config import DetrConfig
from detr.inference.optimize import Engine, optimized, refuse_conversion
from detr.model.multiscale.decoder import RefiningDecoder
from detr.model.multiscale.dense_head import DenseHead
from detr.model.transformer import Decoder, Encoder


class DetrPreTrainedModel(nn.Module):
    """Base of the DETR models.

    Args:
        config: the configuration.

    Attributes:
        config: the configuration it was built from.
        is_optimized: whether the model comes from `optimize`: it predicts, and is neither trained nor saved.
    """

    supports_gradient_checkpointing = True
    is_optimized = False

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
        """Load a model folder, a model of the hub or a ``.pth`` file; see `detr.checkpoint.load_save.load_model`.

        ``low_cpu_mem_usage`` changes nothing, as in transformers 5: at most two copies of the weights are in memory.
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

        A model that transformers would load but predict differently is logged.

        Args:
            save_directory: the folder, which is created where missing.
            is_main_process: False writes nothing: of several processes one writes.
            state_dict: the weights, where they were gathered already (``accelerator.get_state_dict(model)``); None takes
                the model's own.
            save_function: changes nothing, as in transformers: it writes pickled files, and there are none.
            max_shard_size: see `detr.checkpoint.load_save.save_model`.
            safe_serialization: must be True; pickled weights are read but not written.

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
        """Number of parameters (buffers, such as frozen batch norm, are not counted)."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def optimize(self, pack: bool = True, dtype: torch.dtype | None = None, engine: Engine = "torch") -> Self:
        """A faster copy for inference, of the same class and with the same outputs; see `detr.inference.optimize.optimized`."""
        return optimized(self, pack, dtype, engine)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute layers in the backward pass instead of storing their activations: the transformer's, and the dense head's.

        Args:
            activation_checkpointing_kwargs: of `torch.utils.checkpoint.checkpoint`; ``use_reentrant`` is False unless
                given here.
            every_n_layers: must be 1: every layer is recomputed.
            offload: must be False: what is stored stays on the device.

        Raises:
            ValueError: another ``every_n_layers`` or ``offload``.
        """
        if every_n_layers != 1 or offload:
            raise ValueError(
                f"every_n_layers={every_n_layers}, offload={offload}: every layer is recomputed, and nothing is offloaded"
            )
        self._set_checkpointing({"use_reentrant": False, **(activation_checkpointing_kwargs or {})})

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Another name of `activation_checkpointing_enable`, which older versions of transformers call."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Undo `activation_checkpointing_enable`."""
        self._set_checkpointing(None)

    gradient_checkpointing_disable = activation_checkpointing_disable

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return any(getattr(module, "checkpointing", None) is not None for module in self.modules())

    def _set_checkpointing(self, kwargs: dict[str, Any] | None) -> None:
        for module in self.modules():
            if isinstance(module, Encoder | Decoder | RefiningDecoder | DenseHead):
                module.checkpointing = kwargs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.is_optimized:
            refuse_conversion(self, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
