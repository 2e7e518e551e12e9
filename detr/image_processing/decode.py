"""Decode encoded images into RGB pixels: all encoded images enter the library here.

The decoded image is a uint8 tensor [3, height, width] whose memory is interleaved (channels last), as decoders write
it: `image.permute(1, 2, 0)` is contiguous. torch's uint8 resize of an interleaved image is three times as fast as that
of a planar one, with the same result.

The decoding time is estimated first, because decoding cannot be cancelled, and neither file size nor pixel count bounds
its time. To parse a file only once, pass the same `Container` to several of these functions in place of the bytes.
"""

import io
import math
import struct
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from detr.image_processing.container import Container, read_container

try:
    import simplejpeg  # type: ignore[import-untyped,import-not-found,unused-ignore]
except ImportError:  # optional: decodes the same pixels in about half the time
    simplejpeg = None

WEB_FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats that browsers and phones send, by Pillow's names."""

FORMATS = (*WEB_FORMATS, "BMP", "GIF", "TIFF", "PPM")
"""Supported formats. JPEG 2000 is not, since its header does not show the decoding time, and EPS is not, since Pillow
runs an interpreter on its data."""

DEFAULT_MAX_PIXELS = 89_478_485
"""Maximum height times width of an image: Pillow's own limit (a quarter of a GiB of RGB)."""

DEFAULT_MAX_COST = 10.0
"""Maximum estimated decoding time in seconds: see `decode_cost`."""

Orientation: TypeAlias = Literal["apply", "ignore"]
"""Whether to rotate an image upright by its EXIF orientation."""

# EXIF orientation → transpose that makes the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Exceptions of Pillow's readers for damaged data (the same as in PIL.Image.open), and that of its size limit.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    TypeError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
    Warning,  # if warnings are turned into errors
)


class ImageError(ValueError):
    """An image that cannot be read or converted to RGB; the message gives the reason."""


class ImageCostError(ImageError):
    """An image that would take too long to decode."""


def image_size(
    data: bytes | Container, orientation: Orientation = "ignore", formats: Sequence[str] = FORMATS
) -> tuple[int, int]:
    """Read an image's (height, width) from its header, without decoding it.

    Args:
        data: an encoded image.
        orientation: "apply" returns the size after the EXIF rotation, as `decode_image` does with it.
        formats: accepted formats, a subset of `FORMATS`.

    Raises:
        ImageError: the bytes are not an image in one of the formats.
        ImageCostError: the file has more than `detr.image_processing.container.MAX_PARTS` parts.
    """
    check_orientation(orientation)
    container = _container(data)
    with _open(container, formats) as image:
        width, height = image.size
    is_rotated = orientation == "apply" and container.orientation > 4
    return (width, height) if is_rotated else (height, width)


def image_orientation(data: bytes | Container) -> int:
    """Return the EXIF orientation of an encoded JPEG, PNG, WebP or TIFF image.

    Returns:
        1 (upright) to 8, as EXIF defines it; 1 if it is absent or invalid. 5 to 8 swap height and width.
    """
    return _container(data).orientation


def decode_cost(data: bytes | Container, formats: Sequence[str] = FORMATS) -> float:
    """Estimate the CPU seconds that `decode_image` takes, from the structure of the file, without decoding it.

    Args:
        data: an encoded image.
        formats: accepted formats, a subset of `FORMATS`.

    Returns:
        Seconds on a slow core; `benchmarks/decoding_cost.py` compares them with measured times.

    Raises:
        ImageError: as `image_size`.
    """
    container = _container(data)
    with _open(container, formats) as image:
        return _cost(container, image)


def check_cost(
    data: bytes | Container, max_cost: float = DEFAULT_MAX_COST, formats: Sequence[str] = FORMATS
) -> float:
    """Raise an error if an image would take too long to decode.

    Args:
        data: an encoded image.
        max_cost: maximum of `decode_cost` in seconds.
        formats: accepted formats, a subset of `FORMATS`.

    Returns:
        The estimated seconds.

    Raises:
        ImageCostError: the estimate is above `max_cost`; the message names the cause.
        ImageError: as `image_size`.
    """
    container = _container(data)
    with _open(container, formats) as image:
        return _check_cost(container, image, max_cost)


