"""DETR for object detection: `DetrModel` and `DetrForObjectDetection`.

B batch, H x W image, S tokens (one for each cell of the deepest feature map), Q queries, D ``d_model``, C classes,
L decoder layers. For masks see `detr.model.segmentation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.config import DetrConfig
from detr.loss.criterion import set_loss
from detr.loss.normalizers import average_normalizers
from detr.model.backbone import Backbone, downsample_mask
from detr.model.capture import check_not_capturing, is_all_ones
from detr.model.engine import WithEngine
from detr.model.initialization import init_as_original, init_as_transformers
from detr.model.multiscale.detector import MultiScaleDetector
from detr.model.outputs import DetrEncoderOutput, DetrModelOutput, DetrObjectDetectionOutput, ImageFeatures
from detr.model.position_embedding import LearnedPositionEmbedding, SinePositionEmbedding
from detr.model.pretrained import DetrPreTrainedModel
from detr.model.transformer import Decoder, Encoder


class DetrModel(DetrPreTrainedModel, WithEngine):
    """Backbone, encoder and decoder, without prediction heads.

    Args:
        config: the configuration. Nothing is downloaded unless ``config.use_pretrained_backbone`` is set.

    Raises:
        ValueError: ``config.multi_scale`` is set: that architecture has no `DetrModel`.
    """

    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config)
        if config.multi_scale is not None:
            raise ValueError(
                "config.multi_scale is set: the multi-scale architecture has no DetrModel; use DetrForObjectDetection"
            )
        self.backbone = Backbone(config)
        self.position_embedding: nn.Module
        if config.position_embedding_type == "sine":
            self.position_embedding = SinePositionEmbedding(config.d_model)
        else:
            self.position_embedding = LearnedPositionEmbedding(config.d_model)
        self.query_position_embeddings = nn.Embedding(config.num_queries, config.d_model)
        channels = self.backbone.conv_encoder.channels[-1]
        self.input_projection = nn.Conv2d(channels, config.d_model, kernel_size=1)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.compat == "transformers":
            parts = (self.query_position_embeddings, self.input_projection, self.encoder, self.decoder)
            init_as_transformers(parts, config.init_std)
        else:
            init_as_original(self.encoder)
            init_as_original(self.decoder)

    def freeze_backbone(self) -> None:
        """Freeze all parameters of the backbone."""
        self.backbone.requires_grad_(False)

    def unfreeze_backbone(self) -> None:
        """Make all parameters of the backbone trainable."""
        self.backbone.requires_grad_(True)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: DetrEncoderOutput | Sequence[Any] | Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> DetrModelOutput | tuple[Any, ...]:
        """Compute the decoder's hidden states.

        Args:
            pixel_values: float [B, channels, H, W], normalized.
            pixel_mask: [B, H, W], 1 on real pixels, 0 on padding. None means no padding; it is faster than a mask of
                ones and gives the same results.
            decoder_attention_mask: [B, Q], 0 excludes a query from the keys of the decoder's self-attention.
            encoder_outputs: precomputed output of the encoder, which is then skipped: a `DetrEncoderOutput`, a tuple
                ``(last_hidden_state, hidden_states, attentions)`` or the hidden state float [B, S, D].
            inputs_embeds: float [B, S, D], used in place of the projected features of a square feature map; the
                backbone is then skipped.
            decoder_inputs_embeds: float [B, Q, D], the initial queries; default zeros.
            output_attentions: also return attention weights; default ``config.output_attentions``.
            output_hidden_states: also return all hidden states; default ``config.output_hidden_states``.
            return_dict: False returns a tuple; default ``config.return_dict``.

        Raises:
            ValueError: neither pixel_values nor inputs_embeds are given, or a shape does not fit.
        """
        _, output = self.states(
            pixel_values,
            pixel_mask,
            inputs_embeds=inputs_embeds,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            decoder_inputs_embeds=decoder_inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def states(
        self,
        pixel_values: Tensor | None,
        pixel_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> tuple[ImageFeatures, DetrModelOutput]:
        """Run backbone and transformer, on the engine if there is one; see `features` and `transform`."""
        states: tuple[ImageFeatures, DetrModelOutput] = self._run(
            self.compute_states, pixel_values, pixel_mask, inputs_embeds=inputs_embeds, **options
        )
        return states

    def compute_states(
        self,
        pixel_values: Tensor | None,
        pixel_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> tuple[ImageFeatures, DetrModelOutput]:
        """Run backbone and transformer without the engine; see `states`."""
        features = self.features(pixel_values, pixel_mask, inputs_embeds)
        return features, self.transform(features, **options)

    def transform(
        self,
        features: ImageFeatures,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: DetrEncoderOutput | Sequence[Any] | Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        extra_queries: Tensor | None = None,
    ) -> DetrModelOutput:
        """Run encoder and decoder. Arguments are those of `forward`, and additionally:

        Args:
            features: the output of `features`.
            extra_queries: float [K - 1, Q, D], the position embeddings of further query groups. The output of the
                decoder is then [B, K * Q, D], one group after the other, the model's own queries last.
        """
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        tokens, batch = features.cells, features.cells.shape[0]
        position = (
            self.position_embedding(features.valid_mask, tokens.dtype).flatten(2).transpose(1, 2).contiguous()
        )
        attend_mask = None if features.attend_mask is None else features.attend_mask.flatten(1)

        encoded = _encoder_output(encoder_outputs)
        if encoded is None:
            encoded = self.encoder(tokens, attend_mask, position, attentions, states)
        memory = encoded.last_hidden_state
        query_position, groups = self.query_position_embeddings.weight, 1
        if extra_queries is not None:
            groups += len(extra_queries)
            query_position = torch.cat((extra_queries.flatten(0, 1), query_position))
        query_position = query_position.to(tokens.dtype).expand(batch, -1, -1)
        query_attend_mask = None if decoder_attention_mask is None else decoder_attention_mask.to(torch.bool)
        decoded = self.decoder(
            decoder_inputs_embeds,
            query_position,
            query_attend_mask,
            memory,
            attend_mask,
            position,
            attentions,
            states,
            groups,
        )
        return DetrModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            intermediate_hidden_states=decoded.intermediate_hidden_states,
        )

    def features(
        self, pixel_values: Tensor | None, pixel_mask: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> ImageFeatures:
        """Run the backbone and project its deepest feature map. Arguments are those of `forward`."""
        if inputs_embeds is not None:
            batch, length, _ = inputs_embeds.shape
            side = isqrt(length)
            if side * side != length:
                raise ValueError(
                    f"inputs_embeds has length {length}, which is not the area of a square feature map"
                )
            ones = torch.ones((batch, side, side), dtype=torch.bool, device=inputs_embeds.device)
            # As in transformers: with inputs_embeds the mask does not change the position embeddings.
            attend_mask = None if pixel_mask is None else downsample_mask(pixel_mask, (side, side))
            return ImageFeatures(inputs_embeds, attend_mask, ones)
        pixel_values = check_pixels(pixel_values, pixel_mask)
        batch = pixel_values.shape[0]
        maps = self.backbone(pixel_values)
        projected = self.input_projection(maps[-1])
        tokens, (height, width) = projected.flatten(2).transpose(1, 2), projected.shape[-2:]
        if pixel_mask is None or is_all_ones(pixel_mask):
            ones = torch.ones((batch, height, width), dtype=torch.bool, device=tokens.device)
            return ImageFeatures(tokens, None, ones, maps)
        mask = downsample_mask(pixel_mask, (height, width))
        return ImageFeatures(tokens, mask, mask, maps)


def check_pixels(pixel_values: Tensor | None, pixel_mask: Tensor | None) -> Tensor:
    """Check that ``pixel_values`` is a batch of images whose shape the mask has; return it.

    Args:
        pixel_values: [B, channels, H, W].
        pixel_mask: [B, H, W] or None.

    Raises:
        ValueError: pixel_values is None, or a shape does not fit.
    """
    if pixel_values is None:
        raise ValueError("You have to specify either pixel_values or inputs_embeds")
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pixel_values must be [batch, channels, height, width], got {list(pixel_values.shape)}"
        )
    batch, _, *image_size = pixel_values.shape
    if pixel_mask is not None and pixel_mask.shape != (batch, *image_size):
        raise ValueError(
            f"pixel_mask is {list(pixel_mask.shape)}, pixel_values {list(pixel_values.shape)}: "
            "batch, height and width must agree"
        )
    return pixel_values


def refuse_for_multi_scale(**arguments: Any) -> None:
    """Raise ValueError if one of the arguments, which the multi-scale architecture does not support, is not None."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(
            f"{given[0]} is not supported by the multi-scale architecture: do not pass it if config.multi_scale is set"
        )


