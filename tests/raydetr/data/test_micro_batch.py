"""A micro-batch comes out of a row as it went in."""

import numpy as np
import pytest
import torch

from raydetr.data.micro_batch import Example, TrainingBatch, pack, unpack
from raydetr.data.plan import MicroBatch


def example(rng: np.random.Generator, image_id: int, height: int, width: int, objects: int) -> Example:
    return Example(
        image_id,
        torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8)),
        rng.random((objects, 4)).astype(np.float32),
        rng.integers(0, 5, objects),
    )


def through(
    examples: list[Example],
    shape: tuple[int, int],
    size: int,
    step: int = 0,
    position: int = 0,
    epoch: int = 0,
) -> TrainingBatch:
    (batch,) = unpack(pack([(MicroBatch(step, position, epoch, 0, (), shape), examples)], size), size)
    return batch


@pytest.mark.parametrize("seed", range(3))
def test_pixels_boxes_and_labels_survive(seed: int) -> None:
    rng = np.random.default_rng(seed)
    examples = [example(rng, 10 + i, *rng.integers(1, 64, 2), objects) for i, objects in enumerate((3, 0, 5))]
    batch = through(examples, (64, 96), 4, step=7, position=2, epoch=1)
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
    batch = through([Example(5, None, *nothing, skipped="cut short"), good], (8, 8), 2)
    assert batch.skipped == ("5: cut short",)
    assert batch.weights.tolist() == [0, 1]
    assert batch.image_ids == (5, 1)
    assert batch.labels[0]["boxes"].shape == (0, 4)
    assert batch.labels[1]["boxes"].shape == (2, 4)


def test_a_filler_is_small_in_the_row_and_full_sized_on_the_worker() -> None:
    row = pack([(MicroBatch(3, 4, 0, -1, (), (64, 96)), [])], 4)
    assert row.nbytes < 1000
    (batch,) = unpack(row, 4)
    assert batch.pixels.shape == (4, 3, 64, 96)
    assert batch.weights.tolist() == [0] * 4
    assert batch.pixel_mask().all()
    assert [len(label["boxes"]) for label in batch.labels] == [0] * 4


def test_micro_batches_of_different_shapes_share_a_row_without_mixing() -> None:
    rng = np.random.default_rng(0)
    packed = [
        (MicroBatch(0, 0, 0, 0, (), (32, 64)), [example(rng, 1, 32, 50, 2), example(rng, 2, 20, 64, 1)]),
        (MicroBatch(0, 2, 0, -1, (), (32, 64)), []),
        (MicroBatch(1, 0, 0, 0, (), (64, 32)), [example(rng, 3, 60, 32, 0)]),
    ]
    batches = list(unpack(pack(packed, 2), 2))
    assert [(batch.step, batch.position, batch.image_ids) for batch in batches] == [
        (0, 0, (1, 2)),
        (0, 2, ()),
        (1, 0, (3,)),
    ]
    for (_, examples), batch in zip(packed, batches, strict=True):
        alone = through(examples, batch.pixels.shape[-2:], 2)
        assert torch.equal(batch.pixels, alone.pixels)
        for together, apart in zip(batch.labels, alone.labels, strict=True):
            assert torch.equal(together["boxes"], apart["boxes"])


def test_pixels_are_interleaved_and_not_copied() -> None:
    row = pack([(MicroBatch(0, 0, 0, 0, (), (32, 32)), [example(np.random.default_rng(0), 1, 32, 32, 0)])], 1)
    (batch,) = unpack(row, 1)
    assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
    values = row["micro_batches"].chunks[0].values.field("pixels").buffers()[2]
    assert values.address <= batch.pixels.data_ptr() < values.address + values.size