def decode_image(
    data: bytes | Container,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    *,
    orientation: Orientation = "ignore",
    max_cost: float = DEFAULT_MAX_COST,
    formats: Sequence[str] = FORMATS,
) -> torch.Tensor:
    """Decode an encoded image into RGB.

    Gray, palette, transparent, CMYK and 16-bit images are converted by `convert_to_rgb`. Of an animation the first
    frame is decoded.

    Args:
        data: an encoded image. The format is detected from its content.
        max_pixels: maximum height times width, checked in the header before decoding. Pillow, which decodes everything
            but JPEGs, itself rejects more than twice the default.
        orientation: "ignore" keeps the stored pixels, to which the annotations of most data sets refer; "apply"
            rotates them upright by their EXIF orientation, as browsers do.
        max_cost: maximum of `decode_cost` in seconds, checked before decoding.
        formats: accepted formats, a subset of `FORMATS`.

    Returns:
        uint8 [3, height, width] of 0..255, interleaved in memory.

    Raises:
        ImageCostError: the image would take too long to decode.
        ImageError: the bytes are not an image of these formats, are truncated or damaged, exceed `max_pixels`, or have
            pixels without a defined range.
        ValueError: `orientation` has another value.
    """
    check_orientation(orientation)
    container = _container(data)
    pixels = _decode_jpeg(container, max_pixels, max_cost, formats)
    if pixels is None:
        pixels = _rgb_pixels(_load(container, max_pixels, max_cost, formats))
    if orientation == "apply" and container.orientation != 1:
        return pil_to_tensor(_rotate_upright(Image.fromarray(pixels), container, orientation))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def open_image(
    data: bytes | Container,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    *,
    orientation: Orientation = "ignore",
    max_cost: float = DEFAULT_MAX_COST,
    formats: Sequence[str] = FORMATS,
) -> Image.Image:
    """Decode an encoded image into a Pillow image of its own mode: see `decode_image` for arguments and errors."""
    check_orientation(orientation)
    container = _container(data)
    return _rotate_upright(_load(container, max_pixels, max_cost, formats), container, orientation)


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert a Pillow image of any mode to mode RGB; an RGB image without transparency is returned unchanged.

    Transparency is composited on white, as in transformers. 16-bit gray is converted by taking the high byte of each
    value, as Pillow does for 16-bit color. (Pillow's own conversion clips 16-bit gray at 255.)

    Raises:
        ImageError: the range of pixels is unknown: they are floating-point, or 32-bit integers outside 0..65535.
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


def _rgb_pixels(image: Image.Image) -> np.ndarray:
    """Convert to uint8 [height, width, 3] as `convert_to_rgb` does, strip by strip to save memory.

    A conversion of the whole image would take four bytes per pixel for each of its steps.
    """
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return np.repeat(_high_byte(image)[..., None], 3, axis=2)
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = np.asarray(convert_to_rgb(image.crop((0, top, width, bottom))))
    return pixels


_STRIP_PIXELS = 100_000


def _decode_jpeg(
    container: Container, max_pixels: int, max_cost: float, formats: Sequence[str]
) -> np.ndarray | None:
    """Decode a JPEG to uint8 [height, width, 3]; None if Pillow must convert it or report the error."""
    if simplejpeg is None or "JPEG" not in formats or container.data[:2] != b"\xff\xd8":
        return None
    if container.seconds > max_cost:
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(container.data)
        if height * width > max_pixels or colors not in ("YCbCr", "RGB", "Gray"):
            return None
        return simplejpeg.decode_jpeg(container.data, colorspace="RGB", fastdct=False, fastupsample=False)
    except ValueError:  # simplejpeg raises on any warning of libjpeg; Pillow decodes slightly damaged files
        return None


def _load(container: Container, max_pixels: int, max_cost: float, formats: Sequence[str]) -> Image.Image:
    """Check the limits, then decode with Pillow."""
    image = _open(container, formats)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"the image is {height} x {width} = {height * width:,} pixels, more than the limit of "
            f"{max_pixels:,}: make it smaller or raise max_pixels"
        )
    _check_cost(container, image, max_cost)
    try:
        image.load()
    except _DAMAGED as error:
        raise ImageError(f"the {image.format} image cannot be decoded: {error}") from error
    return image


