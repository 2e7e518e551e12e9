"""What the models return: dataclasses that can be read by attribute, by key and by index.

B batch, Q queries, S cells of the deepest feature map, D ``d_model``, L decoder layers, H heads, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass
class ModelOutput:
    """Base of the outputs: ``out.logits``, ``out["logits"]`` and ``out[0]``; fields that are None have no index."""

    def keys(self) -> list[str]:
        """Names of the fields that are not None, in order."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def values(self) -> list[Any]:
        """Values of the fields that are not None, in order."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Pairs of name and value of the fields that are not None, in order."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values as a tuple, as ``return_dict=False`` gives them."""
        return tuple(self.values())

    def get(self, key: str, default: Any = None) -> Any:
        """The field ``key``, or ``default`` where it is None or does not exist."""
        try:
            return self[key]
        except KeyError:
            return default

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self:
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass
class DetrEncoderOutput(ModelOutput):
    """Output of the encoder.

    Attributes:
        last_hidden_state: float [B, S, D].
        hidden_states: ``encoder_layers + 1`` of float [B, S, D], the first the projected features.
        attentions: ``encoder_layers`` of float [B, H, S, S].
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class DetrDecoderOutput(ModelOutput):
    """Output of the decoder.

    Attributes:
        last_hidden_state: float [B, Q, D], after the final layernorm.
        hidden_states: ``decoder_layers + 1`` of float [B, Q, D]: the input, each layer's output, the last one
            after the final layernorm.
        attentions: ``decoder_layers`` of float [B, H, Q, Q].
        cross_attentions: ``decoder_layers`` of float [B, H, Q, S].
        intermediate_hidden_states: float [L, B, Q, D], each layer's output after the final layernorm, with
            ``auxiliary_loss``.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    intermediate_hidden_states: Tensor | None = None


@dataclass
class DetrModelOutput(ModelOutput):
    """Output of `DetrModel`.

    Attributes:
        last_hidden_state: float [B, Q, D], the decoder's output.
        past_key_values: always None; the documented field exists.
        decoder_hidden_states, decoder_attentions, cross_attentions: see `DetrDecoderOutput`.
        encoder_last_hidden_state, encoder_hidden_states, encoder_attentions: see `DetrEncoderOutput`.
        intermediate_hidden_states: float [L, B, Q, D] with ``auxiliary_loss``.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    intermediate_hidden_states: Tensor | None = None


@dataclass
class DetrObjectDetectionOutput(ModelOutput):
    """Output of `DetrForObjectDetection`.

    Attributes:
        loss: float [], with labels.
        loss_dict: the terms of the loss, unweighted, each float []; ``_i`` is decoder layer i.
        logits: float [B, Q, C + 1], the last class is "no object".
        pred_boxes: float [B, Q, 4], cxcywh in 0..1 of the image without its padding.
        auxiliary_outputs: one ``{"logits", "pred_boxes"}`` for every decoder layer but the last, with labels
            and ``auxiliary_loss``.
        last_hidden_state: float [B, Q, D], the decoder's output.
        decoder_hidden_states, decoder_attentions, cross_attentions: see `DetrDecoderOutput`.
        encoder_last_hidden_state, encoder_hidden_states, encoder_attentions: see `DetrEncoderOutput`.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None
    last_hidden_state: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None


@dataclass
class DetrSegmentationOutput(ModelOutput):
    """Output of `DetrForSegmentation`.

    Attributes:
        loss, loss_dict, logits, pred_boxes, auxiliary_outputs: see `DetrObjectDetectionOutput`.
        pred_masks: float [B, Q, h, w], logits at the size of the shallowest feature map (a quarter of the padded
            image, rounded up); queries whose mask was not computed have `detr.segmentation.NO_MASK` everywhere.
        last_hidden_state: float [B, Q, D], the decoder's output.
        decoder_hidden_states, decoder_attentions, cross_attentions: see `DetrDecoderOutput`.
        encoder_last_hidden_state, encoder_hidden_states, encoder_attentions: see `DetrEncoderOutput`.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    pred_masks: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None
    last_hidden_state: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None


for _output in (DetrModelOutput, DetrObjectDetectionOutput, DetrSegmentationOutput):
    # lets torch.export and torch.compile see the tensors inside
    torch.export.register_dataclass(_output, serialized_type_name=f"detr.outputs.{_output.__name__}")
