"""Convert images of any supported type and layout to tensors [channels, height, width]."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from detr.image_processing.decode import convert_to_rgb, pil_to_tensor

ImageInput: TypeAlias = Image.Image | np.ndarray | torch.Tensor

_LAYOUTS = ("channels_first", "channels_last")
_GRAY_16 = ("I;16", "I;16L", "I;16B", "I;16N")


def list_images(images: Any) -> list[ImageInput]:
    """Flatten an image, a batch of images (4 dimensions), or a possibly nested sequence of these into a list.

    Raises:
        TypeError: an element is not a Pillow image, a numpy array or a torch tensor.
        ValueError: an array does not have 2, 3 or 4 dimensions.
    """
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, np.ndarray | torch.Tensor):
        if images.ndim not in (2, 3, 4):
            raise ValueError(
                f"an image array has shape {tuple(images.shape)}: expected [height, width], three dimensions with "
                "the channels, or four with a batch"
            )
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return [image for element in images for image in list_images(element)]
    raise TypeError(
        f"an image is a {type(images).__name__}: expected a PIL image, a numpy array, a torch tensor or a list of "
        "these (decode bytes with detr.image_processing.decode.decode_image)"
    )


def image_to_tensor(
    image: ImageInput, do_convert_rgb: bool, input_data_format: str | None, keep_gray: bool = False
) -> torch.Tensor:
    """Convert one image to a tensor.

    Args:
        image: an element of the result of `list_images`.
        do_convert_rgb: convert to three channels: Pillow images by `convert_to_rgb`; in arrays, gray is repeated, RGBA
            is composited on white, and uint16 is reduced to its high byte.
        input_data_format: "channels_first" or "channels_last" for arrays. By default the layout is inferred from which
            of the first and the last dimension is 1, 3 or 4; if both are, the first dimension is the channels.
        keep_gray: leave gray images at one channel of 8 bits, whatever `do_convert_rgb` is.

    Returns:
        [channels, height, width], of the dtype and value range of the image.

    Raises:
        ImageError: a Pillow image cannot be converted.
        TypeError: `image` is not an image, or an array does not hold real numbers.
        ValueError: the number of dimensions is wrong, values are not finite, the layout cannot be inferred, or the
            number of channels cannot be converted.
    """
    if isinstance(image, Image.Image):
        if keep_gray and image.mode in ("1", "L", "I") + _GRAY_16:
            gray = torch.from_numpy(np.array(convert_to_rgb(image).getchannel(0)))
            return gray[None]
        if do_convert_rgb:
            return pil_to_tensor(convert_to_rgb(image))
        tensor, input_data_format = torch.from_numpy(np.array(image)), "channels_last"
    elif isinstance(image, np.ndarray | torch.Tensor):
        _check_array(image)
        # Copy read-only arrays, such as those of Pillow images: torch warns about them.
        writable = np.require(image, requirements=["C", "W"]) if isinstance(image, np.ndarray) else image
        tensor = torch.from_numpy(writable) if isinstance(writable, np.ndarray) else writable
    else:
        raise TypeError(
            f"an image is a {type(image).__name__}: expected a PIL image, a numpy array or a torch tensor"
        )
    if tensor.ndim == 2:
        tensor, input_data_format = tensor[None], "channels_first"
    if (input_data_format or _infer_layout(tensor)) == "channels_last":
        tensor = tensor.permute(2, 0, 1)
    elif input_data_format not in (None, *_LAYOUTS):
        raise ValueError(f"input_data_format is {input_data_format!r}: expected one of {_LAYOUTS}")
    if 0 in tensor.shape:
        raise ValueError(f"an image has shape {tuple(tensor.shape)}: it has no pixels")
    if keep_gray and tensor.shape[0] == 1:
        return _high_byte(tensor)
    return _array_to_rgb(tensor) if do_convert_rgb else tensor


def _check_array(image: np.ndarray | torch.Tensor) -> None:
    if image.ndim not in (2, 3):
        raise ValueError(
            f"an image array has shape {tuple(image.shape)}: expected [height, width], or three dimensions with the "
            "channels"
        )
    if isinstance(image, np.ndarray):
        floating, numeric = image.dtype.kind == "f", image.dtype.kind in "buif"
    else:
        floating, numeric = image.is_floating_point(), not image.is_complex()
    if not numeric:
        raise TypeError(f"an image array has dtype {image.dtype}: expected real numbers")
    # Check the sum first, which needs no second array: it is not finite if any value is not.
    if (
        floating
        and not np.isfinite(float(image.sum()))
        and not bool(torch.isfinite(torch.as_tensor(image)).all())
    ):
        raise ValueError("an image array has NaN or infinite values")


def _infer_layout(image: torch.Tensor) -> str:
    if image.shape[0] in (1, 3, 4):
        return "channels_first"
    if image.shape[-1] in (1, 3, 4):
        return "channels_last"
    raise ValueError(
        f"an image array has shape {tuple(image.shape)}: neither the first nor the last dimension is 1, 3 or 4 "
        "channels; give input_data_format"
    )


def _array_to_rgb(image: torch.Tensor) -> torch.Tensor:
    """Convert an array to RGB as transformers does; uint16 is reduced to its high byte."""
    image = _high_byte(image)
    channels = image.shape[0]
    if channels == 1:
        return image.expand(3, -1, -1)
    if channels == 4:
        if image.is_floating_point() and (image.min() < 0 or image.max() > 1):
            raise ValueError(
                f"an RGBA image has floating-point values from {image.min():g} to {image.max():g}: its transparency "
                "can be composited for values in 0..1 only; convert it to RGB first"
            )
        return _composite_on_white(image)
    if channels != 3:
        raise ValueError(
            f"an image has {channels} channels: 1, 3 or 4 can be converted to RGB; set do_convert_rgb=False for a "
            "model with other channels"
        )
    return image


def _high_byte(image: torch.Tensor) -> torch.Tensor:
    return (image.to(torch.int32) >> 8).to(torch.uint8) if image.dtype == torch.uint16 else image


def _composite_on_white(rgba: torch.Tensor) -> torch.Tensor:
    """Composite RGBA [4, height, width], 0..255 or floating-point 0..1, on white: RGB of the same dtype.

    Bitwise equal to transformers.
    """
    values = rgba.to(torch.float32)
    if not rgba.is_floating_point():
        values = values * (1.0 / 255)
    rgb = values[:3] * values[3:] + (1 - values[3:])
    return rgb.to(rgba.dtype) if rgba.is_floating_point() else rgb.mul(256.0 - 1e-3).to(rgba.dtype)
