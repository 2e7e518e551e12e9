"""From encoded bytes to RGB pixels: the one way an image enters the library.

The decoded image is a uint8 tensor [3, height, width] whose memory is interleaved (channels last), as decoders
write it: `image.permute(1, 2, 0)` is contiguous, and torch's uint8 resize of it is three times as fast as that of
a planar one, with the same result.

EXIF rotation is applied on request only: annotations may be in the coordinates of the stored pixels.
"""

import io
import struct
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg  # type: ignore[import-untyped,import-not-found,unused-ignore]
except ImportError:  # optional: the same pixels in about half the time
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""What is decoded, by Pillow's names; not EPS, for which Pillow starts an interpreter on the data."""

DEFAULT_MAX_PIXELS = 89_478_485
"""Height times width up to which an image is decoded: Pillow's own limit (a quarter of a GiB of RGB)."""

# What Pillow's readers raise on damaged data (PIL.Image.open lists the same ones), its limit on sizes included.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    TypeError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
    Warning,  # where warnings are errors
)


_EXIF_ORIENTATION = 0x0112
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels.transpose(1, 0, 2)[:, ::-1],
    7: lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda pixels: pixels.transpose(1, 0, 2)[::-1],
}
"""EXIF orientation → the upright pixels [height, width, 3] of stored ones."""


class ImageError(ValueError):
    """An image that cannot be read or converted to RGB; the message gives the reason."""


def image_size(data: bytes) -> tuple[int, int]:
    """Read an image's (height, width) from its header, without decoding it.

    Raises:
        ImageError: the bytes are not an image in one of `FORMATS`.
    """
    with _open(data) as image:
        width, height = image.size
    return height, width


def decode_image(
    data: bytes,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    orientation: Literal["apply", "ignore"] = "ignore",
) -> torch.Tensor:
    """Decode an encoded image into RGB.

    Grey, palette, transparent, CMYK and 16-bit images are converted as `convert_to_rgb` does; of an animation the
    first frame is taken.

    Args:
        data: an image in one of `FORMATS`.
        max_pixels: compared with the header's height times width before anything is decoded. Pillow itself, which
            decodes all but JPEGs, refuses more than twice the default.
        orientation: apply turns the image as its EXIF says, ignore leaves the pixels as they are stored.

    Returns:
        uint8 [3, height, width] of 0..255, interleaved in memory.

    Raises:
        ImageError: the bytes are not such an image, are cut short or damaged, are too large, or have pixels without
            a defined range.
    """
    if orientation == "apply":
        with _open(data) as image:
            exif = exif_orientation(image)
        stored = decode_image(data, max_pixels).permute(1, 2, 0).numpy()
        return torch.from_numpy(np.ascontiguousarray(_TURNS[exif](stored))).permute(2, 0, 1)
    pixels = _decode_jpeg(data, max_pixels)
    if pixels is not None:
        return torch.from_numpy(pixels).permute(2, 0, 1)
    with _open(data) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                f"the image is {height} x {width} = {height * width:,} pixels, more than the limit of "
                f"{max_pixels:,}: make it smaller or raise max_pixels"
            )
        try:
            image.load()
        except _DAMAGED as error:
            raise ImageError(f"the {image.format} image cannot be decoded: {error}") from error
        return pil_to_tensor(convert_to_rgb(image))


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 (upright) to 8; 1 where there is none that can be read."""
    # The base class's method: PNG's own decodes the whole image to look for EXIF after its pixels.
    try:
        orientation = Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing about orientation
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert a Pillow image of any mode to mode RGB; an RGB image without transparency is returned as it is.

    Transparency is composited on white, as transformers does. 16-bit grey keeps its range: the high byte of each
    value is taken, as Pillow does for 16-bit colour (Pillow's own conversion clips 16-bit grey at 255).

    Raises:
        ImageError: floating-point pixels, or 32-bit integers outside 0..65535, whose range is unknown.
    """
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return Image.fromarray(_high_byte(image)).convert("RGB")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def pil_to_tensor(image: Image.Image) -> torch.Tensor:
    """Copy a Pillow image of mode RGB into uint8 [3, height, width], interleaved in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _decode_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Uint8 [height, width, 3] of a JPEG; None where Pillow has to convert it, or to say what is wrong."""
    if simplejpeg is None or data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > max_pixels or colors not in ("YCbCr", "RGB", "Gray"):
            return None
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
    except ValueError:  # whatever libjpeg warns about; Pillow decodes slightly damaged files
        return None


def _open(data: bytes) -> Image.Image:
    """Open an image lazily: only its header is read."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        start = bytes(data[:16])
        raise ImageError(
            f"not an image that can be read ({', '.join(FORMATS)}): {len(data)} bytes that begin with {start!r}"
        ) from None
    except _DAMAGED as error:
        raise ImageError(f"the image's header cannot be read: {error}") from error


def _high_byte(image: Image.Image) -> np.ndarray:
    """The high byte uint8 [height, width] of a grey image with 16-bit values (modes I;16*, I)."""
    values = np.asarray(image)
    if image.mode == "F":
        raise ImageError(
            "the image has floating-point pixels, whose range is unknown: convert it to 8 bits first"
        )
    if image.mode == "I" and values.size and (values.min() < 0 or values.max() > 65535):
        raise ImageError(
            f"the image has 32-bit pixels from {values.min()} to {values.max()}; 0..65535 is expected: "
            "convert it to 8 or 16 bits first"
        )
    return (values >> 8).astype(np.uint8)
