"""The mask head of an optimized model computes the same masks as the plain one, for maps of any size."""

import pytest
import torch

from detr import DetrConfig
from detr.inference.mask_head import FastMaskHead
from detr.model.mask_head import MaskHead

CHANNELS = [12, 20, 28, 36]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([(3, 4), (6, 8), (12, 16), (24, 32)], id="doubled"),
        pytest.param([(3, 4), (5, 7), (9, 13), (17, 25)], id="odd"),
        pytest.param([(3, 4), (6, 7), (11, 14), (22, 27)], id="mixed"),
        pytest.param([(1, 1), (1, 2), (1, 3), (2, 5)], id="one pixel"),
        pytest.param([(3, 4), (3, 4), (7, 8), (21, 9)], id="neither doubled nor one less"),
    ],
)
def test_masks_equal_those_of_the_plain_head(sizes, images):
    torch.manual_seed(0)
    config = DetrConfig(d_model=64, encoder_attention_heads=8)
    head = MaskHead(config, CHANNELS).double().eval().requires_grad_(False)
    (h, w), *larger = sizes
    projected = torch.randn(images, 64, h, w, dtype=torch.float64)
    maps = [
        torch.randn(images, channels, *size, dtype=torch.float64)
        for channels, size in zip(CHANNELS, [*reversed(larger), (h, w)], strict=True)
    ]
    attention = torch.rand(images, 5, 8, h * w, dtype=torch.float64)
    image, query = torch.tensor([0, images - 1, 0, images - 1]), torch.tensor([0, 1, 4, 2])

    expected = head(head.context(projected, maps, attention), image, query)
    fast = FastMaskHead(head)
    got = fast(fast.context(projected, maps, attention), image, query)

    assert expected.std() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
