"""Float32 linear layers and attention on the TF32 tensor cores of a GPU, as exact as float32 (3xTF32).

Tensor cores round the factors of a TF32 product to ten bits. So each factor is split into the sum of two TF32 numbers.
Of the four products of the parts, the one of both remainders is below the rounding of float32 and is omitted. The
remaining three TF32 products are as exact as a float32 product, and faster.

torch computes float32 linear layers and attention on the slow float32 units. The attention here does not store the
scores in GPU memory (FlashAttention, Dao et al., 2022).

The kernels need Triton, which torch installs on Linux, and a C compiler, which Triton uses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.inference.triton_pool import triton_runs
from detr.model.attention import MultiheadAttention, activation_function

if triton_runs():
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def _linear(  # type: ignore[no-untyped-def]
        x,
        weight,
        bias,
        result,
        rows,
        narrow,
        wide,
        relu: tl.constexpr,
        rows_block: tl.constexpr,
        wide_block: tl.constexpr,
        narrow_block: tl.constexpr,
    ):
        """Multiply [rows, narrow] by the transpose of [wide, narrow] and add [wide]; one program per result block."""
        row = tl.program_id(0).to(tl.int64) * rows_block + tl.arange(0, rows_block)
        column = tl.program_id(1) * wide_block + tl.arange(0, wide_block)
        sums = tl.zeros((rows_block, wide_block), tl.float32)
        for start in range(0, narrow, narrow_block):
            inner = start + tl.arange(0, narrow_block)
            valid = inner < narrow
            left = tl.load(
                x + row[:, None] * narrow + inner[None, :],
                mask=(row < rows)[:, None] & valid[None, :],
                other=0.0,
            )
            right = tl.load(
                weight + column[None, :] * narrow + inner[:, None],
                mask=(column < wide)[None, :] & valid[:, None],
                other=0.0,
            )
            sums = tl.dot(left, right, sums, input_precision="tf32x3")
        sums += tl.load(bias + column, mask=column < wide, other=0.0)[None, :]
        if relu:
            sums = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)
        at = row[:, None] * wide + column[None, :]
        tl.store(result + at, sums, mask=(row < rows)[:, None] & (column < wide)[None, :])

    @triton.jit  # type: ignore[untyped-decorator]
    def _attend(  # type: ignore[no-untyped-def]
        q,
        k,
        v,
        mask,
        result,
        queries,
        keys,
        heads,
        q_batch,
        q_head,
        q_row,
        k_batch,
        k_head,
        k_row,
        v_batch,
        v_head,
        v_row,
        scale,
        masked: tl.constexpr,
        width: tl.constexpr,
        rows_block: tl.constexpr,
        keys_block: tl.constexpr,
    ):
        """Compute attention for a block of queries of one head, with an online softmax over blocks of keys.

        The mask [batch, keys] is added to the scores. The result is [batch, queries, heads, width].
        """
        batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
        row, channel = tl.program_id(0) * rows_block + tl.arange(0, rows_block), tl.arange(0, width)
        row_valid = (row < queries)[:, None]
        q_at = q + batch * q_batch + head * q_head + row[:, None] * q_row + channel[None, :]
        queries_block = tl.load(q_at, mask=row_valid, other=0.0) * scale
        largest = tl.full((rows_block,), float("-inf"), tl.float32)
        total = tl.zeros((rows_block,), tl.float32)
        sums = tl.zeros((rows_block, width), tl.float32)
        for start in range(0, keys, keys_block):
            key = start + tl.arange(0, keys_block)
            valid = key < keys
            k_at = k + batch * k_batch + head * k_head + key[None, :] * k_row + channel[:, None]
            scores = tl.dot(
                queries_block, tl.load(k_at, mask=valid[None, :], other=0.0), input_precision="tf32x3"
            )
            if masked:
                scores += tl.load(mask + batch * keys + key, mask=valid, other=0.0)[None, :]
            scores = tl.where(valid[None, :], scores, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            rescale, weights = tl.exp(largest - new_largest), tl.exp(scores - new_largest[:, None])
            v_at = v + batch * v_batch + head * v_head + key[:, None] * v_row + channel[None, :]
            values = tl.load(v_at, mask=valid[:, None], other=0.0)
            sums = sums * rescale[:, None] + tl.dot(weights, values, input_precision="tf32x3")
            total = total * rescale + tl.sum(weights, 1)
            largest = new_largest
        at = ((batch * queries + row[:, None]) * heads + head) * width + channel[None, :]
        tl.store(result + at, sums / total[:, None], mask=row_valid)


class Float32Linear(nn.Module):
    """A float32 linear layer on TF32 tensor cores, optionally with a fused ReLU.

    Args:
        linear: float32, on a GPU.
        relu: whether to fuse a ReLU.
    """

    def __init__(self, linear: nn.Linear, relu: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().contiguous(), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Map float [..., C] to float [..., C']."""
        if x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
            y = F.linear(x, self.weight, self.bias)
            return F.relu(y) if self.relu else y
        wide, narrow = self.weight.shape
        rows = x.numel() // narrow
        result = x.new_empty((*x.shape[:-1], wide))
        rows_block, wide_block, narrow_block = _blocks(rows, wide)
        grid = (triton.cdiv(rows, rows_block), triton.cdiv(wide, wide_block))
        _linear[grid](
            x.contiguous(),
            self.weight,
            self.bias,
            result,
            rows,
            narrow,
            wide,
            self.relu,
            rows_block,
            wide_block,
            narrow_block,
            num_warps=4,
            num_stages=4,
        )
        return result


