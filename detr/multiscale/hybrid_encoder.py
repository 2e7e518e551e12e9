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
from detr.initialization import init_as_original
from detr.multiscale.tokens import TokenGrid, box_embedding
from detr.transformer import Encoder

GROUPS = 8
"""Of every group norm: statistics of one image alone, so that an output does not depend on the batch."""

_TOKEN_SIZE = 0.1
"""The width and height of a token in its position embedding, which is that of a box."""


def separable_convolution(dim: int) -> nn.Sequential:
    """3 x 3 depthwise, 1 x 1 pointwise, group norm, SiLU: float [B, D, h, w] to the same shape."""
    return nn.Sequential(
        nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
        nn.Conv2d(dim, dim, 1, bias=False),
        nn.GroupNorm(GROUPS, dim),
        nn.SiLU(),
    )


def token_positions(grid: TokenGrid, dim: int) -> Tensor:
    """The position embeddings of all tokens, float [B, S, D]."""
    sizes = torch.full_like(grid.centers_xy, _TOKEN_SIZE)
    return box_embedding(torch.cat((grid.centers_xy, sizes), -1), dim)


class HybridEncoder(nn.Module):
    """Project the maps of the backbone, encode the coarsest one and fuse top-down.

    Args:
        config: D, the encoder's layers.
        channels: of the backbone's maps, finest first, each of twice the stride of the one before.
    """

    def __init__(self, config: DetrConfig, channels: Sequence[int]) -> None:
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(count, config.d_model, 1, bias=False), nn.GroupNorm(GROUPS, config.d_model)
            )
            for count in channels
        )
        self.encoder = Encoder(config)
        init_as_original(self.encoder)
        self.fusions = nn.ModuleList(separable_convolution(config.d_model) for _ in channels)

    def forward(self, maps: Sequence[Tensor], grid: TokenGrid, positions: Tensor) -> list[Tensor]:
        """Encode.

        Args:
            maps: float [B, C_i, h_i, w_i], finest first.
            grid: of these maps.
            positions: float [B, S, D].

        Returns:
            float [B, D, h_i, w_i] for every map.
        """
        projected = [project(each) for project, each in zip(self.projections, maps, strict=True)]
        coarsest = projected[-1].flatten(2).transpose(1, 2)
        keep = grid.per_map(grid.valid)[-1] if grid.padded else None
        position = grid.per_map(positions)[-1].to(coarsest.dtype)
        encoded = self.encoder(coarsest, keep, position).last_hidden_state
        above = self.fusions[-1](encoded.transpose(1, 2).reshape(projected[-1].shape))
        fused = [above]
        for index in range(len(maps) - 2, -1, -1):
            # of 2 n or 2 n - 1 rows, row i is under row i // 2 of the coarser map: nearest gives just that
            above = F.interpolate(above, size=grid.shapes[index], mode="nearest")
            above = self.fusions[index](projected[index] + above)
            fused.insert(0, above)
        return fused
