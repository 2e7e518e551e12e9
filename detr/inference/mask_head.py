"""The mask head for inference: what an enlarged map repeats is not computed again.

- A 3 x 3 convolution of a map that nearest neighbours have doubled sees only 2 x 2 different pixels. So each of the four
  phases of its result is a 2 x 2 convolution of the small map, with kernels whose elements are summed where they meet
  the same pixel: 16 products instead of 36, and the doubled map is never made (the sub-pixel convolution of Shi et al.,
  2016, read the other way).
- The image's maps are added before these convolutions, so by linearity they pass through them once for all queries.

The plain head beside it is the test (`tests/detr/inference/test_mask_head.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.model.capture import may_branch_on_values
from detr.model.mask_head import MaskHead
from detr.model.outputs import MaskContext


class FastMaskHead(MaskHead):
    """The same masks as a head's, without gradients.

    Args:
        head: in evaluation mode, its parameters without gradients; they are shared where they stay as they are.
    """

    def __init__(self, head: MaskHead) -> None:
        nn.Module.__init__(self)
        self.dim = head.dim
        self.activation = F.relu_ if head.activation is F.relu else head.activation
        self.gn1, self.gn2 = head.gn1, head.gn2
        self.adapters = nn.ModuleList([head.adapter1, head.adapter2, head.adapter3])
        weight, bias = head.lay1.weight, head.lay1.bias
        self.image_lay1 = _convolution(weight[:, : self.dim], bias)
        self.attention_lay1 = _convolution(weight[:, self.dim :], None)
        self.lay2 = head.lay2
        self.stages: Any = nn.ModuleList(
            [
                _Stage(layer, norm)
                for layer, norm in ((head.lay3, head.gn3), (head.lay4, head.gn4), (head.lay5, head.gn5))
            ]
        )
        self.out_lay = head.out_lay
        self.eval()

    def context(self, projected: Tensor, maps: Sequence[Tensor], attention: Tensor) -> MaskContext:
        """See `MaskHead.context`; the maps are those of the stages' results, not of what is added before them."""
        base = self.image_lay1(projected)
        deep, middle, shallow = (
            stage.plain(adapter(each)) + stage.bias[:, None, None]
            for stage, adapter, each in zip(self.stages, self.adapters, maps[2::-1], strict=True)
        )
        return MaskContext(
            base, (deep, middle, shallow), attention.reshape(*attention.shape[:-1], *projected.shape[-2:])
        )

    def _masks(self, context: MaskContext, image: Tensor, query: Tensor) -> Tensor:
        def of_image(maps: Tensor) -> Tensor:
            return maps if may_branch_on_values() and len(maps) == 1 else maps[image]

        attention = context.attention[image, query].contiguous(memory_format=torch.channels_last)
        x = self.normed(self.attention_lay1(attention) + of_image(context.base), self.gn1)
        x, norm = self.lay2(x), self.gn2
        for stage, shared in zip(self.stages, context.maps, strict=True):
            x, norm = self._stage(stage, self.normed(x, norm), of_image(shared)), stage.norm
        return self.last(x, norm)

    def _stage(self, stage: Any, x: Tensor, shared: Tensor) -> Tensor:
        """Nearest neighbours to another size, a sum, and a 3 x 3 convolution.

        Args:
            stage: a `_Stage`.
            x: float [M, C, h, w], what is enlarged.
            shared: float [1 or M, C', H, W], the convolution, with its bias, of what would be added.

        Returns:
            float [M, C', H, W].
        """
        small, size = x.shape[-2:], shared.shape[-2:]
        doubled = may_branch_on_values() and all(
            large in (2 * least, 2 * least - 1) for large, least in zip(size, small, strict=True)
        )
        if not doubled:
            return stage.plain(F.interpolate(x, size=size, mode="nearest")) + shared
        y = self.enlarged(stage.phases(x), shared)
        for dim in (-2, -1):
            if size[dim] % 2:
                _mend_last(stage, y, x, shared, dim)
        return y

    def enlarged(self, parts: Tensor, shared: Tensor) -> Tensor:
        """The phases of an enlarged map in their places, plus what the image's map adds.

        Args:
            parts: float [M, 4 C', h + 1, w + 1].
            shared: float [1 or M, C', H, W], H 2h or 2h - 1, W likewise.
        """
        # The result for the pixel (2i + a, 2j + b) is that of the phase (a, b) at (i + a, j + b).
        parts = parts.unflatten(1, (2, 2, -1))
        shape = (len(parts), *shared.shape[1:])
        y = torch.empty(shape, dtype=parts.dtype, device=parts.device, memory_format=torch.channels_last)
        for a in range(2):
            for b in range(2):
                of_phase = y[..., a::2, b::2]
                h, w = of_phase.shape[-2:]
                torch.add(parts[:, a, b, :, a : a + h, b : b + w], shared[..., a::2, b::2], out=of_phase)
        return y

    def normed(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """Norm and activation; ``x`` may be written to."""
        return self.activation(norm(x))

    def last(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """Norm, activation and the convolution to one channel: float [M, C, H, W] to [M, H, W]."""
        return self.out_lay(self.normed(x, norm))[:, 0]


class _Stage(nn.Module):
    """The kernels of a 3 x 3 convolution of an enlarged map.

    Args:
        layer: the convolution.
        norm: what follows.
    """

    def __init__(self, layer: nn.Conv2d, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.bias, self.norm = layer.bias, norm
        self.phases = _convolution(_phases(layer.weight), None)
        self.plain = _convolution(layer.weight, None)


def _mend_last(stage: Any, y: Tensor, x: Tensor, shared: Tensor, dim: int) -> None:
    """Of an odd number of rows the last one, or column: the doubled map is cut there, and zeros follow."""
    last = min(x.shape[dim], 2)
    size = [*y.shape[-2:]]
    size[dim] = 2 * last
    doubled = F.interpolate(x.narrow(dim, -last, last), size=size, mode="nearest")
    doubled = doubled.narrow(dim, 0, 2 * last - 1)
    end = stage.plain(doubled.contiguous(memory_format=torch.channels_last))
    y.narrow(dim, -1, 1).copy_(end.narrow(dim, -1, 1) + shared.narrow(dim, -1, 1))


def _phases(weight: Tensor) -> Tensor:
    """Kernels of the four phases of a doubled map, float [4 C', C, 2, 2], of one for that map, float [C', C, 3, 3]."""

    def halves(kernel: Tensor, dim: int) -> Tensor:
        first, second, third = kernel.unbind(dim)
        return torch.stack(
            [torch.stack([first, second + third], dim), torch.stack([first + second, third], dim)]
        )

    by_column = halves(weight, 3)  # [2, C', C, 3, 2]
    return halves(by_column, 3).flatten(0, 2)


def _convolution(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    wide, narrow, *size = weight.shape
    convolution = nn.Conv2d(narrow, wide, (size[0], size[1]), padding=1, bias=False, device="meta")
    weight = weight.detach().contiguous(memory_format=torch.channels_last)
    convolution.weight = nn.Parameter(weight, requires_grad=False)
    convolution.bias = bias
    return convolution