def _blocks(rows: int, wide: int) -> tuple[int, int, int]:
    """Choose the block sizes of a product: large blocks load less data, small blocks occupy the whole GPU."""
    blocks = triton.cdiv(rows, 64) * triton.cdiv(wide, 64)
    if blocks >= 400:
        return 128, 64, 32
    if blocks >= 128:
        return 64, 64, 32
    return (64, 32, 64) if blocks >= 32 else (16, 32, 128)


class Float32Attention(MultiheadAttention):
    """Float32 attention without dropout on TF32 tensor cores.

    Args:
        attention: on a GPU; `fits` must be true for it. Its layers become those of the new module.
    """

    def __init__(self, attention: MultiheadAttention) -> None:
        nn.Module.__init__(self)
        self.eager, self.dropout = attention.eager, attention.dropout
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        for name, module in attention.named_children():
            self.add_module(name, module)
        self.eval()

    @staticmethod
    def fits(attention: nn.Module) -> bool:
        """Return whether a module can be converted: the width of its heads must be a block size that fits every GPU."""
        return type(attention) is MultiheadAttention and attention.head_dim in (16, 32, 64)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """See `MultiheadAttention.attend`."""
        batch, heads, queries, width = q.shape
        keys = k.shape[2]
        of_keys = mask is None or mask.shape[1:] == (1, 1, keys)
        if q.dtype != torch.float32 or dropout or not of_keys or any(t.stride(-1) != 1 for t in (q, k, v)):
            return super().attend(q, k, v, mask, dropout)
        result = q.new_empty((batch, queries, heads, width))
        rows_block, keys_block = (64, 64) if queries * heads * batch >= 64 * 64 else (16, 128)
        grid = (triton.cdiv(queries, rows_block), batch * heads)
        _attend[grid](
            q,
            k,
            v,
            q if mask is None else mask.expand(batch, -1, -1, -1).contiguous(),
            result,
            queries,
            keys,
            heads,
            *(stride for t in (q, k, v) for stride in t.stride()[:3]),
            self.head_dim**-0.5,
            mask is not None,
            width,
            rows_block,
            keys_block,
            num_warps=4,
            num_stages=2,
        )
        return result.transpose(1, 2)


def use_tensor_cores(stack: Any) -> None:
    """Convert the float32 layers of an encoder or decoder to 3xTF32, in place; do nothing without Triton."""
    if not triton_runs():
        return
    for layer in stack.layers:
        if layer.activation is F.relu and layer.fc1.weight.dtype == torch.float32:
            layer.fc1 = Float32Linear(layer.fc1, relu=True)
            layer.activation = activation_function("linear")
    for name, module in [*stack.named_modules()]:
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            stack.set_submodule(name, Float32Linear(module))
        elif Float32Attention.fits(module) and module.out_proj.weight.dtype == torch.float32:
            stack.set_submodule(name, Float32Attention(module))
