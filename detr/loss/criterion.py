"""The set loss of DETR: matching, cross-entropy, L1 and GIoU, vectorized over decoder layers.

Nothing here communicates between processes: in distributed training, the caller passes the normalizers of the loss.

L decoder layers (1, or all with auxiliary losses), B batch, Q queries, C classes, M matches per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.boxes import box_cxcywh_to_xyxy, elementwise_generalized_iou
from detr.config import DetrConfig
from detr.loss.mask_loss import mask_losses
from detr.loss.matcher import Matching, MatchingCost, hungarian_matching
from detr.loss.targets import Labels, Targets, check_masks, gather_targets


def target_counts(
    labels: Labels, image_weights: Sequence[float] | Tensor | None, num_queries: int, eos_coefficient: float
) -> tuple[float, float]:
    """Compute the contributions of images to the two normalizers of the loss; only the labels are needed.

    The normalizers of a batch follow from the sums over all of its images, in whichever process they are:
    ``num_boxes = max(sum, 1)`` and ``class_weight_sum = sum``.

    Args:
        labels: one dict per image with ``class_labels`` [n].
        image_weights: float [B]; None means 1 each.
        num_queries: Q.
        eos_coefficient: class weight of "no object".

    Returns:
        ``num_boxes``, the weighted number of target boxes, and ``class_weight_sum``, the sum of the class weights in
        the cross-entropy: the sum over images of ``w (min(n, Q) + eos (Q - min(n, Q)))``.

    Raises:
        ValueError: the numbers of weights and labels differ.
    """
    if image_weights is None:
        weights = [1.0] * len(labels)
    else:
        weights = image_weights.tolist() if isinstance(image_weights, Tensor) else list(image_weights)
    if len(weights) != len(labels):
        raise ValueError(f"{len(weights)} image_weights for the labels of {len(labels)} images")
    num_boxes = class_weight_sum = 0.0
    for label, weight in zip(labels, weights, strict=True):
        n = len(label["class_labels"])
        matched = min(n, num_queries)
        num_boxes += weight * n
        class_weight_sum += weight * (matched + eos_coefficient * (num_queries - matched))
    return num_boxes, class_weight_sum


def set_loss(
    logits: Tensor,
    pred_boxes: Tensor,
    labels: Labels,
    config: DetrConfig,
    *,
    num_boxes: float | Tensor | None = None,
    class_weight_sum: float | Tensor | None = None,
    image_weights: Tensor | None = None,
    compute_masks: Callable[[Tensor, Tensor], Tensor] | None = None,
    groups: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of a batch, in float32 (float64 for float64 predictions), also under autocast.

    Args:
        logits: float [L, B, Q, C + 1], the last layer last.
        pred_boxes: float [L, B, Q, 4], cxcywh in 0..1.
        labels: one dict per image: ``class_labels`` int64 [n], ``boxes`` float [n, 4] cxcywh in 0..1.
        config: weights of costs and losses, number of classes.
        num_boxes: normalizer of ``loss_bbox``, ``loss_giou`` and the mask losses; default the number of target boxes in
            this batch, at least 1.
        class_weight_sum: normalizer of ``loss_ce``; default the sum of the class weights in this batch.
        image_weights: float [B], the weight of each image in every term; None means 1 each.
        compute_masks: for segmentation: a function from image and query, int64 [M] each, to the mask logits
            float [M, h, w]. The labels then need ``masks`` [n, H, W] too.
        groups: number K of query groups, each matched independently. The first dimension then has K times the layers of
            a group, one group after the other. The loss is the mean over the groups; the returned terms and the masks
            are those of the last group.

    Returns:
        The weighted sum, float [], and its terms, float [] each. ``loss_ce``, ``loss_bbox``, ``loss_giou`` and
        ``cardinality_error`` (not part of the sum) are those of the last layer; the suffix ``_i`` means layer i.
        ``loss_mask`` and ``loss_dice``, with ``compute_masks``, are those of the last layer.

    Raises:
        ValueError: a label is invalid; the message names the image.
    """
    with torch.autocast(device_type=logits.device.type, enabled=False):
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logits, pred_boxes = logits.to(dtype), pred_boxes.to(dtype)
        targets = gather_targets(labels, config.num_labels, logits.shape[1], logits.device, dtype)
        if compute_masks is not None:
            check_masks(labels)
        cost = MatchingCost(config.class_cost, config.bbox_cost, config.giou_cost)
        matching = hungarian_matching(logits, pred_boxes, targets, cost, labels)
        weights = weights_of_images(image_weights, logits)
        if num_boxes is None:
            num_boxes = weighted_sum(targets.counts, weights).clamp(min=1)
        if class_weight_sum is None:
            queries = logits.shape[2]
            matched = [min(n, queries) for n in targets.counts]
            per_image = [m + config.eos_coefficient * (queries - m) for m in matched]
            class_weight_sum = weighted_sum(per_image, weights)
            class_weight_sum = torch.where(class_weight_sum > 0, class_weight_sum, 1)
        terms = {
            "loss_ce": _loss_ce(logits, targets, matching, weights, config.eos_coefficient)
            / class_weight_sum,
            **{
                name: total / num_boxes
                for name, total in _loss_boxes(pred_boxes, targets, matching, weights).items()
            },
            "cardinality_error": _cardinality_error(logits, targets.counts, weights),
        }
        coefficients = {
            "loss_ce": 1.0,
            "loss_bbox": config.bbox_loss_coefficient,
            "loss_giou": config.giou_loss_coefficient,
        }
        loss = torch.stack([coefficients[name] * terms[name].sum() for name in coefficients]).sum() / groups
    last = logits.shape[0] - 1
    loss_dict = {name: values[last] for name, values in terms.items()}
    first = logits.shape[0] - logits.shape[0] // groups
    for layer in range(first, last):
        loss_dict.update({f"{name}_{layer - first}": values[layer] for name, values in terms.items()})
    if compute_masks is not None:
        query = matching.query[last] - matching.image * logits.shape[2]
        predicted = compute_masks(matching.image, query)
        with torch.autocast(device_type=logits.device.type, enabled=False):
            mask_terms = _loss_masks(predicted.to(dtype), labels, matching, weights / num_boxes)
        loss = loss + config.mask_loss_coefficient * mask_terms["loss_mask"]
        loss = loss + config.dice_loss_coefficient * mask_terms["loss_dice"]
        loss_dict.update(mask_terms)
    return loss, loss_dict


