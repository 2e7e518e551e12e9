"""What the models return: dataclasses that can be read by attribute, by key and by index.

B batch, Q queries, S cells of the deepest feature map, D ``d_model``, L decoder layers, H heads, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass
class ModelOutput(dict[str, Any]):
    """Base of the outputs: ``out.logits``, ``out["logits"]`` and ``out[0]``; fields that are None have no index.

    It is a dict of the fields that are not None, which is what transformers' Trainer and accelerate take apart and put
    together again, and is made from a dict of fields as well as from keywords.
    """

    def __post_init__(self) -> None:
        first, *others = fields(self)
        given = getattr(self, first.name)
        if isinstance(given, Iterator):  # of pairs: how torch's DataParallel puts dicts together
            given = dict(given)
        if isinstance(given, Mapping) and all(getattr(self, each.name) is None for each in others):
            setattr(self, first.name, None)
            for name, value in given.items():
                self[name] = value

    def to_tuple(self) -> tuple[Any, ...]:
        """The values as a tuple, as ``return_dict=False`` gives them."""
        return tuple(self[name] for name in self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if value is None:
            super().pop(name, None)
            return
        super().__setitem__(name, value)
        order = [each.name for each in fields(self)]
        if list(self) != [
            each for each in order if each in self
        ]:  # the index of a value is its place in the class
            present = {each: getattr(self, each) for each in order if each in self}
            super().clear()
            super().update(present)

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in {each.name for each in fields(self)}:
            raise KeyError(f"{type(self).__name__} has no field {name!r}")
        setattr(self, name, value)

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def _is_fixed(self, *_: Any, **__: Any) -> Any:
        """Raise a TypeError: the fields of an output are fixed."""
        raise TypeError(f"a {type(self).__name__} has fixed fields: assign to them")

    pop = popitem = update = setdefault = clear = __delitem__ = __ior__ = _is_fixed

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, each.name) for each in fields(self))


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
            image, rounded up); queries whose mask was not computed have `detr.model.segmentation.NO_MASK` everywhere.
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


@dataclass(frozen=True)
class MaskContext:
    """What all masks of an image share.

    Attributes:
        base: float [B, D + H, h, w], the image's part of the first convolution; or float [B, D, h, w], the projected
            feature map, where that convolution cannot be split.
        maps: three of float [B, C_i, h_i, w_i], the adapted feature maps, deep to shallow.
        attention: float [B, Q, H, h, w].
    """

    base: Tensor
    maps: tuple[Tensor, Tensor, Tensor]
    attention: Tensor


@dataclass(frozen=True)
class ImageFeatures:
    """What the transformer starts from.

    Attributes:
        cells: float [B, S, D], the projected features.
        keep: bool [B, h, w], which cells to attend to; None for all.
        counted: bool [B, h, w], the cells that the position embedding counts.
        maps: the backbone's feature maps, shallow to deep; empty where it was skipped.
        mask_context: what a mask head makes of them, where that is computed already.
    """

    cells: Tensor
    keep: Tensor | None
    counted: Tensor
    maps: Sequence[Tensor] = ()
    mask_context: MaskContext | None = None


for _output in (DetrModelOutput, DetrObjectDetectionOutput, DetrSegmentationOutput):
    # lets torch.export and torch.compile see the tensors inside
    torch.export.register_dataclass(_output, serialized_type_name=f"detr.model.outputs.{_output.__name__}")
