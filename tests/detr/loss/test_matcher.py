import math

import numpy as np
import pytest
import torch
from transformers.loss.loss_for_object_detection import HungarianMatcher

from detr.loss.matcher import (
    Matching,
    MatchingCost,
    assign,
    hungarian_matching,
    matching_cost,
    replace_non_finite,
)
from detr.loss.targets import gather_targets

COST = MatchingCost(class_cost=1, bbox_cost=5, giou_cost=2)


def predictions(layers: int, batch: int, queries: int, seed: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(layers, batch, queries, 6, generator=generator, dtype=torch.float64)
    boxes = torch.rand(layers, batch, queries, 4, generator=generator, dtype=torch.float64)
    return logits.to(dtype), boxes.to(dtype)


def match(logits, boxes, labels, cost=COST) -> Matching:
    targets = gather_targets(labels, logits.shape[-1] - 1, logits.shape[1], logits.device, logits.dtype)
    return hungarian_matching(logits, boxes, targets, cost, labels)


def pairs(matching: Matching, layer: int, queries: int, counts: list[int]) -> list[list[tuple[int, int]]]:
    """Return the (query, object) pairs of one layer for each image."""
    offsets = np.concatenate(([0], np.cumsum(counts)))
    out: list[list[tuple[int, int]]] = [[] for _ in counts]
    for query, target, image in zip(
        matching.query[layer].tolist(), matching.target[layer].tolist(), matching.image.tolist(), strict=True
    ):
        assert query // queries == image
        out[image].append((query % queries, target - offsets[image]))
    return out


@pytest.mark.checklist("5. Loss", "matcher")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("objects", [(3, 5), (0, 4, 0), (12, 1), (30, 2), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_layer_is_matched_as_in_transformers(seed, objects, dtype, make_batch):
    labels = make_batch(sizes=((8, 8),) * len(objects), objects=objects, seed=seed, dtype=dtype).labels
    logits, boxes = predictions(3, len(objects), 12, seed, dtype)
    matching = match(logits, boxes, labels)
    theirs = HungarianMatcher(COST.class_cost, COST.bbox_cost, COST.giou_cost)
    for layer in range(3):
        expected = theirs({"logits": logits[layer], "pred_boxes": boxes[layer]}, labels)
        got = pairs(matching, layer, 12, list(objects))
        assert got == [list(zip(i.tolist(), j.tolist(), strict=True)) for i, j in expected]
        assert [len(of_image) for of_image in got] == [min(12, n) for n in objects]


def test_the_cost_matrix_is_that_of_the_paper(make_batch):
    labels = make_batch(objects=(2, 3), dtype=torch.float64).labels
    logits, boxes = predictions(1, 2, 4, 0)
    targets = gather_targets(labels, 5, 2, torch.device("cpu"), torch.float64)
    for cost in (MatchingCost(1, 0, 0), MatchingCost(0, 1, 0)):
        ours = iter(matching_cost(logits, boxes, targets, cost)[0])
        for image, label in enumerate(labels):
            for class_id, box in zip(label["class_labels"], label["boxes"], strict=True):
                for q, value in enumerate(next(ours)):
                    if cost.class_cost:
                        expected = -logits[0, image, q].softmax(0)[class_id]
                    else:
                        expected = (boxes[0, image, q] - box).abs().sum()
                    assert float(value) == pytest.approx(float(expected), abs=1e-14)


def test_a_batch_without_objects_has_no_matches():
    logits, boxes = predictions(2, 2, 4, 0)
    empty = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    matching = match(logits, boxes, [empty, empty])
    assert (matching.query.shape, matching.target.shape, matching.image.shape) == ((2, 0), (2, 0), (0,))


@pytest.mark.checklist("5. Loss", "matcher")
@pytest.mark.known_issue(3)
@pytest.mark.known_issue(5)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logits", "boxes"])
def test_non_finite_predictions_are_matched_last_and_never_raise(value, where, make_batch):
    labels = make_batch(objects=(3, 4), dtype=torch.float64).labels
    logits, boxes = predictions(2, 2, 6, 0)
    (logits if where == "logits" else boxes)[:, 0, :3] = value
    matching = match(logits, boxes, labels)
    for layer in range(2):
        assert {q for q, _ in pairs(matching, layer, 6, [3, 4])[0]} == {3, 4, 5}
    expected = match(logits[:, 1:], boxes[:, 1:], labels[1:])
    assert pairs(matching, 1, 6, [3, 4])[1] == pairs(expected, 1, 6, [4])[0]


def test_with_too_few_finite_predictions_these_are_still_matched_at_minimum_cost():
    cost = np.array([[1.0, 9.0, 5.0], [9.0, 1.0, 5.0], [np.nan, np.inf, np.nan]])
    query, target = assign(np.stack((cost.T, cost.T)), [3])
    assert dict(zip(query[0], target[0], strict=True)) == {0: 0, 1: 1, 2: 2}
    replaced = replace_non_finite(cost)
    assert np.isfinite(replaced).all()
    assert replaced[2].min() > 27  # more than any assignment of finite costs


def test_non_finite_predictions_are_matched_if_no_other_exists():
    query, _ = assign(np.full((1, 2, 4), np.nan), [2])
    assert len(set(query[0])) == 2


@pytest.mark.checklist("5. Loss", "all costs 0")
def test_costs_that_are_all_zero_are_rejected():
    with pytest.raises(ValueError, match="All costs of the Matcher can't be 0"):
        MatchingCost(0, 0, 0)


def test_invalid_labels_on_a_device_raise_an_error_in_the_matching(make_batch):
    labels = make_batch(objects=(2, 2)).labels
    logits, boxes = predictions(1, 2, 4, 0, torch.float32)
    targets = gather_targets(labels, 5, 2, torch.device("cpu"), torch.float32)
    labels[1]["boxes"][1] = torch.tensor([10.0, 10.0, 30.0, 30.0])
    faults = torch.tensor([False, False, False, True])
    on_device = type(targets)(targets.class_ids, targets.boxes_cxcywh, targets.counts, faults)
    with pytest.raises(ValueError, match="object 1 of image 1"):
        hungarian_matching(logits, boxes, on_device, COST, labels)
    valid = type(targets)(targets.class_ids, targets.boxes_cxcywh, targets.counts, faults & False)
    expected = hungarian_matching(logits, boxes, targets, COST)
    assert torch.equal(hungarian_matching(logits, boxes, valid, COST, labels).query, expected.query)
