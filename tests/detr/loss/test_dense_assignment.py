"""Task-aligned assignment, compared with a loop over images and objects."""

import pytest
import torch

from detr.boxes import box_cxcywh_to_xyxy, box_iou
from detr.loss.dense_assignment import assign_tokens, pad_targets
from detr.loss.targets import gather_targets
from detr.model.multiscale.dense_head import DensePredictions
from detr.model.multiscale.tokens import token_grid
from detr.multiscale_config import MultiScaleConfig


def assign_by_loop(logits, boxes, centers, sizes, valid, labels, settings):
    """Assign the objects of one image; return the object of every token or -1, and its quality."""
    alignments, qualities = [], []
    for class_id, box in zip(labels["class_labels"], labels["boxes"], strict=True):
        iou = box_iou(box_cxcywh_to_xyxy(box[None]), box_cxcywh_to_xyxy(boxes))[0][0]
        score = logits[:, class_id].sigmoid().clamp(min=1e-6)
        alignment = score**settings.score_exponent * iou.clamp(min=1e-4) ** settings.iou_exponent
        chosen = []
        for token in alignment.argsort(descending=True).tolist():
            distance = (centers[token] - box[:2]).abs()
            inside = bool((distance < box[2:] / 2).all()) or bool((distance < sizes[token]).all())
            if valid[token] and inside and len(chosen) < settings.assigned_tokens:
                chosen.append(token)
        aligned, quality = torch.full((len(boxes),), -1.0).double(), torch.zeros(len(boxes)).double()
        if chosen:
            aligned[chosen] = alignment[chosen] / alignment[chosen].max() * iou[chosen].max()
            quality[chosen] = aligned[chosen]
            alignments.append(torch.where(aligned >= 0, alignment, -1.0))
        else:
            alignments.append(aligned)
        qualities.append(quality)
    target, quality = torch.full((len(boxes),), -1), torch.zeros(len(boxes)).double()
    for token in range(len(boxes)):
        if alignments:
            best = max(range(len(alignments)), key=lambda i: float(alignments[i][token]))
            if alignments[best][token] >= 0:
                target[token], quality[token] = best, qualities[best][token]
    return target, quality


@pytest.mark.parametrize("objects", [(4, 0, 9), (0, 0, 0), (1, 30, 2)])
def test_the_assignment_of_a_batch_equals_a_loop_over_its_images(objects, make_batch):
    batch = make_batch(((64, 96), (40, 96), (64, 30)), objects, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    maps = [torch.zeros(3, 1, 64 // s, 96 // s) for s in (4, 8, 16)]
    grid = token_grid(batch.pixel_values, batch.pixel_mask, maps, (4, 8, 16))
    count = grid.centers_xy.shape[1]
    logits = torch.randn(3, count, 5, generator=generator, dtype=torch.float64)
    spread = torch.randn(3, count, 4, generator=generator, dtype=torch.float64)
    boxes = torch.cat(
        (grid.centers_xy + grid.sizes_wh * spread[..., :2], 4 * grid.sizes_wh * spread[..., 2:].exp()), -1
    )
    settings = MultiScaleConfig(assigned_tokens=5)
    targets = pad_targets(gather_targets(batch.labels, 5, 3, torch.device("cpu"), torch.float64))
    assert targets.real.sum(1).tolist() == list(objects)
    got = assign_tokens(DensePredictions(logits, boxes, logits), targets, grid, settings)
    assigned = 0
    for i, labels in enumerate(batch.labels):
        target, quality = assign_by_loop(
            logits[i], boxes[i], grid.centers_xy[i], grid.sizes_wh[i], grid.valid[i], labels, settings
        )
        torch.testing.assert_close(got.quality[i], quality)
        positive = quality > 0
        assert torch.equal(got.target[i][positive], target[positive])
        assigned += int(positive.sum())
    assert bool(assigned) == any(objects)


def test_even_the_smallest_object_is_assigned_to_a_token():
    grid = token_grid(torch.zeros(1, 3, 64, 64), None, [torch.zeros(1, 1, 4, 4)], (16,))
    boxes = torch.cat((grid.centers_xy, 2 * grid.sizes_wh), -1)
    labels = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.26, 0.26, 0.001, 0.001]])}]
    targets = pad_targets(gather_targets(labels, 1, 1, torch.device("cpu"), torch.float32))
    assignment = assign_tokens(
        DensePredictions(torch.zeros(1, 16, 1), boxes, boxes), targets, grid, MultiScaleConfig()
    )
    assert int((assignment.quality > 0).sum()) >= 1
