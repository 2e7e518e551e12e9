"""The hybrid encoder of RT-DETR (https://arxiv.org/abs/2304.08069).

Self-attention runs on the coarsest feature map only, convolutions on the others. The cost of self-attention is
quadratic in the number of tokens, and a feature map of stride 4 has 16 times as many tokens as one of stride 16.
Attention on the coarsest feature map relates objects to each other; the finer feature maps add their positions.

B batch, D ``d_model``; h_i, w_i size of feature map i, finest first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr.config import DetrConfig
from detr.model.initialization import init_as_original
from detr.model.multiscale.tokens import TokenGrid, box_embedding
from detr.model.transformer import Encoder

_TOKEN_SIZE = 0.1
"""Width and height of tokens in their position embeddings, which are box embeddings."""


class PositionNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of a feature map.

    Statistics are computed for each position, so they depend neither on padding nor on the size of the image. ViTDet
    (https://arxiv.org/abs/2203.16527) uses it in its pyramid and heads.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize float [B, D, h, w] to the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SeparableConvolution(nn.Module):
    """3 x 3 depthwise convolution, 1 x 1 pointwise convolution, norm and SiLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.pointwise = nn.Conv2d(dim, dim, 1, bias=False)
        self.norm = PositionNorm(dim)

    def forward(self, x: Tensor, valid_mask: Tensor | None) -> Tensor:
        """Compute float [B, D, h, w] from float [B, D, h, w].

        Args:
            x: float [B, D, h, w].
            valid_mask: float [B, 1, h, w], 1 on the image, 0 on padding; None means no padding. Padding is set to zero,
                so that the result on the image equals that without padding, where the convolution pads with zeros.
        """
        x = x if valid_mask is None else x * valid_mask
        return F.silu(self.norm(self.pointwise(self.depthwise(x))))


def token_positions(centers_xy: Tensor, dim: int) -> Tensor:
    """Compute the position embeddings float [B, S, D] of tokens with centers float [B, S, 2]."""
    sizes = torch.full_like(centers_xy, _TOKEN_SIZE)
    return box_embedding(torch.cat((centers_xy, sizes), -1), dim)


class HybridEncoder(nn.Module):
    """Project the feature maps of the backbone, encode the coarsest one and fuse them top-down.

    Args:
        config: for D and the layers of the encoder.
        channels: of the backbone's feature maps, finest first; strides must double from one to the next.
    """

    def __init__(self, config: DetrConfig, channels: Sequence[int]) -> None:
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(count, config.d_model, 1, bias=False), PositionNorm(config.d_model))
            for count in channels
        )
        self.encoder = Encoder(config)
        init_as_original(self.encoder)
        self.fusions = nn.ModuleList(SeparableConvolution(config.d_model) for _ in channels)

    def forward(self, maps: Sequence[Tensor], grid: TokenGrid) -> list[Tensor]:
        """Encode the feature maps.

        Args:
            maps: float [B, C_i, h_i, w_i], finest first.
            grid: grid of their tokens.

        Returns:
            float [B, D, h_i, w_i] for every feature map.
        """
        projected = [project(each) for project, each in zip(self.projections, maps, strict=True)]
        coarsest = projected[-1].flatten(2).transpose(1, 2)
        attend_mask = grid.per_map(grid.valid)[-1] if grid.padded else None
        position = token_positions(grid.per_map(grid.centers_xy)[-1], coarsest.shape[-1]).to(coarsest.dtype)
        encoded = self.encoder(coarsest, attend_mask, position).last_hidden_state
        valid_masks = grid.masks(coarsest.dtype)
        coarser = self.fusions[-1](encoded.transpose(1, 2).reshape(projected[-1].shape), valid_masks[-1])
        fused = [coarser]
        for index in range(len(maps) - 2, -1, -1):
            # Row i of the finer feature map lies in row i // 2 of the coarser one. Nearest interpolation gives this for
            # a finer map of 2 n rows as well as of 2 n - 1 rows.
            upsampled = F.interpolate(coarser, size=grid.shapes[index], mode="nearest")
            coarser = self.fusions[index](projected[index] + upsampled, valid_masks[index])
            fused.insert(0, coarser)
        return fused
