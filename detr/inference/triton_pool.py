"""Max pooling on a GPU that writes only its result.

torch also writes the index of each maximum, which is four times as much data. The kernel needs Triton, which torch
installs on Linux, and a C compiler, which Triton uses.
"""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for CPUs or Windows
    triton = None


def triton_runs() -> bool:
    """Return whether Triton and the C compiler that it uses are available."""
    return triton is not None and shutil.which("cc") is not None


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _pool(  # type: ignore[no-untyped-def]
        x,
        result,
        pixels,
        height,
        width,
        out_height,
        out_width,
        channels: tl.constexpr,
        size: tl.constexpr,
        stride: tl.constexpr,
        padding: tl.constexpr,
        block: tl.constexpr,
    ):
        """Pool channels-last [B, h, w, C] to [B, h', w', C]; one program computes ``block`` pixels of the result."""
        pixel = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        channel = tl.arange(0, channels)
        column = (pixel % out_width) * stride - padding
        row = (pixel // out_width % out_height) * stride - padding
        image = pixel // (out_width * out_height)
        largest = tl.full((block, channels), float("-inf"), tl.float32)
        for i in tl.static_range(size):
            for j in tl.static_range(size):
                y, z = row + i, column + j
                valid = (pixel < pixels) & (y >= 0) & (y < height) & (z >= 0) & (z < width)
                at = ((image * height + y) * width + z)[:, None] * channels + channel[None, :]
                value = tl.load(x + at, mask=valid[:, None], other=float("-inf"))
                largest = tl.maximum(largest, value.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
        at = pixel[:, None] * channels + channel[None, :]
        tl.store(result + at, largest.to(result.dtype.element_ty), mask=(pixel < pixels)[:, None])


class FastMaxPool2d(nn.Module):
    """`nn.MaxPool2d` of channels-last maps.

    Args:
        pool: square, without dilation.
    """

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.size, self.stride, self.padding = pool.kernel_size, pool.stride, pool.padding

    @staticmethod
    def fits(pool: Any) -> bool:
        """Return whether a module is a pool that can be converted, and Triton can run here."""
        return (
            type(pool) is nn.MaxPool2d
            and all(isinstance(n, int) for n in (pool.kernel_size, pool.stride, pool.padding))
            and pool.dilation == 1
            and not pool.ceil_mode
            and triton_runs()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Pool float [B, C, h, w] to float [B, C, h', w']."""
        batch, channels, height, width = x.shape
        # Block sizes in Triton are powers of two, and this kernel computes in float32.
        if channels & (channels - 1) or x.dtype == torch.float64:
            return torch.nn.functional.max_pool2d(x, self.size, self.stride, self.padding)
        x = x.contiguous(memory_format=torch.channels_last)
        shape = [(n + 2 * self.padding - self.size) // self.stride + 1 for n in (height, width)]
        result = torch.empty(
            (batch, channels, *shape), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
        pixels = batch * shape[0] * shape[1]
        block = max(1, 4096 // channels)
        grid = (triton.cdiv(pixels, block),)
        _pool[grid](
            x, result, pixels, height, width, *shape, channels, self.size, self.stride, self.padding, block
        )
        return result
