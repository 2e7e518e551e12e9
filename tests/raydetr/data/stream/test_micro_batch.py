"""Micro-batches survive packing into rows and unpacking."""

import numpy as np
import pytest
import torch

from raydetr.data.stream.micro_batch import Example, TrainingBatch, pack, unpack
from raydetr.data.stream.plan import MicroBatch


def example(rng: np.random.Generator, image_id: int, height: int, width: int, objects: int) -> Example:
    return Example(
        image_id,
        torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8)),
        rng.random((objects, 4)).astype(np.float32),
        rng.integers(0, 5, objects),
    )


def pack_and_unpack(
    examples: list[Example],
    shape: tuple[int, int],
    size: int,
    step: int = 0,
    position: int = 0,
    epoch: int = 0,
) -> TrainingBatch:
    (batch,) = unpack(pack([(MicroBatch(step, position, epoch, 0, (), shape), examples)]), size)
    return batch


@pytest.mark.parametrize("seed", range(3))
def test_pixels_boxes_and_labels_are_unchanged(seed: int) -> None:
    rng = np.random.default_rng(seed)
    examples = [example(rng, 10 + i, *rng.integers(1, 64, 2), objects) for i, objects in enumerate((3, 0, 5))]
    batch = pack_and_unpack(examples, (64, 96), 4, step=7, position=2, epoch=1)
    assert (batch.step, batch.position, batch.epoch) == (7, 2, 1)
    assert batch.image_ids == (10, 11, 12)
    assert batch.weights.tolist() == [1, 1, 1, 0]
    assert batch.shape == (64, 96)
    assert batch.images[3] is None
    mask = batch.pixel_mask()
    assert mask[3].all()
    for slot, one in enumerate(examples):
        _, height, width = one.pixels.shape
        assert torch.equal(batch.images[slot], one.pixels)
        assert mask[slot].sum() == height * width
        assert mask[slot, :height, :width].all()
        assert torch.equal(batch.labels[slot]["boxes"], torch.from_numpy(one.boxes))
        assert batch.labels[slot]["class_labels"].tolist() == one.class_labels.tolist()
        assert batch.labels[slot]["image_id"].tolist() == [one.image_id]


def test_an_undecodable_image_is_reported_and_has_weight_zero() -> None:
    no_targets = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    good = example(np.random.default_rng(0), 1, 8, 8, 2)
    batch = pack_and_unpack([Example(5, None, *no_targets, skipped="truncated"), good], (8, 8), 2)
    assert batch.skipped == ("5: truncated",)
    assert batch.weights.tolist() == [0, 1]
    assert batch.image_ids == (5, 1)
    assert batch.labels[0]["boxes"].shape == (0, 4)
    assert batch.labels[1]["boxes"].shape == (2, 4)


def test_a_batch_has_the_id_of_the_node_that_decoded_it() -> None:
    packed = [(MicroBatch(0, position, 0, 0, (), (8, 8)), []) for position in range(2)]
    assert [batch.node for batch in unpack(pack(packed, "0f3a"), 1)] == ["0f3a", "0f3a"]
    assert [batch.node for batch in unpack(pack(packed), 1)] == ["", ""]


def test_an_empty_micro_batch_needs_few_bytes() -> None:
    row = pack([(MicroBatch(3, 4, 0, -1, (), (64, 96)), [])])
    assert row.nbytes < 1000
    (batch,) = unpack(row, 4)
    assert batch.images == (None,) * 4
    assert batch.sizes == ((64, 96),) * 4
    assert batch.weights.tolist() == [0] * 4
    assert batch.pixel_mask().all()
    assert [len(label["boxes"]) for label in batch.labels] == [0] * 4


def test_micro_batches_of_different_shapes_can_share_a_row() -> None:
    rng = np.random.default_rng(0)
    packed = [
        (MicroBatch(0, 0, 0, 0, (), (32, 64)), [example(rng, 1, 32, 50, 2), example(rng, 2, 20, 64, 1)]),
        (MicroBatch(0, 2, 0, -1, (), (32, 64)), []),
        (MicroBatch(1, 0, 0, 0, (), (64, 32)), [example(rng, 3, 60, 32, 0)]),
    ]
    batches = list(unpack(pack(packed), 2))
    assert [(batch.step, batch.position, batch.image_ids) for batch in batches] == [
        (0, 0, (1, 2)),
        (0, 2, ()),
        (1, 0, (3,)),
    ]
    for (_, examples), batch in zip(packed, batches, strict=True):
        alone = pack_and_unpack(examples, batch.shape, 2)
        for together, separate in zip(batch.images, alone.images, strict=True):
            assert together is separate is None or torch.equal(together, separate)
        for together, separate in zip(batch.labels, alone.labels, strict=True):
            assert torch.equal(together["boxes"], separate["boxes"])


def test_images_are_interleaved_and_not_copied() -> None:
    rng = np.random.default_rng(0)
    row = pack([(MicroBatch(0, 0, 0, 0, (), (32, 32)), [example(rng, n, 20 + n, 31, 0) for n in range(2)])])
    (batch,) = unpack(row, 2)
    values = row["micro_batches"].chunks[0].values.field("pixels").buffers()[2]
    for image in batch.images:
        assert image.permute(1, 2, 0).is_contiguous()
        assert values.address <= image.data_ptr() < values.address + values.size


def test_empty_micro_batches_and_undecodable_images_have_empty_masks_if_masks_are_requested() -> None:
    no_targets = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    packed = [
        (MicroBatch(0, 0, 0, 0, (), (8, 16)), [Example(5, None, *no_targets, skipped="truncated")]),
        (MicroBatch(0, 2, 0, -1, (), (8, 16)), []),
    ]
    for batch in unpack(pack(packed, masks=True), 2):
        assert [label["masks"].shape for label in batch.labels] == [(0, 8, 16), (0, 8, 16)]
    for batch in unpack(pack(packed), 2):
        assert not any("masks" in label for label in batch.labels)
