"""Blocking and asynchronous clients of the endpoint, in the base install.

::

    with Client("http://127.0.0.1:8000") as client:
        for detection in client.detect("photo.jpg").detections:
            print(detection.label, detection.score, detection.box)

A client reuses its connections: create one and use it for all requests, from several threads if you like. Requests
that a busy server rejects, or that do not reach it, are retried, see `core.is_transient`.
"""

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Literal, Self, TypeVar

import httpx
import tenacity
from anyio import to_thread  # a dependency of httpx

from raydetr.client.core import (
    Answer,
    BaseClient,
    Call,
    ImageSource,
    NoResponse,
    batches,
    detect_params,
    encode_image,
    is_ready,
)
from raydetr.responses import (
    DetectResponse,
    HealthResponse,
    Orientation,
    SegmentResponse,
    ServedModel,
)

T = TypeVar("T")
Kind = Literal["instance", "panoptic", "semantic"]


class Client(BaseClient):
    """Blocking client. Thread-safe."""

    def __init__(
        self, endpoint: str, token: str | None = None, timeout_s: float = 60.0, retries: int = 5
    ) -> None:
        super().__init__(endpoint, token, timeout_s, retries)
        self._http = httpx.Client()

    def detect(
        self,
        image: ImageSource,
        threshold: float = 0.5,
        top_k: int | None = None,
        classes: Sequence[str] | None = None,
        orientation: Orientation | None = None,
    ) -> DetectResponse:
        """Detect objects in one image.

        Args:
            image: an encoded image, a file's path, or a Pillow image.
            threshold: minimum score, 0..1.
            top_k: maximum number of detections, by score; None returns all.
            classes: label names to detect; None or empty detects all.
            orientation: "apply" turns the image upright by its EXIF orientation, "ignore" uses the stored pixels; None
                uses the endpoint's default ("ignore").

        Raises:
            RequestError: the endpoint rejects the request (4xx); 429 only after the last retry.
            ServingError: the endpoint does not answer, or its response is not valid.
            OSError: the file cannot be read.
        """
        params = detect_params(threshold, top_k, classes, orientation)
        return self._run(self.detect_call(encode_image(image), params))

    def detect_many(
        self,
        images: Iterable[ImageSource],
        threshold: float = 0.5,
        top_k: int | None = None,
        classes: Sequence[str] | None = None,
        orientation: Orientation | None = None,
    ) -> list[DetectResponse]:
        """Detect objects in several images, a few in each request. Results are in the order of the images.

        One image that cannot be read fails the call; the message names the images that were sent with it.

        Args:
            images: each as in `detect`; read lazily, as the requests are sent.
            threshold: see `detect`.
            top_k: see `detect`.
            classes: see `detect`.
            orientation: see `detect`.

        Raises:
            RequestError: see `detect`.
            ServingError: see `detect`.
            OSError: see `detect`.
        """
        params = detect_params(threshold, top_k, classes, orientation)
        detected: list[DetectResponse] = []
        for batch in batches(images):
            answers = self._run(self.detect_many_call(batch, params))
            detected += answers
        return detected

    def segment(
        self,
        image: ImageSource,
        kind: Kind = "instance",
        threshold: float | None = None,
        format: Literal["rle", "png"] = "rle",
        orientation: Orientation | None = None,
    ) -> SegmentResponse:
        """Segment one image.

        Args:
            image: as in `detect`.
            kind: instance (a mask for each object), panoptic (a segment for each pixel), semantic (a class for each
                pixel).
            threshold: minimum score, 0..1; None uses the endpoint's default.
            format: rle returns a mask for each segment, png one map of all segments.
            orientation: see `detect`.

        Raises:
            RequestError: as in `detect`; 409 if the model has no mask head.
            ServingError: see `detect`.
            OSError: see `detect`.
        """
        params = [("kind", kind), ("threshold", threshold), ("format", format), ("orientation", orientation)]
        return self._run(self.segment_call(encode_image(image), params))

    def models(self) -> list[ServedModel]:
        """List the models that the endpoint serves, with their labels and tasks.

        Raises:
            RequestError: the endpoint does not accept the token.
            ServingError: see `detect`.
        """
        return self._run(self.models_call())

    def health(self) -> HealthResponse:
        """Return the endpoint's liveness and its model.

        Raises:
            ServingError: see `detect`.
        """
        return self._run(self.health_call())

    def ready(self) -> bool:
        """Check readiness with a single request. Returns False also if nothing answers.

        Raises:
            ServingError: something other than the endpoint answers.
        """
        call = self.ready_call()
        outcome = self._send(call)
        return is_ready(outcome) and call.result(outcome)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, call: Call[T]) -> T:
        return call.result(tenacity.Retrying(**call.policy())(self._send, call))

    def _send(self, call: Call[T]) -> Answer | NoResponse:
        response = None
        try:
            response = self._http.send(call.prepare(), stream=True)
            body = bytearray()
            for chunk in response.iter_bytes():
                body += chunk
                call.check_time()
            return Answer(response.status_code, response.headers, bytes(body))
        except httpx.HTTPError as error:
            return NoResponse(error, started=response is not None)
        finally:
            if response is not None:
                response.close()


