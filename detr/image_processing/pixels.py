"""Operations on pixels that every way into the model shares: resizing."""

import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

BILINEAR = 2
"""Pillow's number for bilinear resampling, as `preprocessor_config.json` stores it."""

_INTERPOLATION = {
    0: InterpolationMode.NEAREST_EXACT,
    1: InterpolationMode.LANCZOS,
    BILINEAR: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
}


def resize(image: torch.Tensor, size: tuple[int, int], resample: int = BILINEAR) -> torch.Tensor:
    """Resize [..., channels, height, width] to `size` = (height, width) with antialiasing, keeping the dtype.

    `resample` is Pillow's number of the filter. uint8 stays uint8 (torch's integer kernel where the CPU has one,
    else float32 and rounding; they differ by at most one grey level). An image of that size already is returned
    as it is.
    """
    if resample not in _INTERPOLATION:
        raise ValueError(
            f"resample is {resample!r}: expected one of Pillow's numbers, "
            "0 (nearest), 1 (Lanczos), 2 (bilinear) or 3 (bicubic)"
        )
    return tv.resize(image, list(size), interpolation=_INTERPOLATION[resample], antialias=True)
