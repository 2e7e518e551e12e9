"""Losses of the multi-scale architecture: dense losses of the tokens, and the set loss of each decoder layer.

All sums have the same normalizer, the number of boxes, so W workers that share it compute the gradient of one process.
Scores are trained with the varifocal loss (https://arxiv.org/abs/2008.13367). Its target for the score of an object is
the IoU of the predicted box, so that better boxes rank higher.

B batch, S tokens, Q queries, C classes, L decoder layers, M matches per layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.boxes import box_cxcywh_to_xyxy, elementwise_generalized_iou, elementwise_iou
from detr.config import DetrConfig
from detr.loss.criterion import weighted_sum, weights_of_images
from detr.loss.dense_assignment import PaddedTargets, assign_tokens, pad_targets
from detr.loss.matcher import Matching, MatchingCost, hungarian_matching
from detr.loss.multiscale_mask_loss import mask_terms
from detr.loss.targets import Labels, Targets, gather_targets
from detr.model.multiscale.dense_head import DensePredictions
from detr.model.multiscale.masks import DynamicMasks
from detr.model.multiscale.scores import softmax_logits
from detr.model.multiscale.tokens import TokenGrid
from detr.multiscale_config import MultiScaleConfig

_NEGATIVE_WEIGHT = 0.75
"""The alpha of varifocal loss: weight of negatives."""

_MIN_QUALITY = 0.05
"""Minimum weight of the box of an assigned token: in the first steps all qualities are small."""

_MIN_TARGET = 0.01
"""Minimum target score of a matched query, because no other query is trained to detect the object."""


def varifocal_loss(logits: Tensor, quality: Tensor) -> Tensor:
    """Compute the varifocal loss of each score.

    The weight of positives is their target. The weight of negatives (target 0) is 0.75 times their squared score.

    Args:
        logits: float [...].
        quality: float [...] in 0..1, the target scores.

    Returns:
        float [...].
    """
    score = logits.detach().sigmoid()
    weight = torch.where(quality > 0, quality, _NEGATIVE_WEIGHT * score.square())
    return F.binary_cross_entropy_with_logits(logits, quality, reduction="none") * weight


def multi_scale_loss(
    tokens: DensePredictions,
    grid: TokenGrid,
    logits: Tensor,
    boxes_cxcywh: Tensor,
    labels: Labels,
    config: DetrConfig,
    settings: MultiScaleConfig,
    *,
    num_boxes: float | Tensor | None = None,
    image_weights: Tensor | None = None,
    masks: DynamicMasks | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of a batch, in float32 (float64 for float64 predictions), also under autocast.

    Args:
        tokens: predictions of the dense head.
        grid: grid of its tokens.
        logits: float [L, B, Q, C], before the sigmoid, the last layer last.
        boxes_cxcywh: float [L, B, Q, 4] in 0..1.
        labels: one dict per image, as for `detr.loss.criterion.set_loss`.
        config: number of classes, weights of costs and losses.
        settings: settings of the dense losses.
        num_boxes: normalizer of every sum; default the number of target boxes in this batch, at least 1.
        image_weights: float [B], the weight of each image in every term; None means 1 each.
        masks: for segmentation: masks of the queries of the last layer. Labels then also need ``masks`` [n, H_i, W_i].

    Returns:
        The weighted sum, float [], and its terms, float [] each. ``loss_ce``, ``loss_bbox`` and ``loss_giou`` are those
        of the last layer; the suffix ``_i`` means layer i. ``loss_dense_ce``, ``loss_dense_bbox`` and
        ``loss_dense_giou`` are those of the tokens. ``loss_mask`` and ``loss_dice`` are those of ``masks``.

    Raises:
        ValueError: a label is invalid; the message names the image.
    """
    with torch.autocast(device_type=logits.device.type, enabled=False):
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logits, boxes_cxcywh = logits.to(dtype), boxes_cxcywh.to(dtype)
        tokens = DensePredictions(tokens.logits.to(dtype), tokens.boxes_cxcywh.to(dtype), tokens.features)
        targets = gather_targets(labels, config.num_labels, logits.shape[1], logits.device, dtype)
        weights = weights_of_images(image_weights, logits)
        if num_boxes is None:
            num_boxes = weighted_sum(targets.counts, weights).clamp(min=1)
        cost = MatchingCost(config.class_cost, config.bbox_cost, config.giou_cost)
        matching = hungarian_matching(softmax_logits(logits.detach()), boxes_cxcywh, targets, cost, labels)
        padded = pad_targets(targets)
        layer_terms = _set_terms(logits, boxes_cxcywh, targets, matching, weights)
        token_terms = _dense_terms(tokens, grid, padded, settings, weights)
        coefficients = (1.0, config.bbox_loss_coefficient, config.giou_loss_coefficient)
        loss = torch.zeros((), dtype=dtype, device=logits.device)
        terms: dict[str, Tensor] = {}
        last = len(logits) - 1
        for coefficient, name in zip(coefficients, ("ce", "bbox", "giou"), strict=True):
            per_layer, dense = layer_terms[name] / num_boxes, token_terms[name] / num_boxes
            loss = loss + coefficient * (per_layer.sum() + settings.dense_loss_coefficient * dense)
            terms[f"loss_{name}"], terms[f"loss_dense_{name}"] = per_layer[last], dense
            terms |= {f"loss_{name}_{layer}": per_layer[layer] for layer in range(last)}
        if masks is not None:
            mask_sums = mask_terms(masks, grid, labels, targets, padded, matching, weights)
            terms |= {name: total / num_boxes for name, total in mask_sums.items()}
            loss = loss + config.mask_loss_coefficient * terms["loss_mask"]
            loss = loss + config.dice_loss_coefficient * terms["loss_dice"]
    return loss, terms


