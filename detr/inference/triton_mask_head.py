"""The mask head of an optimised model on a GPU, where what counts is how often an activation is read and written.

cuDNN does the convolutions. What is between them, the four phases of an enlarged map in their order, the sum with the
image's maps, group norm and ReLU, are kernels that read channels-last maps as the convolutions leave them; torch's group
norm would turn them around and back. The last norm is done where the last convolution reads its input, so the largest
map is written once.

It needs Triton, which torch brings on Linux, and the C compiler that Triton needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.inference.cuda_graphs import GraphMemory, Replayed
from detr.inference.mask_head import FastMaskHead
from detr.inference.triton_pool import triton_runs
from detr.model.mask_head import MaskHead
from detr.model.outputs import MaskContext

_ELEMENTS = 4096
"""Numbers that one program has in registers at a time."""
_TURNS = 16
"""How many times so many it sums up."""
_STEP = 4
"""Numbers of masks that are recorded: multiples of it, and powers of two below."""

if triton_runs():
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def _interleave(  # type: ignore[no-untyped-def]
        parts,
        shared,
        result,
        pixels,
        height,
        width,
        half_height,
        half_width,
        shared_step,
        channels: tl.constexpr,
        lanes: tl.constexpr,
        block: tl.constexpr,
    ):
        """Phases [M, h + 1, w + 1, 4 C] plus shared [1 or M, H, W, C] to [M, H, W, C]; H is 2h or 2h - 1, W likewise."""
        pixel = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        channel = tl.arange(0, lanes)
        column = pixel % width
        row = pixel // width % height
        mask = pixel // (width * height)
        there = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        a, b = row % 2, column % 2
        cell = (mask * (half_height + 1) + row // 2 + a) * (half_width + 1) + column // 2 + b
        part = tl.load(
            parts + ((cell * 4 + 2 * a + b) * channels)[:, None] + channel[None, :], mask=there, other=0.0
        )
        same = (mask * shared_step + row * width + column) * channels
        added = tl.load(shared + same[:, None] + channel[None, :], mask=there, other=0.0)
        value = part.to(tl.float32) + added.to(tl.float32)
        at = pixel[:, None] * channels + channel[None, :]
        tl.store(result + at, value.to(result.dtype.element_ty), mask=there)

    @triton.jit  # type: ignore[untyped-decorator]
    def _sum(  # type: ignore[no-untyped-def]
        x,
        sums,
        pixels,
        programs,
        channels: tl.constexpr,
        lanes: tl.constexpr,
        block: tl.constexpr,
        turns: tl.constexpr,
    ):
        """Of each channel of a share of [M, pixels, C] the sum and that of squares, to [M, programs, 2, C]."""
        mask, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
        channel = tl.arange(0, lanes)
        first = tl.zeros((block, lanes), tl.float32)
        second = tl.zeros((block, lanes), tl.float32)
        for turn in range(turns):
            pixel = (program * turns + turn) * block + tl.arange(0, block)
            there = (pixel < pixels)[:, None] & (channel < channels)[None, :]
            at = (mask * pixels + pixel)[:, None] * channels + channel[None, :]
            value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
            first += value
            second += value * value
        at = (mask * programs + program) * 2 * channels + channel
        tl.store(sums + at, tl.sum(first, 0), mask=channel < channels)
        tl.store(sums + at + channels, tl.sum(second, 0), mask=channel < channels)

    @triton.jit  # type: ignore[untyped-decorator]
    def _fit(  # type: ignore[no-untyped-def]
        sums,
        weight,
        bias,
        maps,
        pixels,
        programs,
        eps,
        groups: tl.constexpr,
        channels: tl.constexpr,
        lanes: tl.constexpr,
    ):
        """From the sums of `_sum` the affine map that a group norm is: factors and shifts, to [M, 2, C]."""
        mask = tl.program_id(0).to(tl.int64)
        channel = tl.arange(0, lanes)
        there = channel < channels
        first, second = tl.zeros((lanes,), tl.float64), tl.zeros((lanes,), tl.float64)
        for program in range(programs):
            at = sums + (mask * programs + program) * 2 * channels + channel
            first += tl.load(at, mask=there, other=0.0).to(tl.float64)
            second += tl.load(at + channels, mask=there, other=0.0).to(tl.float64)
        size: tl.constexpr = channels // groups
        count = 1.0 * pixels * size
        mean, square = tl.zeros((lanes,), tl.float64), tl.zeros((lanes,), tl.float64)
        for group in tl.static_range(groups):
            inside = channel // size == group
            mean = tl.where(inside, tl.sum(tl.where(inside, first, 0.0)) / count, mean)
            square = tl.where(inside, tl.sum(tl.where(inside, second, 0.0)) / count, square)
        deviation = tl.sqrt(tl.maximum(square - mean * mean, 0.0) + eps)
        factor = tl.load(weight + channel, mask=there, other=0.0).to(tl.float64) / deviation
        shift = tl.load(bias + channel, mask=there, other=0.0).to(tl.float64) - mean * factor
        at = maps + mask * 2 * channels + channel
        tl.store(at, factor.to(tl.float32), mask=there)
        tl.store(at + channels, shift.to(tl.float32), mask=there)

    @triton.jit  # type: ignore[untyped-decorator]
    def _affine_relu(  # type: ignore[no-untyped-def]
        x, maps, all_pixels, pixels, channels: tl.constexpr, lanes: tl.constexpr, block: tl.constexpr
    ):
        """ReLU of factor times [M, pixels, C] plus shift, in place."""
        pixel = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        channel = tl.arange(0, lanes)
        there = (pixel < all_pixels)[:, None] & (channel < channels)[None, :]
        at = pixel[:, None] * channels + channel[None, :]
        of_mask = maps + (pixel // pixels * 2 * channels)[:, None] + channel[None, :]
        factor = tl.load(of_mask, mask=there, other=0.0)
        shift = tl.load(of_mask + channels, mask=there, other=0.0)
        value = tl.load(x + at, mask=there, other=0.0).to(tl.float32) * factor + shift
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(x + at, value.to(x.dtype.element_ty), mask=there)

    @triton.jit  # type: ignore[untyped-decorator]
    def _affine_relu_convolution(  # type: ignore[no-untyped-def]
        x,
        maps,
        weight,
        bias,
        result,
        all_pixels,
        height,
        width,
        channels: tl.constexpr,
        lanes: tl.constexpr,
        block: tl.constexpr,
    ):
        """As `_affine_relu`, then a 3 x 3 convolution to one channel: [M, H, W, C] to [M, H, W]; weight [3, 3, C]."""
        pixel = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        channel = tl.arange(0, lanes)
        real = channel < channels
        column = pixel % width
        row = pixel // width % height
        mask = pixel // (width * height)
        exists = pixel < all_pixels
        of_mask = maps + (mask * 2 * channels)[:, None] + channel[None, :]
        factor = tl.load(of_mask, mask=exists[:, None] & real[None, :], other=0.0)
        shift = tl.load(of_mask + channels, mask=exists[:, None] & real[None, :], other=0.0)
        sums = tl.zeros((block, lanes), tl.float32)
        for i in tl.static_range(3):
            for j in tl.static_range(3):
                y, z = row + (i - 1), column + (j - 1)
                inside = exists & (y >= 0) & (y < height) & (z >= 0) & (z < width)
                at = (pixel + (i - 1) * width + (j - 1))[:, None] * channels + channel[None, :]
                there = inside[:, None] & real[None, :]
                value = tl.load(x + at, mask=there, other=0.0).to(tl.float32) * factor + shift
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
                factors = tl.load(weight + (3 * i + j) * channels + channel, mask=real, other=0.0)
                sums += tl.where(there, value, 0.0) * factors.to(tl.float32)[None, :]
        value = tl.sum(sums, 1) + tl.load(bias).to(tl.float32)
        tl.store(result + pixel, value.to(result.dtype.element_ty), mask=exists)


class GpuMaskHead(FastMaskHead):
    """The same masks again.

    Args:
        head: on a GPU; one that `fits`.
    """

    _chunk_bytes_on_gpu = 128 * 1024**2

    def __init__(self, head: MaskHead) -> None:
        super().__init__(head)
        self.to(memory_format=torch.channels_last)
        self._last_weight = self.out_lay.weight[0].permute(1, 2, 0).contiguous()
        self._replayed: Replayed | None = None

    @staticmethod
    def fits(head: MaskHead) -> bool:
        """Whether Triton can run here, and the activation and the dtype are what the kernels do."""
        exact = head.lay1.weight.dtype == torch.float64
        return triton_runs() and head.activation is F.relu and not exact

    def replay_masks(self, memory: GraphMemory) -> None:
        """Ask for all masks of a chunk at once, from now on."""
        self._replayed = Replayed(self._computed, memory)

    def _masks(self, context: MaskContext, image: Tensor, query: Tensor) -> Tensor:
        count = len(image)
        if not count:
            return context.base.new_empty((0, *context.maps[-1].shape[-2:]))
        inputs = (context.base, *context.maps, context.attention)
        if self._replayed is None:
            return self._computed(*inputs, image, query)
        # Some more masks than are asked for: fewer numbers of them to be recorded.
        more = (triton.next_power_of_2(count) if count < _STEP else triton.cdiv(count, _STEP) * _STEP) - count
        masks: Tensor = self._replayed(*inputs, F.pad(image, (0, more)), F.pad(query, (0, more)))
        return masks[:count]

    def _computed(
        self, base: Tensor, deep: Tensor, middle: Tensor, shallow: Tensor, attention: Tensor, *which: Tensor
    ) -> Tensor:
        return super()._masks(MaskContext(base, (deep, middle, shallow), attention), *which)

    def enlarged(self, parts: Tensor, shared: Tensor) -> Tensor:
        """See `FastMaskHead.enlarged`."""
        channels, height, width = shared.shape[1:]
        lanes, block = _block(channels)
        result = torch.empty(
            (len(parts), channels, height, width),
            dtype=parts.dtype,
            device=parts.device,
            memory_format=torch.channels_last,
        )
        pixels = len(parts) * height * width
        _interleave[(triton.cdiv(pixels, block),)](
            _channels_last(parts),
            _channels_last(shared),
            result,
            pixels,
            height,
            width,
            *(side - 1 for side in parts.shape[-2:]),
            height * width if len(shared) > 1 else 0,
            channels,
            lanes,
            block,
        )
        return result

    def normed(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """See `FastMaskHead.normed`."""
        x = _channels_last(x)
        channels, pixels = x.shape[1], x[0, 0].numel()
        lanes, block = _block(channels)
        _affine_relu[(triton.cdiv(len(x) * pixels, block),)](
            x, _affine(x, norm), len(x) * pixels, pixels, channels, lanes, block
        )
        return x

    def last(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """See `FastMaskHead.last`."""
        x = _channels_last(x)
        channels, height, width = x.shape[1:]
        lanes, block = _block(channels)
        result = x.new_empty((len(x), height, width))
        _affine_relu_convolution[(triton.cdiv(result.numel(), block),)](
            x,
            _affine(x, norm),
            self._last_weight,
            self.out_lay.bias,
            result,
            result.numel(),
            height,
            width,
            channels,
            lanes,
            block,
        )
        return result


def _affine(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Factors and shifts float32 [M, 2, C] of the group norm of channels-last maps."""
    channels, pixels = x.shape[1], x[0, 0].numel()
    lanes, block = _block(channels)
    programs = triton.cdiv(pixels, block * _TURNS)
    sums = torch.empty((len(x), programs, 2, channels), device=x.device)
    _sum[(programs, len(x))](x, sums, pixels, programs, channels, lanes, block, _TURNS)
    maps = torch.empty((len(x), 2, channels), device=x.device)
    _fit[(len(x),)](
        sums, norm.weight, norm.bias, maps, pixels, programs, norm.eps, norm.num_groups, channels, lanes
    )
    return maps


def _block(channels: int) -> tuple[int, int]:
    """Channels, rounded up to what Triton can count, and how many pixels of so many one program has at a time."""
    lanes = triton.next_power_of_2(channels)
    return lanes, max(1, _ELEMENTS // lanes)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
