"""Check the limits of one image of a request, and decode it. Errors carry their HTTP status."""

from dataclasses import dataclass, fields
from typing import NamedTuple

from detr.image_processing.container import read_container
from detr.image_processing.decode import (
    DEFAULT_MAX_COST,
    DEFAULT_MAX_PIXELS,
    WEB_FORMATS,
    ImageCostError,
    ImageError,
    Orientation,
    check_cost,
    decode_image,
    image_size,
    open_image,
)
from detr.image_processing.processor import DetrImageProcessor
from detr.inference.detector import PreparedImage, prepare_image
from raydetr.errors import ConfigError, RequestError


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Raises:
        ConfigError: a limit is not above 0.
    """

    max_bytes: int = 20 * 1024 * 1024
    """Maximum size of the body."""
    max_pixels: int = DEFAULT_MAX_PIXELS
    """Maximum height times width of an image, checked in the header before decoding. Decoding takes up to about 20
    bytes of memory per pixel."""
    max_images: int = 16
    """Maximum number of images in a multipart or JSON body."""
    body_s: float = 30.0
    """Time limit for the body to arrive, in seconds."""
    deadline_s: float = 60.0
    """Time limit for the response to start, in seconds from the arrival of the request."""
    decode_s: float = DEFAULT_MAX_COST
    """CPU time limit for decoding one image, in seconds: checked by an estimate first, then enforced."""
    max_bytes_in_flight: int = 256 * 1024 * 1024
    """Maximum total size of the bodies of all requests of a process; at least twice `max_bytes` is allowed."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"The limit {field.name} is {value}: it must be above 0.")


class Inspected(NamedTuple):
    """Cost of decoding an image, estimated from its structure."""

    pixels: int
    """Height times width."""
    seconds: float
    """Estimated CPU time."""


class CostlyImage(PreparedImage):
    """A prepared image of low priority: it was costly to decode, or its client has costly images waiting."""


def inspect_image(data: bytes, limits: Limits, number: int | None = None) -> Inspected:
    """Check an image by its header and structure, without decoding it.

    Args:
        data: encoded image.
        limits: `max_pixels` and `decode_s` apply.
        number: position of the image in its request, from 1, for the message; None for a single image.

    Raises:
        RequestError: 415 if it is not a JPEG, PNG or WebP image, 413 if it has too many pixels or would take too long
            to decode.
    """
    try:
        container = read_container(data)
        height, width = image_size(container, formats=WEB_FORMATS)
        if height * width > limits.max_pixels:
            raise RequestError(
                413,
                f"{describe_image(number)} has {height} x {width} pixels, the limit is {limits.max_pixels}: send a "
                "smaller one.",
            )
        return Inspected(height * width, check_cost(container, limits.decode_s, WEB_FORMATS))
    except ImageCostError as error:
        raise _too_costly(error, number) from error
    except ImageError as error:
        what = "The body" if number is None else f"Image {number}"
        raise RequestError(415, f"{what} is not a readable image: {error}.") from error


def prepare(
    data: bytes,
    image_processor: DetrImageProcessor,
    limits: Limits,
    number: int | None = None,
    orientation: Orientation = "ignore",
) -> PreparedImage:
    """Decode, resize and pad an image that has been inspected.

    Args:
        data: encoded image.
        image_processor: see `detr.inference.detector.prepare_image`.
        limits: `max_pixels` and `decode_s` apply.
        number: position of the image in its request, from 1, for messages; None for a single image.
        orientation: whether the image is turned upright by its EXIF orientation.

    Raises:
        RequestError: 413 if it would take too long, 400 if it is damaged or its shape cannot be resized.
    """
    try:
        decode = open_image if image_processor.keeps_gray else decode_image
        image = decode(
            data,
            limits.max_pixels,
            orientation=orientation,
            max_cost=limits.decode_s,
            formats=WEB_FORMATS,
        )
        return prepare_image(image, image_processor)
    except ImageCostError as error:
        raise _too_costly(error, number) from error
    except (ImageError, ValueError) as error:
        raise RequestError(400, f"{describe_image(number)} cannot be decoded: {error}.") from error


def _too_costly(error: ImageCostError, number: int | None) -> RequestError:
    return RequestError(413, f"{describe_image(number)} takes too long to decode: {error}.")


def describe_image(number: int | None) -> str:
    """Return the subject of a message about an image of a request."""
    return "The image" if number is None else f"Image {number}"
