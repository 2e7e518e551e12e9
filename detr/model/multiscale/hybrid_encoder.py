"""The hybrid encoder of RT-DETR (https://arxiv.org/abs/2304.08069): attention on the coarsest map, convolutions below.

Self-attention over a map of stride 4 would cost 64 times the products of one of stride 16 twice over; what objects
have to do with one another is decided on the coarse map, and the finer ones only add where things are.

B batch, D ``d_model``; h_i, w_i size of map i, finest first.
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
"""The width and height of a token in its position embedding, which is that of a box."""


class PositionNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of a map, float [B, D, h, w] to the same shape.

    Its statistics are those of one position: they depend on neither padding nor the size of the image. ViTDet
    (https://arxiv.org/abs/2203.16527) has it in pyramid and heads too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SeparableConvolution(nn.Module):
    """3 x 3 depthwise, 1 x 1 pointwise, norm, SiLU: float [B, D, h, w] to the same shape."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.pointwise = nn.Conv2d(dim, dim, 1, bias=False)
        self.norm = PositionNorm(dim)

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        """Compute.

        Args:
            x: float [B, D, h, w].
            real: float [B, 1, h, w], 0 on padding, which is to look to the image as the zeros around a map do; None
                where there is none.
        """
        x = x if real is None else x * real
        return F.silu(self.norm(self.pointwise(self.depthwise(x))))


def token_positions(centers_xy: Tensor, dim: int) -> Tensor:
    """The position embeddings float [B, S, D] of tokens with centers float [B, S, 2]."""
    sizes = torch.full_like(centers_xy, _TOKEN_SIZE)
    return box_embedding(torch.cat((centers_xy, sizes), -1), dim)


class HybridEncoder(nn.Module):
    """Project the maps of the backbone, encode the coarsest one and fuse top-down.

    Args:
        config: D, the encoder's layers.
        channels: of the backbone's maps, finest first, each of twice the stride of the one before.
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
        """Encode.

        Args:
            maps: float [B, C_i, h_i, w_i], finest first.
            grid: of these maps.

        Returns:
            float [B, D, h_i, w_i] for every map.
        """
        projected = [project(each) for project, each in zip(self.projections, maps, strict=True)]
        coarsest = projected[-1].flatten(2).transpose(1, 2)
        keep = grid.per_map(grid.valid)[-1] if grid.padded else None
        position = token_positions(grid.per_map(grid.centers_xy)[-1], coarsest.shape[-1]).to(coarsest.dtype)
        encoded = self.encoder(coarsest, keep, position).last_hidden_state
        real = grid.masks(coarsest.dtype)
        above = self.fusions[-1](encoded.transpose(1, 2).reshape(projected[-1].shape), real[-1])
        fused = [above]
        for index in range(len(maps) - 2, -1, -1):
            # of 2 n or 2 n - 1 rows, row i is under row i // 2 of the coarser map: nearest gives just that
            above = F.interpolate(above, size=grid.shapes[index], mode="nearest")
            above = self.fusions[index](projected[index] + above, real[index])
            fused.insert(0, above)
        return fused
