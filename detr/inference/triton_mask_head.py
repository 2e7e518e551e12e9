"""The mask head of an optimized model on a GPU, where the time depends on how often activations are read and written.

cuDNN computes the convolutions. The steps between them are Triton kernels: interleaving the four phases of an enlarged
map, adding the feature map of the image, group norm and ReLU. They read and write channels-last maps, as the
convolutions do; torch's group norm would convert the memory format twice. The last norm is applied when the last
convolution reads its input, so the largest map is written only once.

The kernels need Triton, which torch installs on Linux, and a C compiler, which Triton uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.inference.mask_head import FastMaskHead
from detr.inference.triton_pool import triton_runs
from detr.model.engine import WithEngine
from detr.model.mask_head import MaskHead
from detr.model.outputs import MaskContext

_BLOCK_ELEMENTS = 4096
"""Elements that one program holds in registers at a time."""
_BLOCKS_PER_PROGRAM = 16
"""Blocks that one program of the group norm sums up."""
_MASKS_MULTIPLE = 4
"""Numbers of masks for which CUDA graphs are recorded: multiples of this, and smaller powers of two."""

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
        """Interleave phases [M, h + 1, w + 1, 4 C] and add shared [1 or M, H, W, C]: [M, H, W, C].

        H is 2h or 2h - 1, and W is 2w or 2w - 1.
        """
        pixel = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        channel = tl.arange(0, lanes)
        column = pixel % width
        row = pixel // width % height
        mask = pixel // (width * height)
        valid = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        a, b = row % 2, column % 2
        cell = (mask * (half_height + 1) + row // 2 + a) * (half_width + 1) + column // 2 + b
        part = tl.load(
            parts + ((cell * 4 + 2 * a + b) * channels)[:, None] + channel[None, :], mask=valid, other=0.0
        )
        same = (mask * shared_step + row * width + column) * channels
        added = tl.load(shared + same[:, None] + channel[None, :], mask=valid, other=0.0)
        value = part.to(tl.float32) + added.to(tl.float32)
        at = pixel[:, None] * channels + channel[None, :]
        tl.store(result + at, value.to(result.dtype.element_ty), mask=valid)

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
        """Sum the values and squares of each channel over a part of [M, pixels, C]: [M, programs, 2, C]."""
        mask, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
        channel = tl.arange(0, lanes)
        first = tl.zeros((block, lanes), tl.float32)
        second = tl.zeros((block, lanes), tl.float32)
        for turn in range(turns):
            pixel = (program * turns + turn) * block + tl.arange(0, block)
            valid = (pixel < pixels)[:, None] & (channel < channels)[None, :]
            at = (mask * pixels + pixel)[:, None] * channels + channel[None, :]
            value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
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
        """Convert the sums of `_sum` to the factors and shifts of a group norm as an affine map: [M, 2, C]."""
        mask = tl.program_id(0).to(tl.int64)
        channel = tl.arange(0, lanes)
        valid = channel < channels
        first, second = tl.zeros((lanes,), tl.float64), tl.zeros((lanes,), tl.float64)
        for program in range(programs):
            at = sums + (mask * programs + program) * 2 * channels + channel
            first += tl.load(at, mask=valid, other=0.0).to(tl.float64)
            second += tl.load(at + channels, mask=valid, other=0.0).to(tl.float64)
        size: tl.constexpr = channels // groups
        count = 1.0 * pixels * size
        mean, square = tl.zeros((lanes,), tl.float64), tl.zeros((lanes,), tl.float64)
        for group in tl.static_range(groups):
            inside = channel // size == group
            mean = tl.where(inside, tl.sum(tl.where(inside, first, 0.0)) / count, mean)
            square = tl.where(inside, tl.sum(tl.where(inside, second, 0.0)) / count, square)
        deviation = tl.sqrt(tl.maximum(square - mean * mean, 0.0) + eps)
        factor = tl.load(weight + channel, mask=valid, other=0.0).to(tl.float64) / deviation
        shift = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float64) - mean * factor
        at = maps + mask * 2 * channels + channel
        tl.store(at, factor.to(tl.float32), mask=valid)
        tl.store(at + channels, shift.to(tl.float32), mask=valid)

    @triton.jit  # type: ignore[untyped-decorator]
    def _affine_relu(  # type: ignore[no-untyped-def]
        x, maps, all_pixels, pixels, channels: tl.constexpr, lanes: tl.constexpr, block: tl.constexpr
    ):
        """Compute the ReLU of factor times [M, pixels, C] plus shift, in place."""
        pixel = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        channel = tl.arange(0, lanes)
        valid = (pixel < all_pixels)[:, None] & (channel < channels)[None, :]
        at = pixel[:, None] * channels + channel[None, :]
        of_mask = maps + (pixel // pixels * 2 * channels)[:, None] + channel[None, :]
        factor = tl.load(of_mask, mask=valid, other=0.0)
        shift = tl.load(of_mask + channels, mask=valid, other=0.0)
        value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32) * factor + shift
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(x + at, value.to(x.dtype.element_ty), mask=valid)

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
        """Apply `_affine_relu`, then a 3 x 3 convolution to one channel: [M, H, W, C] to [M, H, W]; weight [3, 3, C]."""
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
                valid = inside[:, None] & real[None, :]
                value = tl.load(x + at, mask=valid, other=0.0).to(tl.float32) * factor + shift
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
                factors = tl.load(weight + (3 * i + j) * channels + channel, mask=real, other=0.0)
                sums += tl.where(valid, value, 0.0) * factors.to(tl.float32)[None, :]
        value = tl.sum(sums, 1) + tl.load(bias).to(tl.float32)
        tl.store(result + pixel, value.to(result.dtype.element_ty), mask=exists)


class GpuMaskHead(FastMaskHead, WithEngine):
    """A mask head with the same masks and custom kernels for a GPU.

    Args:
        head: on a GPU; `fits` must be true for it.
    """

    _chunk_bytes_on_gpu = 128 * 1024**2

    def __init__(self, head: MaskHead) -> None:
        super().__init__(head)
        self.to(memory_format=torch.channels_last)
        self._last_weight = self.out_lay.weight[0].permute(1, 2, 0).contiguous()

    @staticmethod
    def fits(head: MaskHead) -> bool:
        """Return whether Triton can run here, and the kernels support the activation and the dtype."""
        is_float64 = head.lay1.weight.dtype == torch.float64
        return triton_runs() and head.activation is F.relu and not is_float64

    def _masks(self, context: MaskContext, image: Tensor, query: Tensor) -> Tensor:
        count = len(image)
        if not count:
            return context.base.new_empty((0, *context.maps[-1].shape[-2:]))
        inputs = (context.base, *context.maps, context.attention)
        if self.engine is None:
            return self._compute(*inputs, image, query)
        # Round the number of masks up, so that fewer graphs are recorded.
        more = (
            triton.next_power_of_2(count)
            if count < _MASKS_MULTIPLE
            else triton.cdiv(count, _MASKS_MULTIPLE) * _MASKS_MULTIPLE
        ) - count
        masks: Tensor = self.engine(self._compute, *inputs, F.pad(image, (0, more)), F.pad(query, (0, more)))
        return masks[:count]

    def _compute(
        self, base: Tensor, deep: Tensor, middle: Tensor, shallow: Tensor, attention: Tensor, *indices: Tensor
    ) -> Tensor:
        return super()._masks(MaskContext(base, (deep, middle, shallow), attention), *indices)

    def interleave(self, phases: Tensor, shared: Tensor) -> Tensor:
        """See `FastMaskHead.interleave`."""
        channels, height, width = shared.shape[1:]
        lanes, block = _block(channels)
        result = torch.empty(
            (len(phases), channels, height, width),
            dtype=phases.dtype,
            device=phases.device,
            memory_format=torch.channels_last,
        )
        pixels = len(phases) * height * width
        _interleave[(triton.cdiv(pixels, block),)](
            _channels_last(phases),
            _channels_last(shared),
            result,
            pixels,
            height,
            width,
            *(side - 1 for side in phases.shape[-2:]),
            height * width if len(shared) > 1 else 0,
            channels,
            lanes,
            block,
        )
        return result

    def normalize(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """See `FastMaskHead.normalize`."""
        x = _channels_last(x)
        channels, pixels = x.shape[1], x[0, 0].numel()
        lanes, block = _block(channels)
        _affine_relu[(triton.cdiv(len(x) * pixels, block),)](
            x, _affine(x, norm), len(x) * pixels, pixels, channels, lanes, block
        )
        return x

    def final_layer(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """See `FastMaskHead.final_layer`."""
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
    """Compute the factors and shifts float32 [M, 2, C] of the group norm of channels-last maps."""
    channels, pixels = x.shape[1], x[0, 0].numel()
    lanes, block = _block(channels)
    programs = triton.cdiv(pixels, block * _BLOCKS_PER_PROGRAM)
    sums = torch.empty((len(x), programs, 2, channels), device=x.device)
    _sum[(programs, len(x))](x, sums, pixels, programs, channels, lanes, block, _BLOCKS_PER_PROGRAM)
    maps = torch.empty((len(x), 2, channels), device=x.device)
    _fit[(len(x),)](
        sums, norm.weight, norm.bias, maps, pixels, programs, norm.eps, norm.num_groups, channels, lanes
    )
    return maps


def _block(channels: int) -> tuple[int, int]:
    """Return the channels rounded up to a power of two, as Triton requires, and the pixels of a block."""
    lanes = triton.next_power_of_2(channels)
    return lanes, max(1, _BLOCK_ELEMENTS // lanes)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
