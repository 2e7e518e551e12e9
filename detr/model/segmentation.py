"""`DetrForSegmentation`: DETR with a mask for every query (instance, semantic and panoptic segmentation).

B batch, H x W image, Q queries, M computed masks, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from detr.config import DetrConfig
from detr.model.detection import (
    DetrForObjectDetection,
    check_pixels,
    hidden_outputs,
    refuse_for_multi_scale,
)
from detr.model.initialization import init_mask_head
from detr.model.mask_head import BoxAttention, MaskHead
from detr.model.multiscale.masks import MultiScaleMaskHead
from detr.model.outputs import (
    DetrEncoderOutput,
    DetrModelOutput,
    DetrSegmentationOutput,
    ImageFeatures,
    MaskContext,
)
from detr.model.pretrained import DetrPreTrainedModel

NO_MASK = -1e4
"""Logit of all pixels of a mask that was not computed: probability 0, and finite in float16."""


class DetrForSegmentation(DetrPreTrainedModel):
    """DETR with heads for classes, boxes and masks.

    Train all parts jointly, or in two steps as in the paper: load a folder of `DetrForObjectDetection` with
    ``from_pretrained``, call `freeze_detector`, and train the mask head.

    Args:
        config: the configuration. Nothing is downloaded unless ``config.use_pretrained_backbone`` is set.

    Raises:
        ValueError: the widths or feature maps of the configuration do not fit the mask head.
    """

    predicts_masks = True

    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config)
        self.detr = DetrForObjectDetection(config)
        self.mask_head: MaskHead | MultiScaleMaskHead
        if self.detr.multi_scale is not None:
            self.mask_head = MultiScaleMaskHead(
                config, self.detr.multi_scale.backbone.conv_encoder.strides[0]
            )
            return
        self.mask_head = MaskHead(config, self.detr.model.backbone.conv_encoder.channels)
        self.bbox_attention = BoxAttention(config)
        gain = config.init_xavier_std if config.compat == "transformers" else 1.0
        init_mask_head(self.mask_head, self.bbox_attention, gain)

    def freeze_detector(self) -> None:
        """Freeze all parameters but those of the mask head.

        Dropout of the detector stays active in training mode, as in the original.
        """
        self.detr.requires_grad_(False)

    def forward(
        self,
        pixel_values: Tensor,
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
        min_score: float | None = None,
    ) -> DetrSegmentationOutput | tuple[Any, ...]:
        """Predict classes, boxes and masks, and compute the loss if labels are given.

        A mask is as expensive as a small image, so masks that are not needed are not computed. In training with labels,
        only the masks of matched queries are computed. With ``min_score``, only the masks that post-processing with
        this threshold uses are computed. The other masks are `NO_MASK`.

        Args:
            pixel_values: float [B, channels, H, W], normalized.
            pixel_mask: [B, H, W], 1 on real pixels, 0 on padding; None means no padding.
            decoder_attention_mask: see `DetrModel.forward`.
            encoder_outputs: see `DetrModel.forward`.
            inputs_embeds: must be None: the mask head needs the feature maps of the backbone.
            decoder_inputs_embeds: see `DetrModel.forward`.
            labels: one dict per image: ``class_labels`` int64 [n], ``boxes`` float [n, 4] cxcywh in 0..1 and
                ``masks`` [n, h_i, w_i], 0 or 1 of any dtype, at the size of the resized image.
            output_attentions: see `DetrModel.forward`.
            output_hidden_states: see `DetrModel.forward`.
            return_dict: see `DetrModel.forward`.
            num_boxes: normalizer of the box and mask losses; see `detr.loss.criterion.set_loss`.
            class_weight_sum: normalizer of the cross-entropy; see `detr.loss.criterion.set_loss`.
            image_weights: float [B], the weight of each image in the loss.
            min_score: compute only the masks of queries whose best class is an object class with a higher score.

        Raises:
            ValueError: an argument or a label does not fit; the message says which.
        """
        as_dict = self.config.return_dict if return_dict is None else return_dict
        if self.detr.multi_scale is not None:
            refuse_for_multi_scale(
                decoder_attention_mask=decoder_attention_mask,
                encoder_outputs=encoder_outputs,
                inputs_embeds=inputs_embeds,
                decoder_inputs_embeds=decoder_inputs_embeds,
                output_attentions=output_attentions or None,
                output_hidden_states=output_hidden_states or None,
            )
            output = self.detr.multi_scale(
                check_pixels(pixel_values, pixel_mask),
                pixel_mask,
                labels,
                num_boxes=num_boxes,
                image_weights=image_weights,
                mask_head=self.mask_head,
            )
            if min_score is not None and output.pred_masks is not None:
                selected = _is_above(output.logits, min_score)[..., None, None]
                output.pred_masks = torch.where(selected, output.pred_masks, NO_MASK)
            return output if as_dict else output.to_tuple()
        if inputs_embeds is not None:
            raise ValueError(
                "inputs_embeds skips the backbone, but the mask head needs its feature maps: give pixel_values"
            )
        features, outputs = self.detr.model.states(
            pixel_values,
            pixel_mask,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            decoder_inputs_embeds=decoder_inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        output = self.segment(
            features, outputs, labels, num_boxes, class_weight_sum, image_weights, min_score=min_score
        )
        return output if as_dict else output.to_tuple()

    def segment(
        self,
        features: ImageFeatures,
        outputs: DetrModelOutput,
        labels: Sequence[Mapping[str, Any]] | None,
        num_boxes: float | Tensor | None,
        class_weight_sum: float | Tensor | None,
        image_weights: Tensor | None,
        min_score: float | None = None,
        groups: int = 1,
    ) -> DetrSegmentationOutput:
        """Apply the heads to the output of the transformer, and compute the loss if labels are given.

        Arguments are those of `forward` and of `DetrForObjectDetection.detect`.
        """
        queries = outputs.last_hidden_state
        assert queries is not None
        context = features.mask_context or self.mask_context(features, outputs)
        pred_masks = predicted = None
        if labels is None or not self.training:
            predicted = self.detr.predict(queries)
            selected = None if min_score is None else _is_above(predicted[0], min_score)
            pred_masks = self._all_masks(context, selected)

        def compute_masks(image: Tensor, query: Tensor) -> Tensor:
            nonlocal pred_masks
            if pred_masks is None:
                matched = self._matched_masks(context, image, query)
                pred_masks = _scatter_masks(matched.detach(), image, query, queries)
                return matched
            return pred_masks[image, query]

        detected = self.detr.detect(
            outputs, labels, num_boxes, class_weight_sum, image_weights, compute_masks, groups, predicted
        )
        return DetrSegmentationOutput(**detected, pred_masks=pred_masks, **hidden_outputs(outputs))

    def mask_context(self, features: ImageFeatures, outputs: DetrModelOutput) -> MaskContext:
        """Compute the input of the mask head that all masks of an image share."""
        attend_mask = None if features.attend_mask is None else features.attend_mask.flatten(1)
        attention = self.bbox_attention(
            outputs.last_hidden_state, outputs.encoder_last_hidden_state, attend_mask
        )
        height, width = features.valid_mask.shape[-2:]
        # reshape instead of unflatten, here and below: with unflatten, ONNX would fix the sizes of the example input
        projected = features.cells.transpose(1, 2).reshape(*features.cells.shape[::2], height, width)
        return cast(MaskHead, self.mask_head).context(projected, features.maps, attention)

    def _all_masks(self, context: MaskContext, selected: Tensor | None) -> Tensor:
        """Compute mask logits float [B, Q, h, w]. Queries not ``selected``, bool [B, Q], get `NO_MASK`."""
        batch, queries = context.attention.shape[:2]
        if selected is not None:
            image, query = selected.nonzero().unbind(1)
            return _scatter_masks(self.mask_head(context, image, query), image, query, selected)
        index = torch.arange(batch * queries, device=context.attention.device)
        masks: Tensor = self.mask_head(context, index // queries, index % queries)
        return masks.reshape(batch, queries, *masks.shape[1:])

    def _matched_masks(self, context: MaskContext, image: Tensor, query: Tensor) -> Tensor:
        """Compute mask logits float [M, h, w] of matched queries."""
        if not len(image):
            # DistributedDataParallel waits for a gradient of every parameter, so the empty result must depend on them.
            first = torch.zeros(1, dtype=torch.int64, device=context.attention.device)
            return self.mask_head(context, first, first)[:0]
        masks: Tensor = self.mask_head(context, image, query)
        return masks


def _is_above(logits: Tensor, min_score: float) -> Tensor:
    """Return which queries instance and panoptic post-processing use at this threshold, bool [B, Q]."""
    scores, labels = logits.softmax(-1).max(-1)
    return (labels != logits.shape[-1] - 1) & (scores > min_score)


def _scatter_masks(masks: Tensor, image: Tensor, query: Tensor, queries: Tensor) -> Tensor:
    """Scatter masks float [M, h, w] to float [B, Q, h, w], with `NO_MASK` elsewhere; ``queries`` is [B, Q, ...]."""
    all_masks = masks.new_full((*queries.shape[:2], *masks.shape[1:]), NO_MASK)
    return all_masks.index_put((image, query), masks)
