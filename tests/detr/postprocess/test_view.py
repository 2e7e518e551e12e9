"""Padding is cropped from masks before they are resized."""

import math

import pytest
import torch
import torch.nn.functional as F

from detr.postprocess.view import View, image_views
from tests.detr.postprocess.random_outputs import SECTION

ROW = (SECTION, "masks resized with padding")


def masks_of(padded_size, batch=1, queries=2, seed=0):
    size = [math.ceil(edge / 4) for edge in padded_size]
    return torch.randn(
        batch, queries, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


@pytest.mark.checklist(*ROW)
@pytest.mark.parametrize(
    ("padded", "size"), [((64, 96), (64, 50)), ((61, 90), (37, 90)), ((33, 47), (20, 31))]
)
def test_cropping_cells_equals_cropping_pixels_of_the_padded_image(padded, size, difference):
    masks = masks_of(padded)
    expected = F.interpolate(masks, size=padded, mode="bilinear")[0, :, : size[0], : size[1]]
    (view,) = image_views(masks, [size], [size], padded)
    got = view.resize(masks[0])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    difference((got - expected).abs().max().item())
    # Resizing the whole mask to the size of the image gives a different result.
    whole = View(size=size).resize(masks[0])
    assert (whole - expected).abs().max() > 0.5


@pytest.mark.checklist(*ROW)
def test_processed_sizes_do_not_change_an_image_without_padding():
    masks = masks_of((61, 90)).float()
    (cropped,) = image_views(masks, [(100, 133)], [(61, 90)])
    (whole,) = image_views(masks, [(100, 133)])
    assert torch.equal(cropped.resize(masks[0]), whole.resize(masks[0]))


def test_without_target_sizes_the_result_has_the_cells_of_the_image():
    masks = masks_of((64, 96), batch=2)
    first, second = image_views(masks, None, [(64, 96), (30, 45)])
    assert torch.equal(first.resize(masks[0]), masks[0])
    assert torch.equal(second.resize(masks[1]), masks[1, :, :8, :12])
    assert second.output_size(masks[1]) == (8, 12)
    assert View().output_size(masks[1]) == (16, 24)


def test_sizes_may_be_a_list_or_a_tensor():
    masks = masks_of((64, 96), batch=2)
    sizes = [(64, 90), (30, 96)]
    assert image_views(masks, sizes, sizes) == image_views(masks, torch.tensor(sizes), torch.tensor(sizes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([(1, 2)],), "as many target sizes"),
        ((None, [(64, 96)] * 3), "as many processed sizes"),
        (([(5, 5), (0, 5)],), r"target size 1 is \(0, 5\)"),
        ((None, [(32, 96), (30, 45)]), "give padded_size"),
        ((None, [(64, 96), (65, 96)], (64, 96)), "processed size 1 is .* more than the padded size"),
    ],
)
def test_invalid_sizes_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        image_views(masks_of((64, 96), batch=2), *arguments)