def weights_of_images(image_weights: Tensor | None, logits: Tensor) -> Tensor:
    """Return image weights, 1 by default, as float [B] with device and dtype of the logits [L, B, Q, C]."""
    batch = logits.shape[1]
    if image_weights is None:
        return logits.new_ones(batch)
    if image_weights.shape != (batch,):
        raise ValueError(f"image_weights must have shape [{batch}], got {list(image_weights.shape)}")
    return image_weights.to(logits.device, logits.dtype, non_blocking=True)


def weighted_sum(counts: Sequence[float], weights: Tensor) -> Tensor:
    """Compute the weighted sum, float [], of one number per image, with weights float [B]."""
    return (_copy_to_device(counts, weights) * weights).sum()


def _copy_to_device(counts: Sequence[float], like: Tensor) -> Tensor:
    """Create a tensor on the device of another without synchronization, unlike `torch.tensor(..., device=...)`."""
    return torch.tensor(counts, dtype=like.dtype).to(like.device, non_blocking=True)


def _loss_ce(logits: Tensor, targets: Targets, matching: Matching, weights: Tensor, eos: float) -> Tensor:
    """Compute the weighted sum of the cross-entropy, float [L]; the target of unmatched queries is "no object"."""
    layers, batch, queries, classes = logits.shape
    target_classes = torch.full(
        (layers, batch * queries), classes - 1, dtype=torch.int64, device=logits.device
    )
    target_classes = target_classes.scatter(1, matching.query, targets.class_ids[matching.target])
    class_weights = logits.new_ones(classes)
    class_weights[-1] = eos
    entropy = F.cross_entropy(logits.flatten(0, 2), target_classes.flatten(), class_weights, reduction="none")
    return (entropy.view(layers, batch, queries).sum(2) * weights).sum(1)


def _loss_boxes(
    pred_boxes: Tensor, targets: Targets, matching: Matching, weights: Tensor
) -> dict[str, Tensor]:
    """Compute the weighted sums of L1 distance and 1 - GIoU over the matches, float [L] each."""
    index = matching.query[..., None].expand(-1, -1, 4)
    predicted = pred_boxes.flatten(1, 2).gather(1, index)
    target_boxes = targets.boxes_cxcywh[matching.target]
    weight = weights[matching.image]
    distance = (predicted - target_boxes).abs().sum(-1)
    giou = elementwise_generalized_iou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(target_boxes))
    return {"loss_bbox": (distance * weight).sum(1), "loss_giou": ((1 - giou) * weight).sum(1)}


def _loss_masks(predicted: Tensor, labels: Labels, matching: Matching, weights: Tensor) -> dict[str, Tensor]:
    """Compute the weighted sums of the mask losses over the matches of the last layer, float [] each."""
    masks = [label["masks"] for label in labels]
    focal, dice = mask_losses(predicted, masks, matching.image, matching.target[-1])
    weight = weights[matching.image]
    return {"loss_mask": (focal * weight).sum(), "loss_dice": (dice * weight).sum()}


@torch.no_grad()
def _cardinality_error(logits: Tensor, counts: Sequence[int], weights: Tensor) -> Tensor:
    """Compute the mean over images of |predicted - target| number of objects, float [L]; for logging, not a loss."""
    predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(2)
    target = _copy_to_device(counts, weights)
    total = weights.sum()
    return ((predicted - target).abs() * weights).sum(1) / torch.where(total > 0, total, 1)
