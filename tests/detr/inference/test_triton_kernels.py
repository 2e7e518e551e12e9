"""The Triton kernels compute the same as torch; without a GPU, Triton's interpreter runs them."""

import os
import subprocess
import sys

import pytest
import torch

LAYERS = """
import copy
import torch
import torch.nn.functional as F
from torch import nn
from detr.model.attention import MultiheadAttention, additive_mask
from detr.inference.triton_tf32x3 import Float32Attention, Float32Linear

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
for rows, narrow, wide in [(7, 33, 20), (40, 64, 129)]:
    for relu in (False, True):
        linear, x = nn.Linear(narrow, wide).to(device), torch.randn(2, rows, narrow, device=device)
        expected = F.relu(linear(x)) if relu else linear(x)
        torch.testing.assert_close(Float32Linear(linear, relu)(x), expected, atol=1e-5, rtol=1e-5)

for batch, queries, keys, masked in [(1, 70, 70, False), (2, 5, 130, True), (2, 17, 64, True)]:
    plain = MultiheadAttention(64, 4, 0.0).eval().requires_grad_(False)
    fast = copy.deepcopy(plain).to(device)
    assert Float32Attention.fits(fast)
    fast = Float32Attention(fast)
    q, k = torch.randn(batch, queries, 64), torch.randn(batch, keys, 64)
    mask = None
    if masked:
        attend_mask = torch.rand(batch, keys) > 0.4
        attend_mask[-1] = False  # an image of padding only
        mask = additive_mask(attend_mask, torch.float32)
    # On the CPU: if all keys are masked, torch's own kernel for a GPU does not attend to all of them.
    expected = plain(q, k, k, mask, False)[0]
    got = fast(q.to(device), *[k.to(device)] * 2, None if mask is None else mask.to(device), False)[0]
    torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=1e-4)
print("equal")
"""

MASKS = """
import torch
from torch import nn
from detr import DetrConfig
from detr.inference.triton_mask_head import GpuMaskHead
from detr.model.mask_head import MaskHead

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False
torch.manual_seed(0)
channels = [12, 20, 28, 36]
for sizes in [
    [(3, 4), (6, 8), (12, 16), (24, 32)],
    [(3, 4), (5, 7), (9, 14), (17, 28)],
    [(1, 1), (1, 2), (1, 3), (2, 5)],
    [(3, 4), (3, 4), (7, 8), (21, 9)],
]:
    for images in (1, 2):
        head = MaskHead(DetrConfig(d_model=64, encoder_attention_heads=8), channels).eval().requires_grad_(False)
        for norm in head.modules():
            if isinstance(norm, nn.GroupNorm):
                nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        head = head.to(device)
        assert GpuMaskHead.fits(head)
        (h, w), *larger = sizes
        projected = torch.randn(images, 64, h, w, device=device)
        maps = [
            torch.randn(images, width, *size, device=device)
            for width, size in zip(channels, [*reversed(larger), (h, w)])
        ]
        attention = torch.rand(images, 5, 8, h * w, device=device)
        image, query = torch.tensor([[0, images - 1, 0], [0, 1, 4]], device=device)
        fast = GpuMaskHead(head)
        expected, got = (each(each.context(projected, maps, attention), image, query) for each in (head, fast))
        assert expected.std() > 1e-3
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
print("equal")
"""


@pytest.mark.parametrize(
    "script", [pytest.param(LAYERS, id="layers"), pytest.param(MASKS, id="masks", marks=pytest.mark.slow)]
)
def test_kernels_equal_torch(script: str) -> None:
    pytest.importorskip("triton", reason="torch for a CPU has no Triton")
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr
