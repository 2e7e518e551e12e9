"""Convert segment ids to and from the colors of COCO's panoptic PNGs: id = R + 256 G + 256 * 256 B."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def rgb_to_id(color: Any) -> Any:
    """Convert colors to ids.

    Args:
        color: 0..255, array or tensor [height, width, 3], or a sequence of three numbers.

    Returns:
        [height, width], int32 for uint8 colors, else of their dtype; an int for three numbers.
    """
    if isinstance(color, np.ndarray | torch.Tensor) and color.ndim == 3:
        if isinstance(color, np.ndarray):
            color = color.astype(np.int32) if color.dtype == np.uint8 else color
        elif color.dtype == torch.uint8:
            color = color.to(torch.int32)
        return color[..., 0] + 256 * color[..., 1] + 256 * 256 * color[..., 2]
    return int(color[0]) + 256 * int(color[1]) + 256 * 256 * int(color[2])


def id_to_rgb(id_map: Any) -> Any:
    """Convert ids to colors.

    Args:
        id_map: an integer array or tensor of any shape, or one integer; 0..16,777,215.

    Returns:
        uint8 [..., 3], an array for an array and a tensor for a tensor; a list of three integers for one integer.
    """
    if isinstance(id_map, torch.Tensor):
        return torch.stack([id_map % 256, id_map // 256 % 256, id_map // 65536 % 256], dim=-1).to(torch.uint8)
    if isinstance(id_map, np.ndarray):
        return np.stack([id_map % 256, id_map // 256 % 256, id_map // 65536 % 256], axis=-1).astype(np.uint8)
    red_green_blue: Sequence[int] = (id_map % 256, id_map // 256 % 256, id_map // 65536 % 256)
    return list(red_green_blue)