def _set_terms(
    logits: Tensor, boxes: Tensor, targets: Targets, matching: Matching, weights: Tensor
) -> dict[str, Tensor]:
    """Compute the weighted sums of the terms of each layer over its matches, float [L] each."""
    predicted = boxes.flatten(1, 2).gather(1, matching.query[..., None].expand(-1, -1, 4))
    target_boxes = targets.boxes_cxcywh[matching.target]
    distance, overlap, giou = _box_distances(predicted, target_boxes)
    layers, _, _, classes = logits.shape
    quality = logits.new_zeros(layers, logits[0].numel())
    matched = matching.query * classes + targets.class_ids[matching.target]
    quality = quality.scatter(1, matched, overlap.detach().clamp(min=_MIN_TARGET)).view_as(logits)
    weight = weights[matching.image]
    return {
        "ce": (varifocal_loss(logits, quality).sum((2, 3)) * weights).sum(1),
        "bbox": (distance * weight).sum(1),
        "giou": ((1 - giou) * weight).sum(1),
    }


def _dense_terms(
    tokens: DensePredictions,
    grid: TokenGrid,
    padded: PaddedTargets,
    settings: MultiScaleConfig,
    weights: Tensor,
) -> dict[str, Tensor]:
    """Compute the weighted sums of the terms of the tokens, float [] each.

    The box losses of an object are averaged over its tokens, weighted by their quality. Objects thus have the same
    weight, however many tokens they have.
    """
    assigned = assign_tokens(tokens, padded, grid, settings)
    target_boxes = padded.boxes_cxcywh.gather(1, assigned.target[..., None].expand(-1, -1, 4))
    distance, _, giou = _box_distances(tokens.boxes_cxcywh, target_boxes)
    share = torch.where(assigned.quality > 0, assigned.quality.clamp(min=_MIN_QUALITY), 0)
    object_sum = torch.zeros_like(padded.boxes_cxcywh[..., 0]).scatter_add(1, assigned.target, share)
    share = share / object_sum.clamp(min=_MIN_QUALITY).gather(1, assigned.target)
    share = share * weights[:, None]
    class_id = padded.class_ids.gather(1, assigned.target)[..., None]
    quality = torch.zeros_like(tokens.logits).scatter(2, class_id, assigned.quality[..., None])
    entropy = varifocal_loss(tokens.logits, quality).sum(2).masked_fill(~grid.valid, 0)
    return {
        "ce": (entropy.sum(1) * weights).sum(),
        "bbox": (distance * share).sum(),
        "giou": ((1 - giou) * share).sum(),
    }


def _box_distances(boxes1_cxcywh: Tensor, boxes2_cxcywh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute L1 distance, IoU and generalized IoU of pairs of boxes float [..., 4], float [...] each."""
    distance = (boxes1_cxcywh - boxes2_cxcywh).abs().sum(-1)
    corners = box_cxcywh_to_xyxy(boxes1_cxcywh), box_cxcywh_to_xyxy(boxes2_cxcywh)
    return distance, elementwise_iou(*corners)[0], elementwise_generalized_iou(*corners)
