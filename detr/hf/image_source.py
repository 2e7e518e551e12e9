"""Load images from URLs, files, data URIs, base64 or memory."""

import base64
import binascii
import os
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
import torch
from PIL import Image, ImageOps

from detr.image_processing.decode import ImageError, Orientation, open_image

ImageSource = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryIO
    | Image.Image
    | np.ndarray
    | torch.Tensor
)

DEFAULT_TIMEOUT = 30.0

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
"""First bytes of image files. They distinguish base64 images from misspelled paths, which may be valid base64 too."""


def is_image_source(value: Any) -> TypeGuard[ImageSource]:
    """Return whether a value is the source of a single image."""
    return isinstance(
        value, str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray | torch.Tensor
    ) or hasattr(value, "read")


def load_image(
    source: ImageSource, timeout: float | None = DEFAULT_TIMEOUT, orientation: Orientation = "apply"
) -> Image.Image | np.ndarray | torch.Tensor:
    """Fetch and decode an image; an array or a tensor is returned unchanged.

    Args:
        source: an http(s) URL, which is downloaded; the path of a file; base64, with or without the prefix
            `data:image/...;base64,`; an encoded image as bytes or as a file opened in binary mode; or a Pillow image,
            numpy array or tensor.
        timeout: seconds to wait for the connection and for each chunk of the response; None waits forever.
        orientation: "apply" rotates Pillow and encoded images upright by their EXIF orientation, as transformers'
            pipelines do; "ignore" does not.

    Returns:
        A Pillow image, or the array or tensor that was passed.

    Raises:
        ImageError: the URL cannot be fetched or is not an image, or the image cannot be decoded.
        FileNotFoundError: the file does not exist.
        TypeError: the source has another type, or a file is not open in binary mode.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        return source
    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source) if orientation == "apply" else source
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(bytes(source), "the image", orientation)
    if isinstance(source, str):
        return _load_text(source, timeout, orientation)
    if isinstance(source, os.PathLike):
        if not Path(source).is_file():
            raise FileNotFoundError(f"no image file {source}")
        return _decode(Path(source).read_bytes(), str(source), orientation)
    if hasattr(source, "read"):
        data = source.read()
        if not isinstance(data, bytes):
            raise TypeError(f"the file {source!r} is not open in binary mode: open it with mode 'rb'")
        return _decode(data, f"the file {getattr(source, 'name', source)!s:.100}", orientation)
    raise TypeError(
        f"an image is a {type(source).__name__}: expected a URL, a path, base64, bytes, a binary file, a PIL image, a "
        "numpy array or a tensor"
    )


def _load_text(text: str, timeout: float | None, orientation: Orientation) -> Image.Image:
    if text[:8].lower().startswith(("http://", "https://")):
        return _decode(_fetch(text, timeout), text, orientation)
    if text.startswith("data:image/"):
        try:
            return _decode(
                base64.b64decode(text.partition(",")[2], validate=True), "the data URI", orientation
            )
        except binascii.Error as error:
            raise ImageError(f"the data URI {text[:40]}... is not base64: {error}") from error
    try:
        is_file = Path(text).is_file()
    except (OSError, ValueError):  # too long for a path, or contains a null byte
        is_file = False
    if is_file:
        return _decode(Path(text).read_bytes(), text, orientation)
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except ValueError:  # not base64, or not ASCII
        data = b""
    if data.startswith(_SIGNATURES):
        return _decode(data, "the base64 text", orientation)
    raise FileNotFoundError(
        f"no image file {text[:100]!r}; it is not a URL (http:// or https://), and the text is not base64 of an image"
    )


def _fetch(url: str, timeout: float | None) -> bytes:
    import httpx  # 0.1 s to import, and rarely needed

    try:
        response = httpx.get(url, timeout=timeout, follow_redirects=True)
        response.raise_for_status()
    except httpx.TimeoutException as error:
        raise ImageError(f"{url}: the server did not answer within {timeout} s") from error
    except httpx.HTTPStatusError as error:
        reason = f"{error.response.status_code} {error.response.reason_phrase}"
        raise ImageError(f"{url}: the server answered {reason}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageError(f"{url}: cannot be fetched: {error}") from error
    return response.content


def _decode(data: bytes, where: str, orientation: Orientation) -> Image.Image:
    try:
        return open_image(data, orientation=orientation)
    except ImageError as error:
        raise type(error)(f"{where}: {error}") from error
