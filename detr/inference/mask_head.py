"""The mask head for inference: it computes repeated pixels of enlarged maps only once.

- A 3 x 3 convolution of a map that was doubled by nearest-neighbor interpolation sees only 2 x 2 distinct pixels. So
  each of the four phases of its result is a 2 x 2 convolution of the small map. Elements of the 3 x 3 kernel that meet
  the same pixel are summed. This needs 16 products instead of 36, and the doubled map is never stored (the sub-pixel
  convolution of Shi et al., 2016, applied in reverse).
- The feature maps of the image are added before these convolutions. Convolutions are linear, so the feature maps are
  convolved once for all queries, and the result is added afterwards.

`tests/detr/inference/test_mask_head.py` compares it with the plain head.
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
    """A faster mask head with the same masks, without gradients.

    Args:
        head: in evaluation mode, with parameters that need no gradient; unchanged parameters are shared.
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
        """See `MaskHead.context`; here the maps have passed through the convolutions of their stages."""
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
        x = self.normalize(self.attention_lay1(attention) + of_image(context.base), self.gn1)
        x, norm = self.lay2(x), self.gn2
        for stage, shared in zip(self.stages, context.maps, strict=True):
            x, norm = self._run_stage(stage, self.normalize(x, norm), of_image(shared)), stage.norm
        return self.final_layer(x, norm)

    def _run_stage(self, stage: Any, x: Tensor, shared: Tensor) -> Tensor:
        """Enlarge by nearest-neighbor interpolation, add the feature map, and apply a 3 x 3 convolution.

        Args:
            stage: a `_Stage`.
            x: float [M, C, h, w], the map to enlarge.
            shared: float [1 or M, C', H, W], the convolution, with its bias, of the feature map.

        Returns:
            float [M, C', H, W].
        """
        small, size = x.shape[-2:], shared.shape[-2:]
        doubled = may_branch_on_values() and all(
            after in (2 * before, 2 * before - 1) for after, before in zip(size, small, strict=True)
        )
        if not doubled:
            return stage.plain(F.interpolate(x, size=size, mode="nearest")) + shared
        y = self.interleave(stage.phases(x), shared)
        for dim in (-2, -1):
            if size[dim] % 2:
                _recompute_last(stage, y, x, shared, dim)
        return y

    def interleave(self, phases: Tensor, shared: Tensor) -> Tensor:
        """Interleave the four phases of an enlarged map, and add the convolved feature map.

        Args:
            phases: float [M, 4 C', h + 1, w + 1].
            shared: float [1 or M, C', H, W], where H is 2h or 2h - 1, and W is 2w or 2w - 1.
        """
        # The pixel (2i + a, 2j + b) of the result is the pixel (i + a, j + b) of phase (a, b).
        phases = phases.unflatten(1, (2, 2, -1))
        shape = (len(phases), *shared.shape[1:])
        y = torch.empty(shape, dtype=phases.dtype, device=phases.device, memory_format=torch.channels_last)
        for a in range(2):
            for b in range(2):
                of_phase = y[..., a::2, b::2]
                h, w = of_phase.shape[-2:]
                torch.add(phases[:, a, b, :, a : a + h, b : b + w], shared[..., a::2, b::2], out=of_phase)
        return y

    def normalize(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """Apply a norm and the activation; may overwrite ``x``."""
        return self.activation(norm(x))

    def final_layer(self, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        """Apply a norm, the activation and the convolution to one channel: float [M, C, H, W] to [M, H, W]."""
        return self.out_lay(self.normalize(x, norm))[:, 0]


class _Stage(nn.Module):
    """The kernels of a 3 x 3 convolution of an enlarged map: the plain one, and those of the four phases.

    Args:
        layer: the convolution.
        norm: the norm that follows.
    """

    def __init__(self, layer: nn.Conv2d, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.bias, self.norm = layer.bias, norm
        self.phases = _convolution(_phases(layer.weight), None)
        self.plain = _convolution(layer.weight, None)


def _recompute_last(stage: Any, y: Tensor, x: Tensor, shared: Tensor, dim: int) -> None:
    """Recompute the last row or column of a result of odd size, in place.

    The doubled map is one pixel shorter there and zero padding follows, while the phases used the repeated pixel.
    """
    last = min(x.shape[dim], 2)
    size = [*y.shape[-2:]]
    size[dim] = 2 * last
    doubled = F.interpolate(x.narrow(dim, -last, last), size=size, mode="nearest")
    doubled = doubled.narrow(dim, 0, 2 * last - 1)
    end = stage.plain(doubled.contiguous(memory_format=torch.channels_last))
    y.narrow(dim, -1, 1).copy_(end.narrow(dim, -1, 1) + shared.narrow(dim, -1, 1))


def _phases(weight: Tensor) -> Tensor:
    """Convert a kernel for a doubled map, float [C', C, 3, 3], to kernels of its four phases, float [4 C', C, 2, 2].

    In one dimension, the pixels 2i and 2i + 1 of the doubled map are both the pixel i of the small one. So the kernel
    (k0, k1, k2) becomes (k0, k1 + k2) on the small pixels (i - 1, i) for even results, and (k0 + k1, k2) on (i, i + 1)
    for odd ones.
    """

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
