"""A training worker turns a micro-batch into the same tensors as the image processor."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detr import DetrImageProcessor
from raydetr.data.stream.micro_batch import Example, pack, unpack
from raydetr.data.stream.plan import MicroBatch
from raydetr.training.step import to_device

NOTHING = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_are_normalized_and_padded_as_by_the_image_processor(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    sizes = [(31, 40), (64, 17), (1, 1)]
    images = [torch.from_numpy(rng.integers(0, 256, (3, *size), dtype=np.uint8)) for size in sizes]
    examples = [Example(n, image, *NOTHING) for n, image in enumerate(images)]
    (batch,) = unpack(pack([(MicroBatch(0, 0, 0, 0, (), (64, 96)), examples)]), 4)
    processor = DetrImageProcessor(do_resize=False)
    state = SimpleNamespace(model=torch.nn.Linear(1, 1).to(dtype), processor=processor)
    pixels, mask = to_device(batch, state)
    assert pixels.dtype == dtype
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    expected = processor(images, return_tensors="pt")
    height, width = expected["pixel_values"].shape[-2:]
    torch.testing.assert_close(pixels[:3, :, :height, :width], expected["pixel_values"].to(dtype))
    assert torch.equal(mask[:3, :height, :width], expected["pixel_mask"].bool())
    assert mask[:3].sum() == sum(h * w for h, w in sizes)
    assert not pixels[~mask[:, None].expand_as(pixels)].any()
    # The slot without an image holds zeros and counts as unpadded.
    assert not pixels[3].any()
    assert mask[3].all()
