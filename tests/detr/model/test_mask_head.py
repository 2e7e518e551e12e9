import subprocess
import sys

import pytest
import torch

from detr.config import DetrConfig
from detr.model.mask_head import BoxAttention, MaskHead
from detr.model.segmentation import DetrForSegmentation

CHANNELS = [8, 16, 32, 64]


def small_head() -> tuple[DetrConfig, BoxAttention, MaskHead]:
    config = DetrConfig(d_model=64, encoder_attention_heads=8)
    return config, BoxAttention(config).double(), MaskHead(config, CHANNELS).double()


def features(batch: int = 2, queries: int = 7):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sizes = ((23, 30), (12, 15), (6, 8), (3, 4))
    maps = [draw(batch, c, *size) for c, size in zip(CHANNELS, sizes, strict=True)]
    return draw(batch, queries, 64), draw(batch, 12, 64), draw(batch, 64, 3, 4), maps


@pytest.mark.checklist("4. Heads, segmentation head", "bbox attention")
def test_attention_is_one_softmax_over_heads_and_cells_and_zero_on_padding():
    _, attention, _ = small_head()
    queries, memory, _, _ = features()
    attend_mask = torch.ones(2, 12, dtype=torch.bool)
    attend_mask[1, 5:] = False
    weights = attention(queries, memory, attend_mask)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, 7, dtype=torch.float64))
    assert (weights[1, :, :, 5:] == 0).all()
    assert (weights[1, :, :, :5] > 0).all()


@pytest.mark.parametrize("gradients", [False, True])
def test_chunks_change_neither_masks_nor_gradients(gradients, monkeypatch):
    _, attention, head = small_head()
    queries, memory, projected, maps = features()
    image = torch.tensor([0, 1, 1, 0, 0, 1, 1])
    query = torch.tensor([6, 0, 1, 2, 3, 5, 6])
    results = []
    for limit in (2**30, 23 * 30 * 8 * 8 * 2):  # one chunk; two masks per chunk
        monkeypatch.setattr("detr.model.mask_head._CHUNK_BYTES", limit)
        with torch.set_grad_enabled(gradients):
            context = head.context(projected, maps, attention(queries, memory, None))
            masks = head(context, image, query)
            grads = torch.autograd.grad(masks.square().sum(), list(head.parameters())) if gradients else ()
        results.append((masks, *grads))
    assert results[0][0].shape == (7, 23, 30)
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 64, "encoder_attention_heads": 4}, "encoder_attention_heads: their sum"),
        ({"d_model": 96, "encoder_attention_heads": 8}, "multiples of 8"),
    ],
)
def test_widths_that_are_not_divisible_into_groups_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        MaskHead(DetrConfig(**changes), CHANNELS)


@pytest.mark.checklist("4. Heads, segmentation head", "out_indices with 3 maps")
def test_fewer_than_three_feature_maps_are_rejected():
    with pytest.raises(ValueError, match="returns 2 feature maps"):
        MaskHead(DetrConfig(), CHANNELS[:2])


@pytest.mark.checklist("4. Heads, segmentation head", "parameter init")
@pytest.mark.parametrize(("compat", "gain"), [("original", 1.0), ("transformers", 3.0)])
def test_a_new_head_is_initialized_as_in_the_original_and_in_transformers(compat, gain):
    torch.manual_seed(0)
    values = {"init_xavier_std": 3.0} if compat == "transformers" else {}
    model = DetrForSegmentation(DetrConfig(backbone="resnet18", compat=compat, **values))
    bound = gain * (6 / 512) ** 0.5
    assert 0.99 * bound < model.bbox_attention.q_linear.weight.abs().max() <= bound
    fan_in = model.mask_head.lay2.weight[0].numel()
    bound = (3 / fan_in) ** 0.5
    assert 0.99 * bound < model.mask_head.lay2.weight.abs().max() <= bound
    assert not model.mask_head.lay2.bias.any()
    assert not model.bbox_attention.k_linear.bias.any()


MEMORY = """
import torch
from detr import DetrConfig, DetrForSegmentation
def peak():
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) / 2**20
torch.set_num_threads(2)
model = DetrForSegmentation(DetrConfig(num_labels=250)).eval()
image = torch.randn(1, 3, 800, 1066)
with torch.no_grad():
    for _ in range(2):
        model.detr(image)
    before = peak()
    masks = model(image).pred_masks
assert masks.shape == (1, 100, 200, 267)
print(peak() - before)
"""


@pytest.mark.checklist("4. Heads, segmentation head", "memory")
@pytest.mark.slow
@pytest.mark.known_issue(21)
def test_a_hundred_masks_take_little_memory():
    """Measured: 0.05 GiB (2 cores); transformers needs 11 GiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.6
