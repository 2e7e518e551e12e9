"""Resizing is bitwise equal to torchvision's; tests of padding and normalization."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from detr.image_processing.pixels import channel_values, clear_padding, normalize, pad_to_batch, resize

FILTERS = {
    0: InterpolationMode.NEAREST_EXACT,
    1: InterpolationMode.LANCZOS,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
}


def random_image(rng, height, width, channels=3, dtype=torch.uint8):
    return torch.from_numpy(rng.integers(0, 256, (height, width, channels))).to(dtype)


@pytest.mark.checklist("6. Image processor", "resampling")
@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_resize_equals_torchvision(resample, dtype):
    rng = np.random.default_rng(resample)
    for _ in range(25):
        height, width, new_height, new_width = (int(side) for side in rng.integers(1, 90, 4))
        interleaved = random_image(rng, height, width, int(rng.choice([1, 3, 4])), dtype).permute(2, 0, 1)
        expected = tv.resize(
            interleaved.contiguous(), [new_height, new_width], interpolation=FILTERS[resample], antialias=True
        )
        got = resize(interleaved.contiguous(), (new_height, new_width), resample)
        assert got.dtype == dtype
        assert torch.equal(got, expected)
        if dtype != torch.float32:  # float32 sums depend on the order in memory
            assert torch.equal(resize(interleaved, (new_height, new_width), resample), expected)


@pytest.mark.parametrize("size", [(40, 70), (120, 200), (7, 9)])
def test_an_interleaved_image_stays_interleaved_and_views_are_resized_equally(size):
    image = random_image(np.random.default_rng(0), 60, 80).permute(2, 0, 1)
    assert resize(image, size).permute(1, 2, 0).is_contiguous()
    for view in (image[:, 5:50, 10:70], image.flip(-1), image[:, ::2], image[:, :1], image[:, :, :1]):
        assert torch.equal(resize(view, size), tv.resize(view.contiguous(), list(size), antialias=True))
    batch = torch.stack([image, image.flip(-1)])
    assert torch.equal(resize(batch, size)[1], resize(image.flip(-1), size))


def test_an_image_that_already_has_the_size_is_returned_unchanged():
    image = torch.zeros(3, 5, 6, dtype=torch.uint8)
    assert resize(image, (5, 6)) is image


def test_an_unknown_filter_is_rejected():
    with pytest.raises(ValueError, match="resample is 9"):
        resize(torch.zeros(3, 5, 6), (2, 2), 9)


def test_normalization_is_the_same_for_bytes_and_floats():
    image = random_image(np.random.default_rng(1), 9, 8).permute(2, 0, 1)
    mean, std = channel_values((0.5, 0.4, 0.3), 1 / 255), channel_values((0.1, 0.2, 0.3), 1 / 255)
    got = normalize(image, mean, std)
    assert got.dtype == torch.float32
    for dtype in (torch.float32, torch.float64, torch.int64):
        given = image.to(dtype)
        assert torch.equal(normalize(given, mean, std), got)
        assert torch.equal(given, image.to(dtype))
    assert torch.allclose(got, (image / 255 - mean / 255) / (std / 255), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_images_are_padded_at_the_bottom_and_on_the_right(dtype):
    rng = np.random.default_rng(2)
    images = [random_image(rng, *size, dtype=dtype).permute(2, 0, 1) for size in ((4, 7), (6, 5))]
    batch, mask = pad_to_batch(images, (8, 9))
    assert (batch.shape, batch.dtype, mask.dtype) == ((2, 3, 8, 9), dtype, torch.int64)
    for index, image in enumerate(images):
        height, width = image.shape[1:]
        assert torch.equal(batch[index, :, :height, :width], image)
        assert mask[index, :height, :width].all()
        assert mask[index].sum() == height * width
        assert batch[index].sum() == image.sum()
    filled = torch.ones(2, 3, 8, 9)
    clear_padding(filled, [(4, 7), (6, 5)])
    assert torch.equal(filled, mask[:, None].expand(-1, 3, -1, -1).float())


def test_padding_rejects_images_that_do_not_fit():
    with pytest.raises(ValueError, match=r"Padding dimensions are negative.*\(5, 9\).*\(6, 3\) \(image 1\)"):
        pad_to_batch([torch.zeros(3, 5, 9), torch.zeros(3, 6, 3)], (5, 9))
    with pytest.raises(ValueError, match="image 1 has 1 channels, image 0 has 3"):
        pad_to_batch([torch.zeros(3, 5, 9), torch.zeros(1, 5, 9)], (5, 9))