def _rotate_upright(image: Image.Image, container: Container, orientation: Orientation) -> Image.Image:
    upright = _UPRIGHT.get(container.orientation) if orientation == "apply" else None
    return image if upright is None else image.transpose(upright)


def check_orientation(orientation: str) -> None:
    """Raise a ValueError if the value is not an `Orientation`."""
    if orientation not in get_args(Orientation):
        raise ValueError(f"orientation is {orientation!r}: expected one of {get_args(Orientation)}")


def _container(data: bytes | Container) -> Container:
    return data if isinstance(data, Container) else read_container(data)


def _check_cost(container: Container, image: Image.Image, max_cost: float) -> float:
    seconds = _cost(container, image)
    if not seconds <= max_cost:
        width, height = image.size
        what = ", ".join(filter(None, (container.detail, f"{height} x {width} pixels")))
        raise ImageCostError(
            f"the {image.format} image would take about {seconds:,.0f} s to decode ({what}), more than the limit of "
            f"{max_cost:g} s: save it as a baseline JPEG or raise max_cost"
        )
    return seconds


def _cost(container: Container, image: Image.Image) -> float:
    """Estimate the seconds to decode an opened image and to convert it to RGB."""
    pixels = image.width * image.height
    seconds = container.seconds + pixels * _PIXEL_S.get(image.format or "", 0.0)
    if image.has_transparency_data:
        seconds += pixels * _COMPOSITE_S
    if image.format == "TIFF":
        compression = str(image.info.get("compression"))
        seconds += len(container.data) * _TIFF_BYTE_S.get(compression, 15e-9)
        if compression in ("jpeg", "tiff_jpeg"):
            seconds += pixels * container.jpeg_passes * _JPEG_PASS_S
    elif container.data[:2] in (b"P1", b"P2", b"P3"):
        seconds += len(container.data) * _PPM_TEXT_S
    elif image.format == "GIF":
        seconds += min(len(container.data), 1.5 * pixels) * _GIF_BYTE_S  # LZW takes at most 12 bits a pixel
    return seconds


# Costs that `Container.seconds` does not include, measured on the same core. Seconds per pixel, with the conversion:
_PIXEL_S = {"PNG": 1.5e-9, "WEBP": 9e-9, "BMP": 2e-9, "GIF": 4e-9, "TIFF": 2.5e-9, "PPM": 2e-9}
_COMPOSITE_S = 8e-9
_JPEG_PASS_S = 7e-9
# Seconds per byte:
_GIF_BYTE_S = 7e-9
_PPM_TEXT_S = 200e-9
_TIFF_BYTE_S = {
    "raw": 0.3e-9,
    "packbits": 0.3e-9,
    "zstd": 1e-9,
    "tiff_lzw": 3e-9,
    "tiff_adobe_deflate": 4e-9,
} | {
    "lzma": 25e-9,
    "jpeg": 2e-9,
}


def _open(container: Container, formats: Sequence[str]) -> Image.Image:
    """Open an image lazily: read only its header."""
    data = container.data
    if math.isinf(container.seconds):
        raise ImageCostError(f"the image has {container.detail}: save it again with an image editor")
    try:
        return Image.open(io.BytesIO(data), formats=tuple(formats))
    except UnidentifiedImageError:
        start = bytes(data[:16])
        raise ImageError(
            f"not an image that can be read ({', '.join(formats)}): {len(data)} bytes that start with {start!r}"
        ) from None
    except _DAMAGED as error:
        raise ImageError(f"the image's header cannot be read: {error}") from error


def _high_byte(image: Image.Image) -> np.ndarray:
    """Return the high byte uint8 [height, width] of a gray image with 16-bit values (modes I;16*, I)."""
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
