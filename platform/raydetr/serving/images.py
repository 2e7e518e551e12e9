"""What one image of a request may cost: limits first, then decoding. Errors carry their HTTP status."""

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
    """What one request may ask for.

    Raises:
        ConfigError: one of them is not above 0.
    """

    max_bytes: int = 20 * 1024 * 1024
    """Size of the body."""
    max_pixels: int = DEFAULT_MAX_PIXELS
    """Height times width of an image, read from the header before anything is decoded. Decoding takes up to about 20
    bytes of memory for each."""
    max_images: int = 16
    """In a body of several."""
    body_s: float = 30.0
    """Time in which the body has to arrive, in seconds."""
    deadline_s: float = 60.0
    """Time in which the answer has to begin, in seconds from the request's arrival."""
    decode_s: float = DEFAULT_MAX_COST
    """Processor time for decoding one image, in seconds: estimated before, and enforced while it is decoded."""
    max_bytes_in_flight: int = 256 * 1024 * 1024
    """Size of the bodies of all requests of a process together; at least twice `max_bytes` is allowed."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"The limit {field.name} is {value}: it has to be above 0.")


class Inspected(NamedTuple):
    """What an image's structure says about the work of decoding it."""

    pixels: int
    """Height times width."""
    seconds: float
    """Estimated processor time."""


class CostlyImage(PreparedImage):
    """A prepared image of low priority: it was costly to decode, or its client has costly ones waiting."""


def inspect_image(data: bytes, limits: Limits, number: int | None = None) -> Inspected:
    """Check an image by its header and structure, without decoding it.

    Args:
        data: encoded.
        limits: `max_pixels` and `decode_s` count here.
        number: of the image in its request, from 1, for the message; None for the only one.

    Raises:
        RequestError: 415 where it is not a JPEG, PNG or WebP image, 413 where it has too many pixels or would take
            too long to decode.
    """
    try:
        container = read_container(data)
        height, width = image_size(container, formats=WEB_FORMATS)
        if height * width > limits.max_pixels:
            raise RequestError(
                413,
                f"{called(number)} has {height} x {width} pixels, the limit is {limits.max_pixels}: send a smaller "
                "one.",
            )
        return Inspected(height * width, check_cost(container, limits.decode_s, WEB_FORMATS))
    except ImageCostError as error:
        raise _too_costly(error, number) from error
    except ImageError as error:
        what = "The body" if number is None else f"Image {number}"
        raise RequestError(415, f"{what} is not an image that can be read: {error}.") from error


def prepare(
    data: bytes,
    image_processor: DetrImageProcessor,
    limits: Limits,
    number: int | None = None,
    orientation: Orientation = "ignore",
) -> PreparedImage:
    """Decode an image that has been inspected, resize and pad it.

    Args:
        data: encoded.
        image_processor: see `detr.inference.detector.prepare_image`.
        limits: `max_pixels` and `decode_s` count here.
        number: of the image in its request, from 1, for messages; None for the only one.
        orientation: whether the image is turned upright by its EXIF orientation.

    Raises:
        RequestError: 413 where it would take too long, 400 where it is damaged or of a shape that cannot be resized.
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
        raise RequestError(400, f"{called(number)} cannot be decoded: {error}.") from error


def _too_costly(error: ImageCostError, number: int | None) -> RequestError:
    return RequestError(413, f"{called(number)} takes too long to decode: {error}.")


def called(number: int | None) -> str:
    """How a message begins that is about an image of a request."""
    return "The image" if number is None else f"Image {number}"