def _encoder_output(given: DetrEncoderOutput | Sequence[Any] | Tensor | None) -> DetrEncoderOutput | None:
    if given is None or isinstance(given, DetrEncoderOutput):
        return given
    if isinstance(given, Tensor):
        return DetrEncoderOutput(last_hidden_state=given)
    if hasattr(given, "last_hidden_state"):
        return DetrEncoderOutput(
            given.last_hidden_state, getattr(given, "hidden_states", None), getattr(given, "attentions", None)
        )
    return DetrEncoderOutput(*given)


class BoxHead(nn.Module):
    """Predict a box from a query: three linear layers with ReLU between them. The sigmoid is not applied."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 4)])

    def forward(self, x: Tensor) -> Tensor:
        """Map float [..., D] to float [..., 4]."""
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(x)))))


class DetrForObjectDetection(DetrPreTrainedModel):
    """DETR with heads for classes and boxes.

    Args:
        config: the configuration. Nothing is downloaded unless ``config.use_pretrained_backbone`` is set.

    Attributes:
        multi_scale: the whole network if ``config.multi_scale`` is set; ``model`` and the heads then do not exist.
            None in standard DETR.
    """

    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config)
        self.multi_scale = None if config.multi_scale is None else MultiScaleDetector(config)
        if self.multi_scale is not None:
            return
        self.model = DetrModel(config)
        self.class_labels_classifier = nn.Linear(config.d_model, config.num_labels + 1)
        self.bbox_predictor = BoxHead(config.d_model)
        if config.compat == "transformers":
            init_as_transformers((self.class_labels_classifier, self.bbox_predictor), config.init_std)

    def reset_class_head(self) -> None:
        """Reinitialize the class head, for training with other classes."""
        if self.multi_scale is not None:
            self.multi_scale.reset_class_head()
        else:
            self.class_labels_classifier.reset_parameters()

    def predict(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Predict classes and boxes from the output of the decoder.

        The heads run outside autocast: boxes in bfloat16 would be off by pixels, and the heads are only a thousandth
        of the computation.

        Args:
            hidden_states: float [..., Q, D].

        Returns:
            Logits float [..., Q, C + 1] and boxes float [..., Q, 4], cxcywh in 0..1.
        """
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            parameter = next(self.class_labels_classifier.parameters(), None)  # a quantized head has none
            hidden_states = hidden_states.to(torch.float32 if parameter is None else parameter.dtype)
            return self.class_labels_classifier(hidden_states), self.bbox_predictor(hidden_states).sigmoid()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: DetrEncoderOutput | Sequence[Any] | Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Sequence[Mapping[str, Any]] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        num_boxes: float | Tensor | None = None,
        class_weight_sum: float | Tensor | None = None,
        image_weights: Tensor | None = None,
    ) -> DetrObjectDetectionOutput | tuple[Any, ...]:
        """Predict classes and boxes, and compute the loss if labels are given.

        Args:
            pixel_values: float [B, channels, H, W], normalized.
            pixel_mask: [B, H, W], 1 on real pixels, 0 on padding; None means no padding.
            decoder_attention_mask: see `DetrModel.forward`.
            encoder_outputs: see `DetrModel.forward`.
            inputs_embeds: see `DetrModel.forward`.
            decoder_inputs_embeds: see `DetrModel.forward`.
            labels: one dict per image: ``class_labels`` int64 [n] in 0..C - 1 and ``boxes`` float [n, 4], cxcywh
                in 0..1; other keys are ignored (an ``image_id`` appears in error messages).
            output_attentions: see `DetrModel.forward`.
            output_hidden_states: see `DetrModel.forward`.
            return_dict: see `DetrModel.forward`.
            num_boxes: normalizer of the box losses; see `detr.loss.criterion.set_loss`.
            class_weight_sum: normalizer of the cross-entropy; see `detr.loss.criterion.set_loss`.
            image_weights: float [B], the weight of each image in the loss; 0 for an empty slot of the batch.

        If torch.distributed is initialized, a normalizer that is not given is averaged over the default process group:
        see `average_normalizers`.

        Raises:
            ValueError: an argument or a label does not fit; the message says which.
        """
        as_dict = self.config.return_dict if return_dict is None else return_dict
        if self.multi_scale is not None:
            refuse_for_multi_scale(
                decoder_attention_mask=decoder_attention_mask,
                encoder_outputs=encoder_outputs,
                inputs_embeds=inputs_embeds,
                decoder_inputs_embeds=decoder_inputs_embeds,
                output_attentions=output_attentions or None,
                output_hidden_states=output_hidden_states or None,
            )
            output = self.multi_scale(
                check_pixels(pixel_values, pixel_mask),
                pixel_mask,
                labels,
                num_boxes=num_boxes,
                image_weights=image_weights,
            )
            return output if as_dict else output.to_tuple()
        outputs = self.model(
            pixel_values,
            pixel_mask=pixel_mask,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        detected = self.detect(outputs, labels, num_boxes, class_weight_sum, image_weights)
        output = DetrObjectDetectionOutput(**detected, **hidden_outputs(outputs))
        return output if as_dict else output.to_tuple()

    def detect(
        self,
        outputs: DetrModelOutput,
        labels: Sequence[Mapping[str, Any]] | None,
        num_boxes: float | Tensor | None,
        class_weight_sum: float | Tensor | None,
        image_weights: Tensor | None,
        compute_masks: Callable[[Tensor, Tensor], Tensor] | None = None,
        groups: int = 1,
        predicted: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Any]:
        """Apply the heads to the output of the transformer, and compute the loss if labels are given.

        Arguments are those of `forward` and `set_loss`. With ``groups`` the intermediate hidden states are those of all
        groups, in the order that `set_loss` expects. ``predicted`` is the result of `predict` for the last hidden
        state, if it was already computed.

        Returns:
            The fields ``loss``, ``loss_dict``, ``logits``, ``pred_boxes`` and ``auxiliary_outputs``.
        """
        assert outputs.last_hidden_state is not None  # a model always returns it
        logits, pred_boxes = predicted or self.predict(outputs.last_hidden_state)
        loss = loss_dict = auxiliary_outputs = None
        if labels is not None:
            check_not_capturing("the loss", "call the model without labels")
            all_logits, all_boxes = logits[None], pred_boxes[None]
            if outputs.intermediate_hidden_states is not None:
                aux_logits, aux_boxes = self.predict(outputs.intermediate_hidden_states[:-1])
                if self.config.auxiliary_loss:
                    own = (
                        len(aux_logits) + 1
                    ) // groups - 1  # layers of the model's own group, without the last
                    first = len(aux_logits) - own
                    auxiliary_outputs = [
                        {"logits": c, "pred_boxes": b}
                        for c, b in zip(aux_logits[first:], aux_boxes[first:], strict=True)
                    ]
                all_logits = torch.cat((aux_logits, all_logits))
                all_boxes = torch.cat((aux_boxes, all_boxes))
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                num_boxes, class_weight_sum = average_normalizers(
                    labels, image_weights, self.config, num_boxes, class_weight_sum, logits.device
                )
            loss, loss_dict = set_loss(
                all_logits,
                all_boxes,
                labels,
                self.config,
                num_boxes=num_boxes,
                class_weight_sum=class_weight_sum,
                image_weights=image_weights,
                compute_masks=compute_masks,
                groups=groups,
            )
        return {
            "loss": loss,
            "loss_dict": loss_dict,
            "logits": logits,
            "pred_boxes": pred_boxes,
            "auxiliary_outputs": auxiliary_outputs,
        }


def hidden_outputs(outputs: DetrModelOutput) -> dict[str, Any]:
    """Return the fields of the transformer's output that the outputs of models with heads also have."""
    excluded = ("past_key_values", "intermediate_hidden_states")
    return {f.name: getattr(outputs, f.name) for f in fields(outputs) if f.name not in excluded}