class AsyncClient(BaseClient):
    """Asynchronous client with the methods of `Client`."""

    def __init__(
        self, endpoint: str, token: str | None = None, timeout_s: float = 60.0, retries: int = 5
    ) -> None:
        super().__init__(endpoint, token, timeout_s, retries)
        self._http = httpx.AsyncClient()

    async def detect(
        self,
        image: ImageSource,
        threshold: float = 0.5,
        top_k: int | None = None,
        classes: Sequence[str] | None = None,
        orientation: Orientation | None = None,
    ) -> DetectResponse:
        """See `Client.detect`."""
        data = await to_thread.run_sync(encode_image, image)
        params = detect_params(threshold, top_k, classes, orientation)
        return await self._run(self.detect_call(data, params))

    async def detect_many(
        self,
        images: Iterable[ImageSource],
        threshold: float = 0.5,
        top_k: int | None = None,
        classes: Sequence[str] | None = None,
        orientation: Orientation | None = None,
    ) -> list[DetectResponse]:
        """See `Client.detect_many`."""
        params, waiting = detect_params(threshold, top_k, classes, orientation), batches(images)
        detected: list[DetectResponse] = []
        while batch := await to_thread.run_sync(next, waiting, None):
            answers = await self._run(self.detect_many_call(batch, params))
            detected += answers
        return detected

    async def segment(
        self,
        image: ImageSource,
        kind: Kind = "instance",
        threshold: float | None = None,
        format: Literal["rle", "png"] = "rle",
        orientation: Orientation | None = None,
    ) -> SegmentResponse:
        """See `Client.segment`."""
        data = await to_thread.run_sync(encode_image, image)
        params = [("kind", kind), ("threshold", threshold), ("format", format), ("orientation", orientation)]
        return await self._run(self.segment_call(data, params))

    async def models(self) -> list[ServedModel]:
        """See `Client.models`."""
        return await self._run(self.models_call())

    async def health(self) -> HealthResponse:
        """See `Client.health`."""
        return await self._run(self.health_call())

    async def ready(self) -> bool:
        """See `Client.ready`."""
        call = self.ready_call()
        outcome = await self._send(call)
        return is_ready(outcome) and call.result(outcome)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _run(self, call: Call[T]) -> T:
        return call.result(await tenacity.AsyncRetrying(**call.policy())(self._send, call))

    async def _send(self, call: Call[T]) -> Answer | NoResponse:
        response = None
        try:
            response = await self._http.send(call.prepare(), stream=True)
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                call.check_time()
            return Answer(response.status_code, response.headers, bytes(body))
        except httpx.HTTPError as error:
            return NoResponse(error, started=response is not None)
        finally:
            if response is not None:
                await response.aclose()
