"""Images by where they are: an address, a file, a data URI, or already in memory."""

import base64
import binascii
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from detr.image_processing.decode import ImageError, open_image

ImageSource = str | Path | bytes | Image.Image | np.ndarray | torch.Tensor

DEFAULT_TIMEOUT = 30.0


def load_image(
    source: ImageSource, timeout: float | None = DEFAULT_TIMEOUT
) -> Image.Image | np.ndarray | torch.Tensor:
    """Fetch and decode an image; one that is in memory already is returned as it is.

    Args:
        source: an http(s) address, which asks for the network; the path of a file; a `data:image/...;base64,` URI;
            an encoded image; or a Pillow image, numpy array or tensor.
        timeout: seconds to wait for a server to connect and for each piece of its answer; None waits for ever.

    Returns:
        Pillow images turned upright by their EXIF tag, as in transformers' pipelines; arrays and tensors unchanged.

    Raises:
        ImageError: the address does not give an image, the message says why, or the image cannot be decoded.
        FileNotFoundError: there is no such file.
        TypeError: none of these.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        return source
    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source)
    if isinstance(source, bytes):
        return _decode(source, "the image")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return _decode(_fetch(source, timeout), source)
    if isinstance(source, str) and source.startswith("data:image/"):
        try:
            return _decode(base64.b64decode(source.partition(",")[2], validate=True), "the data URI")
        except binascii.Error as error:
            raise ImageError(f"the data URI {source[:40]}... is not base64: {error}") from error
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no image file {source}; an address begins with http:// or https://, base64 with data:image/"
            )
        return _decode(path.read_bytes(), str(source))
    raise TypeError(
        f"an image is a {type(source).__name__}: expected an address, a path, bytes, a PIL image, a numpy array or a "
        "tensor"
    )


def _fetch(address: str, timeout: float | None) -> bytes:
    import httpx  # 0.1 s to import, and rarely needed

    try:
        response = httpx.get(address, timeout=timeout, follow_redirects=True)
        response.raise_for_status()
    except httpx.TimeoutException as error:
        raise ImageError(f"{address}: the server did not answer within {timeout} s") from error
    except httpx.HTTPStatusError as error:
        reason = f"{error.response.status_code} {error.response.reason_phrase}"
        raise ImageError(f"{address}: the server answered {reason}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ImageError(f"{address}: cannot be fetched: {error}") from error
    return response.content


def _decode(data: bytes, where: str) -> Image.Image:
    try:
        return open_image(data, orientation="apply")
    except ImageError as error:
        raise type(error)(f"{where}: {error}") from error
