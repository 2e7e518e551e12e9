"""From a request's body to a prepared image: limits first, then decoding. Errors carry their HTTP status."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

from detr.image_processing.decode import DEFAULT_MAX_PIXELS, ImageError, image_size
from raydetr.errors import RequestError


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_bytes: int = 20 * 1024 * 1024
    """Size of the body."""
    max_pixels: int = DEFAULT_MAX_PIXELS
    """Height times width, read from the header before anything is decoded."""


async def read_body(chunks: AsyncIterator[bytes], declared: str | None, limits: Limits) -> bytes:
    """Collect a request's body, and stop as soon as it is over the limit.

    Args:
        chunks: of the body.
        declared: the Content-Length header, where there is one.
        limits: of the endpoint.

    Raises:
        RequestError: 400 for an empty body, 413 for one that is too large.
    """
    too_large = RequestError(413, f"The body is larger than {limits.max_bytes} bytes: send a smaller image.")
    if declared is not None and declared.isdecimal() and int(declared) > limits.max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > limits.max_bytes:
            raise too_large
    if not body:
        raise RequestError(400, "The body is empty: send the bytes of a JPEG, PNG or WebP file.")
    return bytes(body)


def check_image(data: bytes, limits: Limits) -> None:
    """Check an image by its header.

    Raises:
        RequestError: 415 where it is not an image, 413 where it has too many pixels.
    """
    try:
        height, width = image_size(data)
    except ImageError as error:
        raise RequestError(415, f"The body is not an image that can be read: {error}.") from error
    if height * width > limits.max_pixels:
        raise RequestError(
            413,
            f"The image has {height} x {width} pixels, the limit is {limits.max_pixels}: send a smaller one.",
        )
