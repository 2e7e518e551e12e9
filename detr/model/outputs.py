"""Outputs of the models: dataclasses with access by attribute, by key and by index.

B batch, Q queries, S tokens (one for each cell of the deepest feature map), D ``d_model``, L decoder layers, H heads,
C classes.
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

    An output is a dict of the fields that are not None, and it can be created from such a dict as well as from
    keywords: transformers' Trainer and accelerate convert outputs to dicts and back.
    """

    def __post_init__(self) -> None:
        first, *others = fields(self)
        given = getattr(self, first.name)
        if isinstance(given, Iterator):  # of pairs: torch's DataParallel reassembles dicts from those
            given = dict(given)
        if isinstance(given, Mapping) and all(getattr(self, each.name) is None for each in others):
            setattr(self, first.name, None)
            for name, value in given.items():
                self[name] = value

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values as a tuple, as ``return_dict=False`` does."""
        return tuple(self[name] for name in self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if value is None:
            super().pop(name, None)
            return
        super().__setitem__(name, value)
        order = [each.name for each in fields(self)]
        # The index of a value is the position of its field in the class: restore that order.
        if list(self) != [each for each in order if each in self]:
            present = {each: getattr(self, each) for each in order if each in self}
            super().clear()
            super().update(present)

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in {each.name for each in fields(self)}:
            raise KeyError(f"{type(self).__name__} has no field {name!r}")
        setattr(self, name, value)

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def _refuse_change(self, *_: Any, **__: Any) -> Any:
        """Raise a TypeError: fields can be set, but not added or removed."""
        raise TypeError(
            f"a {type(self).__name__} has fixed fields: assign to a field, or assign None to remove it"
        )

    pop = popitem = update = setdefault = clear = __delitem__ = __ior__ = _refuse_change

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, each.name) for each in fields(self))


@dataclass
class DetrEncoderOutput(ModelOutput):
    """Output of the encoder.

    Attributes:
        last_hidden_state: float [B, S, D].
        hidden_states: ``encoder_layers + 1`` tensors float [B, S, D]: the projected features, then the output of each
            layer.
        attentions: ``encoder_layers`` tensors float [B, H, S, S].
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class DetrDecoderOutput(ModelOutput):
    """Output of the decoder.

    Attributes:
        last_hidden_state: float [B, Q, D], after the final layer norm.
        hidden_states: ``decoder_layers + 1`` tensors float [B, Q, D]: the input, then the output of each layer, the
            last one after the final layer norm.
        attentions: ``decoder_layers`` tensors float [B, H, Q, Q].
        cross_attentions: ``decoder_layers`` tensors float [B, H, Q, S].
        intermediate_hidden_states: float [L, B, Q, D], the output of each layer after the final layer norm; only with
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
        past_key_values: always None; exists because transformers documents it.
        decoder_hidden_states, decoder_attentions, cross_attentions: see `DetrDecoderOutput`.
        encoder_last_hidden_state, encoder_hidden_states, encoder_attentions: see `DetrEncoderOutput`.
        intermediate_hidden_states: float [L, B, Q, D]; only with ``auxiliary_loss``.
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
        loss: float []; only with labels.
        loss_dict: the unweighted terms of the loss, float [] each, only with labels; the suffix ``_i`` is decoder
            layer i.
        logits: float [B, Q, C + 1]; the last class is "no object".
        pred_boxes: float [B, Q, 4], cxcywh in 0..1, relative to the image without its padding.
        auxiliary_outputs: ``{"logits", "pred_boxes"}`` for every decoder layer but the last; only with labels and
            ``auxiliary_loss``.
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
        pred_masks: float [B, Q, h, w], logits at the size of the shallowest feature map: a quarter of the padded image,
            rounded up. Masks that were not computed are `detr.model.segmentation.NO_MASK` everywhere.
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
    """Input of the mask head, shared by all masks of an image.

    Attributes:
        base: float [B, D + H, h, w], the first convolution applied to the image features; or float [B, D, h, w], the
            projected feature map, if that convolution cannot be split.
        maps: three tensors float [B, C_i, h_i, w_i], the outputs of the adapters, deep to shallow.
        attention: float [B, Q, H, h, w], from `detr.model.mask_head.BoxAttention`.
    """

    base: Tensor
    maps: tuple[Tensor, Tensor, Tensor]
    attention: Tensor


@dataclass(frozen=True)
class ImageFeatures:
    """Input of the transformer.

    Attributes:
        cells: float [B, S, D], the projected features as tokens.
        attend_mask: bool [B, h, w], True on cells to attend to; None for all.
        valid_mask: bool [B, h, w], True on cells that are not padding, for the position embedding.
        maps: feature maps of the backbone, shallow to deep; empty if it was skipped.
        mask_context: the input of the mask head, if it was already computed.
    """

    cells: Tensor
    attend_mask: Tensor | None
    valid_mask: Tensor
    maps: Sequence[Tensor] = ()
    mask_context: MaskContext | None = None


for _output in (DetrModelOutput, DetrObjectDetectionOutput, DetrSegmentationOutput):
    # torch.export and torch.compile then find the tensors in the output
    torch.export.register_dataclass(_output, serialized_type_name=f"detr.model.outputs.{_output.__name__}")
