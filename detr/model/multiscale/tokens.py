"""Positions of the tokens of several feature maps.

A token is one position of one feature map. B batch, S tokens of all feature maps, finest first. Coordinates are
relative to the image without its padding, like those of labels, so they do not depend on the padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detr.model.capture import is_all_ones


@dataclass(frozen=True)
class TokenGrid:
    """Geometry of the tokens of a batch.

    Attributes:
        shapes: (height, width) of every feature map.
        centers_xy: float [B, S, 2], centers of the tokens; in 0..1 on the image.
        sizes_wh: float [B, S, 2], sizes of the tokens: the stride relative to the image.
        valid: bool [B, S], False on padding.
        padded: whether any token may be padding; if not, masks are not needed.
    """

    shapes: tuple[tuple[int, int], ...]
    centers_xy: Tensor
    sizes_wh: Tensor
    valid: Tensor
    padded: bool

    def per_map(self, tokens: Tensor) -> list[Tensor]:
        """Split [B, S, ...] into one [B, h * w, ...] per feature map."""
        return list(tokens.split([height * width for height, width in self.shapes], dim=1))

    def masks(self, dtype: torch.dtype) -> list[Tensor] | list[None]:
        """Return one mask [B, 1, h, w] per feature map, 1 on the image, 0 on padding; None if not `padded`."""
        if not self.padded:
            return [None] * len(self.shapes)
        valid = zip(self.per_map(self.valid), self.shapes, strict=True)
        return [each.unflatten(1, shape)[:, None].to(dtype) for each, shape in valid]


def token_grid(
    pixel_values: Tensor, pixel_mask: Tensor | None, maps: Sequence[Tensor], strides: Sequence[int]
) -> TokenGrid:
    """Compute the token grid of the feature maps of a batch.

    Args:
        pixel_values: float [B, channels, H, W].
        pixel_mask: [B, H, W], nonzero on real pixels, a rectangle in the top left corner; None means no padding.
        maps: float [B, C_i, h_i, w_i], finest first.
        strides: of the feature maps, in pixels.
    """
    batch, device = pixel_values.shape[0], pixel_values.device
    dtype = torch.float64 if pixel_values.dtype == torch.float64 else torch.float32
    shapes = tuple((each.shape[-2], each.shape[-1]) for each in maps)
    if pixel_mask is None:
        height, width = pixel_values.shape[-2:]
        sizes = torch.stack(
            [torch.full((batch,), side, dtype=dtype, device=device) for side in (width, height)], 1
        )
    else:
        real = pixel_mask != 0
        sizes = torch.stack((real[:, 0].sum(1), real[:, :, 0].sum(1)), 1).to(dtype)
    corners, extents = [], []
    for (height, width), stride in zip(shapes, strides, strict=True):
        y, x = (torch.arange(side, dtype=dtype, device=device) * stride for side in (height, width))
        corners.append(torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), -1).flatten(0, 1))
        extents.append(torch.full_like(corners[-1], stride))
    corner, extent, whole = torch.cat(corners), torch.cat(extents), sizes.clamp(min=1)[:, None]
    return TokenGrid(
        shapes,
        (corner + 0.5 * extent) / whole,
        extent / whole,
        # As many tokens as without padding: a token is valid if its top left corner lies on the image.
        (corner < sizes[:, None]).all(-1),
        pixel_mask is not None and not is_all_ones(pixel_mask),
    )


def box_embedding(boxes_cxcywh: Tensor, dim: int) -> Tensor:
    """Compute a sine embedding of boxes, like that of the anchor boxes of DAB-DETR (https://arxiv.org/abs/2201.12329).

    Args:
        boxes_cxcywh: float [..., 4], relative to the image.
        dim: D, a multiple of 8.

    Returns:
        float [..., D] in -1..1.
    """
    # The shortest wavelength has 20 periods over the image, so that adjacent tokens differ.
    exponent = torch.arange(dim // 8, dtype=boxes_cxcywh.dtype, device=boxes_cxcywh.device) / (dim // 8)
    angle = boxes_cxcywh[..., None] * (2 * math.pi * 20) / 10000**exponent
    return torch.cat((angle.sin(), angle.cos()), -1).flatten(-2)
