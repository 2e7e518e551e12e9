"""A micro-batch comes out of a row as it went in."""

import numpy as np
import pytest
import torch

from raydetr.data.micro_batch import Example, pack, unpack


def example(rng: np.random.Generator, image_id: int, height: int, width: int, objects: int) -> Example:
    return Example(
        image_id,
        torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8)),
        rng.random((objects, 4)).astype(np.float32),
        rng.integers(0, 5, objects),
    )


@pytest.mark.parametrize("seed", range(3))
def test_pixels_boxes_and_labels_survive(seed: int) -> None:
    rng = np.random.default_rng(seed)
    examples = [example(rng, 10 + i, *rng.integers(1, 64, 2), objects) for i, objects in enumerate((3, 0, 5))]
    batch = unpack(pack(7, 2, 1, (64, 96), 4, examples), 4)
    assert (batch.step, batch.position, batch.epoch) == (7, 2, 1)
    assert batch.image_ids == (10, 11, 12)
    assert batch.weights.tolist() == [1, 1, 1, 0]
    mask = batch.pixel_mask()
    for slot, one in enumerate(examples):
        _, height, width = one.pixels.shape
        assert torch.equal(batch.pixels[slot, :, :height, :width], one.pixels)
        assert batch.pixels[slot].sum() == one.pixels.sum()
        assert mask[slot].sum() == height * width
        assert mask[slot, :height, :width].all()
        assert torch.equal(batch.labels[slot]["boxes"], torch.from_numpy(one.boxes))
        assert batch.labels[slot]["class_labels"].tolist() == one.class_labels.tolist()
        assert batch.labels[slot]["image_id"].tolist() == [one.image_id]


def test_an_undecodable_image_is_named_and_weighs_nothing() -> None:
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    good = example(np.random.default_rng(0), 1, 8, 8, 2)
    batch = unpack(pack(0, 0, 0, (8, 8), 2, [Example(5, None, *nothing, skipped="cut short"), good]), 2)
    assert batch.skipped == ("5: cut short",)
    assert batch.weights.tolist() == [0, 1]
    assert batch.image_ids == (5, 1)
    assert batch.labels[0]["boxes"].shape == (0, 4)
    assert batch.labels[1]["boxes"].shape == (2, 4)


def test_a_filler_is_small_in_the_row_and_full_sized_on_the_worker() -> None:
    row = pack(3, 4, 0, (64, 96), 4, [])
    assert row.nbytes < 1000
    batch = unpack(row, 4)
    assert batch.pixels.shape == (4, 3, 64, 96)
    assert batch.weights.tolist() == [0] * 4
    assert batch.pixel_mask().all()
    assert [len(label["boxes"]) for label in batch.labels] == [0] * 4
