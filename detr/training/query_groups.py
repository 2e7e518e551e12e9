"""Group DETR: several groups of object queries in training, one at inference (https://arxiv.org/abs/2207.13085).

Each target is matched to one query of every group, so heads and decoder learn from K matches per object in place of
one. Groups do not attend to each other, so their queries do not compete for objects. They share all weights except the
position embeddings of their queries. After training, the plain model remains.

B batch, Q queries of a group, K groups, D ``d_model``, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from detr.loss.criterion import target_counts
from detr.loss.normalizers import average_normalizers
from detr.model.detection import DetrForObjectDetection, hidden_outputs
from detr.model.outputs import DetrModelOutput, DetrObjectDetectionOutput, DetrSegmentationOutput
from detr.model.segmentation import DetrForSegmentation
from detr.training.dense_supervision import encoder_token_losses


class QueryGroups(nn.Module):
    """Wrap a model to train it with additional query groups; in evaluation mode the wrapper calls the model.

    The model itself is not changed: save, evaluate and serve it as it is. The additional parameters are those outside
    of ``model``; see `training_state`.

    Args:
        model: `DetrForObjectDetection` or `DetrForSegmentation`; only group 0 predicts masks.
        groups: K, at least 1; 1 is the plain model.
        dense_loss_weight: weight of the losses of the encoder tokens, see `detr.training.dense_supervision`; 0 disables
            them.

    Attributes:
        model: the model; its own queries are group 0.
        extra_queries: float [K - 1, Q, D], the position embeddings of the other groups; None if K is 1.

    Raises:
        ValueError: ``groups`` is less than 1.
    """

    def __init__(
        self, model: DetrForObjectDetection | DetrForSegmentation, groups: int, dense_loss_weight: float = 0.0
    ) -> None:
        super().__init__()
        if groups < 1:
            raise ValueError(f"groups is {groups}, but must be at least 1: the model's own queries")
        self.model = model
        self.groups = groups
        self.extra_queries: nn.Parameter | None = None
        if groups > 1:
            own = self.detector.model.query_position_embeddings.weight.detach()
            # Same distribution as the model's own queries, which may already be trained.
            mean, spread = own.mean(0), own.std(0, correction=0)
            self.extra_queries = nn.Parameter(mean + spread * own.new_empty(groups - 1, *own.shape).normal_())

        self.dense_loss_weight = dense_loss_weight

    @property
    def detector(self) -> DetrForObjectDetection:
        """The model, or the detector inside a `DetrForSegmentation`."""
        return self.model.detr if isinstance(self.model, DetrForSegmentation) else self.model

    def training_state(self) -> dict[str, Tensor]:
        """Return the tensors, by name, that a checkpoint needs in addition to the model to resume training."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `training_state` returned.

        Raises:
            ValueError: the state is that of a different number of groups or queries.
        """
        own = self.training_state()
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        expected = {name: tuple(value.shape) for name, value in own.items()}
        if shapes != expected:
            raise ValueError(f"the state contains {shapes}, but {self.groups} query groups need {expected}")
        self.load_state_dict(dict(state), strict=False)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Sequence[Mapping[str, Any]] | None = None,
        *,
        num_boxes: float | Tensor | None = None,
        class_weight_sum: float | Tensor | None = None,
        image_weights: Tensor | None = None,
    ) -> DetrObjectDetectionOutput | DetrSegmentationOutput:
        """Run the model; arguments and output are those of its ``forward``.

        In training mode, the loss is the mean over the groups plus the loss of the encoder tokens. All other fields are
        those of group 0, and equal the output of the model alone (up to the random numbers of dropout). The terms
        ``loss_cells_...`` of the encoder tokens are added to ``loss_dict``.
        """
        given: dict[str, Any] = {
            "num_boxes": num_boxes,
            "class_weight_sum": class_weight_sum,
            "image_weights": image_weights,
        }
        if not self.training or (self.extra_queries is None and not self.dense_loss_weight):
            plain: DetrObjectDetectionOutput | DetrSegmentationOutput = self.model(
                pixel_values, pixel_mask, labels=labels, return_dict=True, **given
            )
            return plain
        features, outputs = self.detector.model.states(
            pixel_values, pixel_mask, extra_queries=self.extra_queries
        )
        outputs = _stack_groups_as_layers(outputs, self.groups)
        if labels is not None:
            given |= self._normalizers(labels, features.cells.device, **given)
        output: DetrObjectDetectionOutput | DetrSegmentationOutput
        if isinstance(self.model, DetrForSegmentation):
            output = self.model.segment(features, outputs, labels, **given, groups=self.groups)
        else:
            detected = self.model.detect(outputs, labels, **given, groups=self.groups)
            output = DetrObjectDetectionOutput(**detected, **hidden_outputs(outputs))
        if self.dense_loss_weight and labels is not None:
            assert outputs.encoder_last_hidden_state is not None
            assert output.loss is not None
            assert output.loss_dict is not None
            predicted = self.detector.predict(outputs.encoder_last_hidden_state)
            terms = encoder_token_losses(*predicted, features.valid_mask, labels, self.model.config, **given)
            config = self.model.config
            loss = (
                terms["loss_cells_ce"]
                + config.bbox_loss_coefficient * terms["loss_cells_bbox"]
                + config.giou_loss_coefficient * terms["loss_cells_giou"]
            )
            output.loss = output.loss + self.dense_loss_weight * loss
            output.loss_dict |= terms
        return output

    def _normalizers(
        self,
        labels: Sequence[Mapping[str, Any]],
        device: torch.device,
        num_boxes: float | Tensor | None,
        class_weight_sum: float | Tensor | None,
        image_weights: Tensor | None,
    ) -> dict[str, float | Tensor]:
        """Return the normalizers of the loss; those that are None are computed as in the model."""
        config = self.model.config
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            num_boxes, class_weight_sum = average_normalizers(
                labels, image_weights, config, num_boxes, class_weight_sum, device
            )
        boxes, weight_sum = target_counts(labels, image_weights, config.num_queries, config.eos_coefficient)
        return {
            "num_boxes": max(boxes, 1.0) if num_boxes is None else num_boxes,
            "class_weight_sum": (weight_sum or 1.0) if class_weight_sum is None else class_weight_sum,
        }


def _stack_groups_as_layers(outputs: DetrModelOutput, groups: int) -> DetrModelOutput:
    """Reshape a decoder output [B, K * Q, D] to [B, Q, D] with K times as many layers, those of group 0 last."""
    assert outputs.last_hidden_state is not None
    layers = outputs.last_hidden_state[None]
    if outputs.intermediate_hidden_states is not None:
        # The input of the heads is the last hidden state. With compat="transformers" it is normalized once more than
        # the last intermediate state, which is therefore replaced.
        layers = torch.cat((outputs.intermediate_hidden_states[:-1], layers))
    # [L, B, K * Q, D] to [K * L, B, Q, D]
    layers = layers.unflatten(2, (groups, -1)).movedim(2, 0).flatten(0, 1)
    states = outputs.decoder_hidden_states
    queries = layers.shape[2]
    return replace(
        outputs,
        last_hidden_state=layers[-1],
        intermediate_hidden_states=layers,
        decoder_hidden_states=None if states is None else tuple(state[:, -queries:] for state in states),
        decoder_attentions=None,
        cross_attentions=None,
    )
