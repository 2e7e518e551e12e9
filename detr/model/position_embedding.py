"""Position embeddings of the cells of a feature map.

B batch, D ``d_model``, h x w size of the feature map.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MAX_LEARNED_POSITIONS = 50


class SinePositionEmbedding(nn.Module):
    """Sines and cosines of the normalized row and column, half of the channels each ("Attention is all you need").

    Args:
        dim: D, a multiple of 4.
        temperature: base of the wavelengths.
    """

    def __init__(self, dim: int, temperature: float = 10000.0) -> None:
        super().__init__()
        self.half_dim = dim // 2
        self.temperature = temperature

    def forward(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed every cell by its position among the cells of its column and row that are not padding.

        Args:
            mask: bool [B, h, w], False on padding.
            dtype: of the result. For half precision, compute in float32 and round the result.

        Returns:
            ``dtype`` [B, D, h, w] in -1..1: the channels of the row, then those of the column.
        """
        compute = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        y = mask.cumsum(1, dtype=compute)
        x = mask.cumsum(2, dtype=compute)
        y = y / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
        x = x / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
        exponent = torch.arange(0, self.half_dim, 2, device=mask.device).to(compute) / self.half_dim
        wavelengths = self.temperature**exponent
        embedding = torch.cat((_sin_cos(y, wavelengths), _sin_cos(x, wavelengths)), dim=3)
        return embedding.permute(0, 3, 1, 2).to(dtype)


def _sin_cos(position: Tensor, wavelengths: Tensor) -> Tensor:
    """Compute sine and cosine for each wavelength, interleaved: from [B, h, w] and [n] to [B, h, w, 2 n]."""
    angle = position[..., None] / wavelengths
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(3)


class LearnedPositionEmbedding(nn.Module):
    """One learned vector per row and one per column, up to 50 of each.

    Args:
        dim: D, even.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.row_embeddings = nn.Embedding(MAX_LEARNED_POSITIONS, dim // 2)
        self.column_embeddings = nn.Embedding(MAX_LEARNED_POSITIONS, dim // 2)
        nn.init.uniform_(self.row_embeddings.weight)
        nn.init.uniform_(self.column_embeddings.weight)

    def forward(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed every cell by its row and column, including padding.

        Args:
            mask: bool [B, h, w]; only its shape is used.
            dtype: of the result.

        Returns:
            ``dtype`` [B, D, h, w]: the channels of the column, then those of the row.

        Raises:
            ValueError: the feature map has more than 50 rows or columns.
        """
        batch, height, width = mask.shape
        if height > MAX_LEARNED_POSITIONS or width > MAX_LEARNED_POSITIONS:
            raise ValueError(
                f"the feature map has {height} x {width} cells, but learned position embeddings support at most "
                f"{MAX_LEARNED_POSITIONS} x {MAX_LEARNED_POSITIONS}; use smaller images or "
                "position_embedding_type='sine'"
            )
        rows = self.row_embeddings.weight[:height, None].expand(-1, width, -1)
        columns = self.column_embeddings.weight[None, :width].expand(height, -1, -1)
        embedding = torch.cat((columns, rows), dim=-1).permute(2, 0, 1)
        return embedding.to(dtype).expand(batch, -1, -1, -1)
