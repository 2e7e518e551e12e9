"""The mask branch of the multi-scale architecture: the kernel of each query is applied to the finest feature map.

The logits of a mask are the product of the query's kernel with an embedding of every pixel, as in MaskFormer
(https://arxiv.org/abs/2107.06278), plus a polynomial of the pixel's coordinates relative to the query's box, which are
those of CondInst (https://arxiv.org/abs/2003.05664). The polynomial is a sum of a term of the column and a term of the
row, so it is cheap. Initially it describes the ellipse inscribed in the box: the masks of a new branch are as good as
its boxes, and only outlines need to be learned.

B batch, Q queries, D ``d_model``, K channels of a pixel, h x w size of the finest feature map.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.config import DetrConfig
from detr.model.multiscale.hybrid_encoder import SeparableConvolution
from detr.model.multiscale.tokens import TokenGrid

_MAX_COORDINATE = 1.5
"""Maximum absolute value of relative coordinates, in half box sizes: 0 is the center of the box, 1 its side."""

_INITIAL_WEIGHTS = (3.0, 0.0, -3.0, 0.0, 0.0, -3.0, 0.0)
"""Initial weights of the polynomial: of 1, of u, u^2 and u^4 of the column, and of u, u^2 and u^4 of the row. They give
3 (1 - u_column^2 - u_row^2), which is 0 on the ellipse inscribed in the box."""


@dataclass(frozen=True)
class DynamicMasks:
    """Everything needed to compute the masks of a batch, or of some of its queries.

    Attributes:
        pixels: float [B, K, h * w], embeddings of the pixels of the feature map.
        kernels: float [B, Q, K], kernels of the queries.
        coordinate_weights: float [B, Q, 7], weights of the polynomial; see `_INITIAL_WEIGHTS`.
        boxes_cxcywh: float [B, Q, 4], to which coordinates are relative; no gradient flows to them.
        columns: float [B, w], centers of the columns, in 0..1 of the image without its padding.
        rows: float [B, h], centers of the rows.
        cell_wh: float [B, 2], size of a pixel of the feature map, relative to the image without its padding.
        stride: stride of the feature map, in pixels of the image.
    """

    pixels: Tensor
    kernels: Tensor
    coordinate_weights: Tensor
    boxes_cxcywh: Tensor
    columns: Tensor
    rows: Tensor
    cell_wh: Tensor
    stride: int

    def select_queries(self, index: Tensor) -> DynamicMasks:
        """Select N queries of each image by their index int64 [B, N]."""
        kernels, weights, boxes = (
            each.gather(1, index[..., None].expand(-1, -1, each.shape[-1]))
            for each in (self.kernels, self.coordinate_weights, self.boxes_cxcywh)
        )
        return replace(self, kernels=kernels, coordinate_weights=weights, boxes_cxcywh=boxes)

    def logits(self) -> Tensor:
        """Compute the mask logits, float [B, Q, h, w]."""
        constant, x_weights, y_weights = self.coordinate_weights.split((1, 3, 3), -1)
        centers, sizes = self.boxes_cxcywh.split(2, -1)
        # The box is at least as large as a pixel of the feature map: a smaller one might not contain a pixel center.
        half = torch.maximum(sizes, self.cell_wh[:, None]) / 2
        column_terms = _axis_terms(self.columns, centers[..., :1], half[..., :1], x_weights)
        row_terms = _axis_terms(self.rows, centers[..., 1:], half[..., 1:], y_weights) + constant
        products = torch.bmm(self.kernels, self.pixels)
        height, width = self.rows.shape[1], self.columns.shape[1]
        image = products.reshape(*products.shape[:2], height, width)
        return image + row_terms[..., None] + column_terms[:, :, None]


def _axis_terms(centers: Tensor, box_center: Tensor, half: Tensor, weights: Tensor) -> Tensor:
    """Compute the polynomial of the relative coordinate along one axis, float [B, Q, n].

    Args:
        centers: float [B, n], centers of rows or columns.
        box_center: float [B, Q, 1], center of the box.
        half: float [B, Q, 1], half the size of the box.
        weights: float [B, Q, 3], of the first, second and fourth power.
    """
    relative = ((centers[:, None] - box_center) / half).clamp(-_MAX_COORDINATE, _MAX_COORDINATE)
    square = relative.square()
    first, second, fourth = weights.split(1, -1)
    return first * relative + second * square + fourth * square.square()


class MultiScaleMaskHead(nn.Module):
    """Prepare masks from the finest feature map of the encoder and the last hidden states of the decoder.

    Args:
        config: for D; K is a quarter of D.
        stride: stride of the finest feature map, in pixels.
    """

    def __init__(self, config: DetrConfig, stride: int) -> None:
        super().__init__()
        dim = config.d_model
        self.stride, self.channels = stride, dim // 4
        self.tower, self.pixels = SeparableConvolution(dim), nn.Conv2d(dim, self.channels, 1)
        self.hidden = nn.Linear(dim, dim)
        self.kernels = nn.Linear(dim, self.channels + len(_INITIAL_WEIGHTS))
        nn.init.zeros_(self.kernels.weight)
        nn.init.zeros_(self.kernels.bias)
        with torch.no_grad():
            self.kernels.bias[self.channels :] = torch.tensor(_INITIAL_WEIGHTS)

    def forward(self, finest: Tensor, grid: TokenGrid, states: Tensor, boxes_cxcywh: Tensor) -> DynamicMasks:
        """Prepare the masks of a batch.

        Args:
            finest: float [B, D, h, w], the finest feature map of the encoder.
            grid: grid of the tokens.
            states: float [B, Q, D], hidden states of the decoder.
            boxes_cxcywh: float [B, Q, 4], boxes of the decoder.
        """
        pixels = self.pixels(self.tower(finest, grid.masks(finest.dtype)[0]))
        height, width = grid.shapes[0]
        with torch.autocast(device_type=states.device.type, enabled=False):
            # Outside autocast, like the other heads: powers of coordinates cancel, which loses precision.
            dtype = boxes_cxcywh.dtype
            weights = self.kernels(F.silu(self.hidden(states.to(self.hidden.weight.dtype)))).to(dtype)
            kernels, coordinate_weights = weights.split((self.channels, len(_INITIAL_WEIGHTS)), -1)
            return DynamicMasks(
                pixels.flatten(2).to(dtype),
                kernels,
                coordinate_weights,
                boxes_cxcywh.detach(),
                grid.centers_xy[:, :width, 0].to(dtype),
                grid.centers_xy[:, : height * width : width, 1].to(dtype),
                grid.sizes_wh[:, 0].to(dtype),
                self.stride,
            )
