"""Suppression of duplicates, compared with torchvision, and selection of tokens."""

import pytest
import torch
from torchvision.ops import batched_nms

from detr.boxes import box_cxcywh_to_xyxy
from detr.model.multiscale.selection import distinct_tokens, suppress_duplicates
from detr.model.multiscale.tokens import token_grid


def random_boxes(seed, images=3, boxes=300):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(images, boxes, 2, generator=generator)
    sizes = 0.1 + 0.4 * torch.rand(images, boxes, 2, generator=generator)
    classes = torch.randint(3, (images, boxes), generator=generator)
    return box_cxcywh_to_xyxy(torch.cat((centers, sizes), -1)), classes


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7])
def test_suppression_keeps_what_torchvision_keeps(threshold):
    boxes, classes = random_boxes(seed=int(10 * threshold))
    kept = suppress_duplicates(boxes, classes, threshold)
    scores = torch.arange(boxes.shape[1], 0, -1).float()
    for image_boxes, image_classes, got in zip(boxes, classes, kept, strict=True):
        expected = torch.zeros_like(got)
        expected[batched_nms(image_boxes, scores, image_classes, threshold)] = True
        assert torch.equal(got, expected)
        assert 0 < int(got.sum()) < len(got)


def test_kept_boxes_never_overlap_even_in_a_chain_longer_than_the_rounds():
    left = torch.arange(200)[:, None] * 0.3
    chain = torch.cat((left, torch.zeros_like(left), left + 1, torch.ones_like(left)), 1)
    kept = suppress_duplicates(chain[None], torch.zeros(1, 200, dtype=torch.int64), 0.5)[0]
    greedy = torch.zeros(200, dtype=torch.bool)
    greedy[batched_nms(chain, torch.arange(200.0, 0, -1), torch.zeros(200), 0.5)] = True
    assert kept.sum() > 10
    assert not (kept & ~greedy).any()


def make_tokens(seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 4, 4)]
    mask = torch.ones(2, 64, 64)
    mask[1, 40:] = 0
    grid = token_grid(torch.zeros(2, 3, 64, 64), mask, maps, (8, 16))
    logits = torch.randn(2, 80, 3, generator=generator)
    boxes = torch.cat((grid.centers_xy, 2 * grid.sizes_wh), -1)
    return logits, boxes, grid


def test_queries_are_distinct_real_tokens_and_the_best_comes_first():
    logits, boxes, grid = make_tokens()
    index, real = distinct_tokens(logits, boxes, grid, queries=10, candidates=40, threshold=0.5)
    assert real.all()
    assert grid.valid.gather(1, index).all()
    best = logits.amax(-1).masked_fill(~grid.valid, -torch.inf).argmax(1)
    assert torch.equal(index[:, 0], best)
    for image_boxes, chosen in zip(boxes, index, strict=True):
        assert len(chosen.unique()) == 10
        corners = box_cxcywh_to_xyxy(image_boxes[chosen])
        kept = batched_nms(corners, torch.arange(10.0, 0, -1), logits.max(-1).indices[0][chosen], 0.999)
        assert len(kept) == 10


def test_an_image_with_fewer_tokens_than_queries_repeats_tokens_marked_as_not_real():
    logits, boxes, grid = make_tokens()
    index, real = distinct_tokens(logits, boxes, grid, queries=100, candidates=120, threshold=1.0)
    assert real.sum(1).tolist() == grid.valid.sum(1).tolist()
    for chosen, is_real, valid in zip(index, real, grid.valid, strict=True):
        assert torch.equal(chosen[is_real].sort().values, valid.nonzero()[:, 0])


@pytest.mark.parametrize("threshold", [0.1, 0.3])
def test_suppressed_tokens_that_fill_places_of_queries_are_not_real(threshold):
    logits, boxes, grid = make_tokens()
    index, real = distinct_tokens(logits, boxes, grid, queries=75, candidates=80, threshold=threshold)
    for number, (chosen, is_real) in enumerate(zip(index, real, strict=True)):
        best = logits[number].max(-1)
        corners = box_cxcywh_to_xyxy(boxes[number][chosen])
        kept = batched_nms(
            corners[is_real], best.values[chosen][is_real], best.indices[chosen][is_real], threshold
        )
        assert 0 < is_real.sum() == len(kept) < 75


def test_coordinates_of_tokens_are_relative_to_the_image_without_padding():
    _, _, grid = make_tokens()
    torch.testing.assert_close(grid.centers_xy[0, 9], torch.tensor([12 / 64, 12 / 64]))
    torch.testing.assert_close(grid.centers_xy[1, 9], torch.tensor([12 / 64, 12 / 40]))
    torch.testing.assert_close(grid.sizes_wh[1, 64], torch.tensor([16 / 64, 16 / 40]))
    assert grid.valid[1, :64].view(8, 8)[:, 0].tolist() == [True] * 5 + [False] * 3
