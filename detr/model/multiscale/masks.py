"""The mask branch of the multi-scale architecture: each query's kernel on the pixels of the finest map.

A mask is the product of what a query looks for with an embedding of every pixel, as in MaskFormer
(https://arxiv.org/abs/2107.06278), plus a term of the pixel's place in the query's box: the relative coordinates of
CondInst (https://arxiv.org/abs/2003.05664). That term depends on rows and columns separately, so that it costs nothing, and
starts as the ellipse in the box: masks of a new branch are as good as the boxes, and what is learned is their outline.

B batch, Q queries, D ``d_model``, K channels of a pixel, h x w the finest map.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.config import DetrConfig
from detr.model.multiscale.hybrid_encoder import SeparableConvolution
from detr.model.multiscale.tokens import TokenGrid

_REACH = 1.5
"""In half box sizes: from there on a pixel is outside of the box and nothing more."""

_START = (3.0, 0.0, -3.0, 0.0, 0.0, -3.0, 0.0)
"""Of the place's terms in a new branch: 1, then u, u^2 and u^4 of the column, then of the row; 0 on the ellipse in the box."""


@dataclass(frozen=True)
class DynamicMasks:
    """The masks of a batch before they are computed: those that are needed are made by `logits`.

    Attributes:
        pixels: float [B, K, h * w].
        kernels: float [B, Q, K], of each query.
        places: float [B, Q, 7], weights of the terms of the place; see `_START`.
        boxes_cxcywh: float [B, Q, 4], in which places are; no gradient flows to them.
        columns: float [B, w], centers of the columns, 0..1 in the image without its padding.
        rows: float [B, h].
        cell_wh: float [B, 2], size of a pixel of the map, relative to that image.
        stride: of the map, in pixels of the image.
    """

    pixels: Tensor
    kernels: Tensor
    places: Tensor
    boxes_cxcywh: Tensor
    columns: Tensor
    rows: Tensor
    cell_wh: Tensor
    stride: int

    def of_queries(self, index: Tensor) -> DynamicMasks:
        """The same for some queries of each image: int64 [B, N]."""
        kernels, places, boxes = (
            each.gather(1, index[..., None].expand(-1, -1, each.shape[-1]))
            for each in (self.kernels, self.places, self.boxes_cxcywh)
        )
        return replace(self, kernels=kernels, places=places, boxes_cxcywh=boxes)

    def logits(self) -> Tensor:
        """The masks, float [B, Q, h, w]."""
        place, along_x, along_y = self.places.split((1, 3, 3), -1)
        centers, sizes = self.boxes_cxcywh.split(2, -1)
        # a box smaller than a pixel of the map still has the pixel in which it lies
        half = torch.maximum(sizes, self.cell_wh[:, None]) / 2
        of_columns = _profile(self.columns, centers[..., :1], half[..., :1], along_x)
        of_rows = _profile(self.rows, centers[..., 1:], half[..., 1:], along_y) + place
        products = torch.bmm(self.kernels, self.pixels)
        height, width = self.rows.shape[1], self.columns.shape[1]
        image = products.reshape(*products.shape[:2], height, width)
        return image + of_rows[..., None] + of_columns[:, :, None]


def _profile(centers: Tensor, of_box: Tensor, half: Tensor, weights: Tensor) -> Tensor:
    """A query's weighted powers of the relative coordinate along one side: float [B, Q, n].

    Args:
        centers: float [B, n], of rows or columns.
        of_box: float [B, Q, 1], center of the box.
        half: float [B, Q, 1], half its size.
        weights: float [B, Q, 3], of the first, second and fourth power.
    """
    relative = ((centers[:, None] - of_box) / half).clamp(-_REACH, _REACH)
    square = relative.square()
    first, second, fourth = weights.split(1, -1)
    return first * relative + second * square + fourth * square.square()


class MultiScaleMaskHead(nn.Module):
    """Make masks of the encoder's finest map and the decoder's last states.

    Args:
        config: D; K is a quarter of it.
        stride: of the finest map, in pixels.
    """

    def __init__(self, config: DetrConfig, stride: int) -> None:
        super().__init__()
        dim = config.d_model
        self.stride, self.channels = stride, dim // 4
        self.tower, self.pixels = SeparableConvolution(dim), nn.Conv2d(dim, self.channels, 1)
        self.hidden, self.kernels = nn.Linear(dim, dim), nn.Linear(dim, self.channels + len(_START))
        nn.init.zeros_(self.kernels.weight)
        nn.init.zeros_(self.kernels.bias)
        with torch.no_grad():
            self.kernels.bias[self.channels :] = torch.tensor(_START)

    def forward(self, finest: Tensor, grid: TokenGrid, states: Tensor, boxes_cxcywh: Tensor) -> DynamicMasks:
        """Prepare the masks of a batch.

        Args:
            finest: float [B, D, h, w], of the encoder.
            grid: of its tokens.
            states: float [B, Q, D], of the decoder.
            boxes_cxcywh: float [B, Q, 4], of the decoder.
        """
        pixels = self.pixels(self.tower(finest, grid.masks(finest.dtype)[0]))
        height, width = grid.shapes[0]
        with torch.autocast(device_type=states.device.type, enabled=False):
            # as the other heads outside autocast: powers of coordinates cancel
            dtype = boxes_cxcywh.dtype
            weights = self.kernels(F.silu(self.hidden(states.to(self.hidden.weight.dtype)))).to(dtype)
            kernels, places = weights.split((self.channels, len(_START)), -1)
            return DynamicMasks(
                pixels.flatten(2).to(dtype),
                kernels,
                places,
                boxes_cxcywh.detach(),
                grid.centers_xy[:, :width, 0].to(dtype),
                grid.centers_xy[:, : height * width : width, 1].to(dtype),
                grid.sizes_wh[:, 0].to(dtype),
                self.stride,
            )
