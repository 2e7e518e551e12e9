"""From a request's body to a prepared image: limits first, then decoding. Errors carry their HTTP status."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields

from detr.detector import PreparedImage, prepare_image
from detr.image_processing.decode import DEFAULT_MAX_PIXELS, ImageError, image_size
from detr.image_processing.processor import DetrImageProcessor
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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"The limit {field.name} is {value}: it has to be above 0.")


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
    # int() refuses thousands of digits with a ValueError
    if (
        declared is not None
        and declared.isdecimal()
        and (len(declared) > 18 or int(declared) > limits.max_bytes)
    ):
        raise too_large
    body = bytearray()
    async for chunk in chunks:
        if len(body) + len(chunk) > limits.max_bytes:
            raise too_large
        body += chunk
    if not body:
        raise RequestError(400, "The body is empty: send the bytes of a JPEG, PNG or WebP file.")
    return bytes(body)


def check_image(data: bytes, limits: Limits, number: int | None = None) -> int:
    """Check an image by its header.

    Args:
        data: encoded.
        limits: `max_pixels` counts here.
        number: of the image in its request, from 1, for the message; None for the only one.

    Returns:
        its pixels: height times width.

    Raises:
        RequestError: 415 where it is not an image, 413 where it has too many pixels.
    """
    try:
        height, width = image_size(data)
    except ImageError as error:
        what = "The body" if number is None else f"Image {number}"
        raise RequestError(415, f"{what} is not an image that can be read: {error}.") from error
    if height * width > limits.max_pixels:
        raise RequestError(
            413,
            f"{_called(number)} has {height} x {width} pixels, the limit is {limits.max_pixels}: send a smaller one.",
        )
    return height * width


def prepare(
    data: bytes, image_processor: DetrImageProcessor, limits: Limits, number: int | None = None
) -> PreparedImage:
    """Check an image by its header, then decode, resize and pad it; safe to call from several threads.

    Args:
        data: encoded.
        image_processor: see `detr.detector.prepare_image`.
        limits: `max_pixels` counts here.
        number: of the image in its request, from 1, for messages; None for the only one.

    Raises:
        RequestError: as `check_image`, and 400 where the image is damaged or of a shape that cannot be resized.
    """
    check_image(data, limits, number)
    try:
        return prepare_image(data, image_processor)
    except (ImageError, ValueError) as error:
        raise RequestError(400, f"{_called(number)} cannot be decoded: {error}.") from error


class Preparer:
    """Prepares the images of all requests of a process, within a bound on the memory that decoding takes.

    A file of some hundred kilobytes may be an image of `Limits.max_pixels`. So at any time images of at most that many
    pixels together are being decoded, those of several requests included; others wait in the order they came.

    Args:
        image_processor: see `detr.detector.prepare_image`.
        limits: on each image.
        threads: most images at a time.
    """

    def __init__(self, image_processor: DetrImageProcessor, limits: Limits, threads: int = 4) -> None:
        self.image_processor = image_processor
        self.limits = limits
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="prepare")
        self._free = limits.max_pixels
        self._turn = asyncio.Lock()  # first come, first served: a large image is not overtaken for ever
        self._released = asyncio.Event()

    async def prepare(self, images: Sequence[bytes]) -> list[PreparedImage]:
        """Prepare the images of one request; none is decoded before the headers of all were checked.

        Args:
            images: encoded. Messages number them where there are several.

        Raises:
            RequestError: see the function `prepare`.
        """
        loop = asyncio.get_running_loop()
        numbers: list[int | None] = [None] if len(images) == 1 else list(range(1, len(images) + 1))
        pixels = await loop.run_in_executor(
            self._executor,
            lambda: [check_image(data, self.limits, number) for data, number in zip(images, numbers)],
        )
        tasks = [asyncio.ensure_future(self._one(*each)) for each in zip(images, numbers, pixels)]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _one(self, data: bytes, number: int | None, pixels: int) -> PreparedImage:
        async with self._turn:
            while self._free < pixels:
                self._released.clear()
                await self._released.wait()
            self._free -= pixels
        loop = asyncio.get_running_loop()

        def release(_: Future[PreparedImage]) -> None:
            with contextlib.suppress(RuntimeError):  # the process ends
                loop.call_soon_threadsafe(self._release, pixels)

        # Not released by whoever waits: that one may be cancelled while the thread still holds the memory.
        future = self._executor.submit(prepare, data, self.image_processor, self.limits, number)
        future.add_done_callback(release)
        return await asyncio.wrap_future(future)

    def _release(self, pixels: int) -> None:
        self._free += pixels
        self._released.set()


def _called(number: int | None) -> str:
    return "The image" if number is None else f"Image {number}"
