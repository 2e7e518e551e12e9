"""Resize, normalize and pad pixels: the operations shared by all inputs of a model."""

import platform
from collections.abc import Sequence

import torch

NEAREST = 0
"""Pillow's number for nearest-neighbor resampling."""

BILINEAR = 2
"""Pillow's number for bilinear resampling, as `preprocessor_config.json` stores it."""

_INTERPOLATION = {0: "nearest-exact", 1: "lanczos", BILINEAR: "bilinear", 3: "bicubic"}


def resize(image: torch.Tensor, size: tuple[int, int], resample: int = BILINEAR) -> torch.Tensor:
    """Resize an image, or images of one size, with antialiasing.

    Args:
        image: [..., channels, height, width]. uint8 stays uint8: it is resized by torch's integer kernel if the CPU
            has one, else in float32 with rounding. The two differ by at most one gray level.
        size: (height, width) of the result. An image that already has this size is returned unchanged.
        resample: Pillow's number of the filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic.

    Returns:
        [..., channels, *size] of the same dtype.

    Raises:
        ValueError: `resample` is not one of these numbers.
    """
    if resample not in _INTERPOLATION:
        raise ValueError(
            f"resample is {resample!r}: expected one of Pillow's numbers, "
            "0 (nearest), 1 (Lanczos), 2 (bilinear) or 3 (bicubic)"
        )
    # Equal to torchvision's resize, whose import alone would cost a data task several seconds of CPU time.
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    mode = _INTERPOLATION[resample]
    smooth = mode != "nearest-exact"
    native = image.dtype in (torch.float32, torch.float64) or (
        image.dtype == torch.uint8 and (not smooth or _resizes_uint8(image.device, mode))
    )
    batch = image.reshape(-1, *image.shape[-3:])
    resized = torch.nn.functional.interpolate(
        _set_interleaved_strides(batch) if native else batch.float(),
        size=size,
        mode=mode,
        align_corners=False if smooth else None,
        antialias=smooth,
    )
    if not native:
        if mode in ("bicubic", "lanczos") and image.dtype == torch.uint8:
            resized = resized.clamp_(0, 255)
        if not image.is_floating_point():
            resized = resized.round_()
        resized = resized.to(image.dtype)
    return resized.reshape(*image.shape[:-2], *resized.shape[-2:])


def _set_interleaved_strides(batch: torch.Tensor) -> torch.Tensor:
    """Set the strides of a single interleaved uint8 image so that torch's result is interleaved too: 3 times as fast.

    The batch stride of a single image is ambiguous, and torch treats the image as planar (pytorch issue 68430).
    """
    if batch.dtype != torch.uint8 or len(batch) != 1 or batch.stride(1) != 1:
        return batch
    batch = batch.contiguous(memory_format=torch.channels_last)
    return batch.as_strided(batch.shape, (batch.numel(), *batch.stride()[1:]))


def _resizes_uint8(device: torch.device, mode: str) -> bool:
    """Return whether torch has an integer kernel for this smooth filter on this device."""
    if device.type != "cpu":
        return False
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return mode != "bilinear" or fast or platform.machine() in ("aarch64", "arm64")


def channel_values(values: float | Sequence[float], rescale_factor: float | None) -> torch.Tensor:
    """Return a mean or standard deviation as float32 [channels, 1, 1] (or [1, 1, 1]), in units of unscaled pixels.

    `rescale_factor` is the factor of the rescale before normalization; None without one. Dividing the mean and the
    standard deviation by it replaces the multiplication of all pixels.
    """
    tensor = torch.tensor(values, dtype=torch.float32)
    if rescale_factor is not None:
        tensor = tensor * (1.0 / rescale_factor)
    return tensor.reshape(-1, 1, 1)


def normalize(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Compute (images - mean) / std in float32 for [..., channels, height, width]; see `channel_values`."""
    if images.dtype != torch.uint8:  # uint8 minus a float32 mean is float32 without an extra copy
        images = images.to(torch.float32)
    return images.sub(mean).div_(std)


def pad_to_batch(images: Sequence[torch.Tensor], size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack images [channels, height, width], each padded with zeros to `size` at the bottom and on the right.

    Returns:
        The batch [batch, channels, *size] of the images' dtype, and the pixel mask int64 [batch, *size], 1 on images.

    Raises:
        ValueError: an image is larger than `size`, or the numbers of channels differ.
    """
    channels = images[0].shape[0]
    batch = images[0].new_zeros((len(images), channels, *size))
    mask = torch.zeros((len(images), *size), dtype=torch.int64, device=batch.device)
    for index, image in enumerate(images):
        height, width = image.shape[-2:]
        if height > size[0] or width > size[1]:
            raise ValueError(
                "Padding dimensions are negative. Please make sure that the padded size is larger than the original "
                f"size. Got padded size: {tuple(size)}, original size: {(height, width)} (image {index})."
            )
        if image.shape[0] != channels:
            raise ValueError(
                f"image {index} has {image.shape[0]} channels, image 0 has {channels}: a batch needs equal ones"
            )
        batch[index, :, :height, :width] = image
        mask[index, :height, :width] = 1
    return batch, mask


def clear_padding(batch: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> None:
    """Zero, in place, the padding around images of the given (height, width) in [batch, ..., H, W]."""
    for image, (height, width) in zip(batch, sizes):
        image[..., height:, :] = 0
        image[..., :height, width:] = 0
