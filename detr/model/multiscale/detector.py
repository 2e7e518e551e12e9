"""Multi-scale DETR: a set predictor that trains within minutes, starting from a pretrained backbone only.

Data flow::

    backbone maps --> HybridEncoder --> DenseHead --> distinct tokens --> RefiningDecoder --> boxes and scores
    (strides 4..)     (RT-DETR)         (TOOD)        (DDQ)               (DINO)

Outputs are those of DETR: at most ``num_queries`` objects, without duplicates and without non-maximum suppression of
the outputs.

B batch, Q queries, D ``d_model``, C classes, L decoder layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detr.config import DetrConfig
from detr.loss.multiscale_criterion import multi_scale_loss
from detr.loss.normalizers import average_normalizers
from detr.model.backbone import Backbone
from detr.model.capture import check_not_capturing
from detr.model.engine import WithEngine
from detr.model.multiscale.decoder import RefiningDecoder
from detr.model.multiscale.dense_head import DenseHead, DensePredictions
from detr.model.multiscale.hybrid_encoder import HybridEncoder, token_positions
from detr.model.multiscale.masks import MultiScaleMaskHead
from detr.model.multiscale.scores import softmax_logits
from detr.model.multiscale.selection import distinct_tokens
from detr.model.multiscale.tokens import TokenGrid, token_grid
from detr.model.outputs import DetrObjectDetectionOutput, DetrSegmentationOutput


@dataclass(frozen=True)
class EncodedMaps:
    """Results of the convolutional part of the network.

    Attributes:
        finest: float [B, D, h_0, w_0], the finest feature map of the hybrid encoder.
        class_maps: float [B, D, h_i, w_i], finest first, from the tower for classes of the dense head.
        box_maps: float [B, D, h_i, w_i], finest first, from its tower for boxes.
    """

    finest: Tensor
    class_maps: list[Tensor]
    box_maps: list[Tensor]


class MultiScaleDetector(nn.Module, WithEngine):
    """The network of `DetrForObjectDetection` if ``config.multi_scale`` is set.

    Args:
        config: the configuration; its ``multi_scale`` must not be None.

    Raises:
        ValueError: the architecture does not support a setting of the configuration.
    """

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        if config.multi_scale is None:
            raise ValueError("config.multi_scale is None: set it, or use DetrForObjectDetection")
        self.config, self.settings = config, config.multi_scale
        _check(config)
        self.backbone = Backbone(config)
        strides = self.backbone.conv_encoder.strides
        if any(coarse != 2 * fine for fine, coarse in itertools.pairwise(strides)):
            raise ValueError(
                f"multi_scale needs feature maps whose strides double from one to the next, got {strides}: choose "
                "other out_indices of the backbone, without dilation"
            )
        self.encoder = HybridEncoder(config, self.backbone.conv_encoder.channels)
        self.dense_head = DenseHead(config, self.settings.head_convolutions)
        self.decoder = RefiningDecoder(config)

    def reset_class_head(self) -> None:
        """Reinitialize all layers that predict classes, for training with other classes."""
        for module in (self.dense_head, *self.decoder.layers):
            module.reset_class_head()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Sequence[Mapping[str, Any]] | None = None,
        *,
        num_boxes: float | Tensor | None = None,
        image_weights: Tensor | None = None,
        mask_head: MultiScaleMaskHead | None = None,
    ) -> DetrObjectDetectionOutput | DetrSegmentationOutput:
        """Predict classes and boxes, and compute the loss if labels are given.

        Args:
            pixel_values, pixel_mask, labels, num_boxes, image_weights: see `DetrForObjectDetection.forward`.
            mask_head: the mask head of `DetrForSegmentation`; the output is then that of segmentation. In training with
                labels its ``pred_masks`` is None, because the loss computes only the masks of matched queries.

        Raises:
            ValueError: an argument or a label does not fit; the message says which.
        """
        grid, tokens, finest, logits, boxes, states = self.predict(pixel_values, pixel_mask)
        masks = None if mask_head is None else mask_head(finest, grid, states, boxes[-1])
        loss = loss_dict = auxiliary_outputs = None
        all_logits = softmax_logits(logits)
        if labels is not None:
            check_not_capturing("the loss", "call the model without labels")
            if self.config.auxiliary_loss:
                auxiliary_outputs = [
                    {"logits": c, "pred_boxes": b} for c, b in zip(all_logits[:-1], boxes[:-1], strict=True)
                ]
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                num_boxes, _ = average_normalizers(
                    labels, image_weights, self.config, num_boxes, 1.0, logits.device
                )
            loss, loss_dict = multi_scale_loss(
                tokens,
                grid,
                logits,
                boxes,
                labels,
                self.config,
                self.settings,
                num_boxes=num_boxes,
                image_weights=image_weights,
                masks=masks,
            )
        output: dict[str, Any] = {
            "loss": loss,
            "loss_dict": loss_dict,
            "logits": all_logits[-1],
            "pred_boxes": boxes[-1],
            "auxiliary_outputs": auxiliary_outputs,
            "last_hidden_state": states,
            "encoder_last_hidden_state": tokens.features,
        }
        if masks is None:
            return DetrObjectDetectionOutput(**output)
        pred_masks = None if self.training and labels is not None else masks.logits()
        return DetrSegmentationOutput(**output, pred_masks=pred_masks)

    def encode(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> EncodedMaps:
        """Run the backbone, the hybrid encoder and the towers of the dense head, on the engine if there is one."""
        encoded: EncodedMaps = self._run(self.compute_maps, pixel_values, pixel_mask)
        return encoded

    def compute_maps(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> EncodedMaps:
        """Run `encode` without the engine."""
        maps = self.backbone(pixel_values)
        grid = token_grid(pixel_values, pixel_mask, maps, self.backbone.conv_encoder.strides)
        encoded = self.encoder(maps, grid)
        return EncodedMaps(encoded[0], *self.dense_head.towers(encoded, grid))

    def predict(
        self, pixel_values: Tensor, pixel_mask: Tensor | None
    ) -> tuple[TokenGrid, DensePredictions, Tensor, Tensor, Tensor, Tensor]:
        """Run the network without loss and masks.

        Returns:
            The grid of the tokens, their predictions, the finest feature map of the encoder float [B, D, h, w], and
            logits float [L, B, Q, C], boxes float [L, B, Q, 4] and hidden states float [B, Q, D] of the decoder.
        """
        encoded = self.encode(pixel_values, pixel_mask)
        grid = token_grid(pixel_values, pixel_mask, encoded.class_maps, self.backbone.conv_encoder.strides)
        tokens = self.dense_head(encoded.class_maps, encoded.box_maps, grid)
        index, real = distinct_tokens(
            tokens.logits.detach(),
            tokens.boxes_cxcywh.detach(),
            grid,
            queries=self.config.num_queries,
            candidates=self.settings.candidates_per_query * self.config.num_queries,
            threshold=self.settings.nms_threshold,
        )
        features, logits, boxes = (
            each.gather(1, index[..., None].expand(-1, -1, each.shape[-1]))
            for each in (tokens.features, tokens.logits.detach(), tokens.boxes_cxcywh.detach())
        )
        # A query from padding or from a duplicate must not become a detection: it starts with a score near 0.
        logits = torch.where(real[..., None], logits, -16.0)
        # The tokens of the finest feature map are not part of the memory. They are the most numerous, and add the least
        # to the features of the queries.
        skipped = grid.shapes[0][0] * grid.shapes[0][1] if len(grid.shapes) > 1 else 0
        refined = self.decoder(
            features,
            logits,
            boxes,
            tokens.features[:, skipped:],
            token_positions(grid.centers_xy[:, skipped:], self.config.d_model),
            grid.valid[:, skipped:] if grid.padded else None,
        )
        return grid, tokens, encoded.finest, *refined


def _check(config: DetrConfig) -> None:
    """Raise ValueError if the architecture does not support a setting."""
    if config.d_model % 8:  # sine and cosine of the four coordinates of a box
        raise ValueError(f"multi_scale needs a d_model that is a multiple of 8, got {config.d_model}")
    if config.decoder_layers < 1:
        raise ValueError(
            "multi_scale needs at least one decoder layer, because only the decoder predicts a set of objects"
        )
    if config.output_attentions or config.output_hidden_states:
        raise ValueError("multi_scale supports neither output_attentions nor output_hidden_states")
    if config.position_embedding_type != "sine" or config.decoder_layerdrop:
        raise ValueError("multi_scale needs position_embedding_type 'sine' and decoder_layerdrop 0")
    if config.compat != "original":
        raise ValueError(
            "multi_scale needs compat='original', because transformers does not have this architecture"
        )
