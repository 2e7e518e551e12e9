"""A client of the endpoint, blocking and asynchronous; needs httpx alone.

::

    with Client("http://127.0.0.1:8000") as client:
        for found in client.detect("photo.jpg").detections:
            print(found.label, found.score, found.box)

A client keeps its connections: make one and use it for all requests, from several threads if need be. Requests that a
busy server turns away, or that do not reach it, are repeated, see `exchange`.
"""

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Literal, Self, TypeVar

import anyio  # which httpx brings
import httpx
from anyio import to_thread

from raydetr.client import results
from raydetr.client.calls import Calls, ImageSource, detect_params, encoded
from raydetr.client.exchange import Answer, Exchange, Lost, Send, Wait
from raydetr.client.results import DetectResult, Health, SegmentResult, ServedModel

T = TypeVar("T")
Kind = Literal["instance", "panoptic", "semantic"]
Orientation = Literal["apply", "ignore"]


class Client(Calls):
    """Asks an endpoint and waits for its answer. Safe to use from several threads."""

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
    ) -> DetectResult:
        """Detect objects in one image.

        Args:
            image: an encoded image, a file's path, or a Pillow image.
            threshold: least score, 0..1.
            top_k: most detections, by score; all where None.
            classes: names of labels to look for; all where there are none.
            orientation: "apply" turns the image upright by its EXIF orientation, "ignore" answers for the stored pixels;
                the endpoint's own ("ignore") where None.

        Raises:
            RequestError: the endpoint refuses the request (4xx), with its status; 429 once the repeats are used up.
            ServingError: it does not answer, or not as it should.
            OSError: the file cannot be read.
        """
        params = detect_params(threshold, top_k, classes, orientation)
        return self._run(self.post_image_call("/v1/detect", encoded(image), params, results.detect_result))

    def detect_many(
        self,
        images: Iterable[ImageSource],
        threshold: float = 0.5,
        top_k: int | None = None,
        classes: Sequence[str] | None = None,
        orientation: Orientation | None = None,
    ) -> list[DetectResult]:
        """Detect objects in several images, a few in each request; results in the order of the images.

        One image that cannot be read fails the call; the message says which ones were sent with it.

        Args:
            images: each as in `detect`; read as the requests go out.
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
        return [found for each in self.many_call(images, params) for found in self._run(each)]

    def segment(
        self,
        image: ImageSource,
        kind: Kind = "instance",
        threshold: float | None = None,
        format: Literal["rle", "png"] = "rle",
        orientation: Orientation | None = None,
    ) -> SegmentResult:
        """Segment one image.

        Args:
            image: as in `detect`.
            kind: instance (a mask for each object), panoptic (every pixel once), semantic (classes only).
            threshold: least score, 0..1; the endpoint's own where None.
            format: rle gives each segment its mask, png one map of all of them.
            orientation: see `detect`.

        Raises:
            RequestError: as in `detect`; 409 where the model has no masks.
            ServingError: see `detect`.
            OSError: see `detect`.
        """
        params = [("kind", kind), ("threshold", threshold), ("format", format), ("orientation", orientation)]
        return self._run(self.post_image_call("/v1/segment", encoded(image), params, results.segment_result))

    def models(self) -> list[ServedModel]:
        """The models that the endpoint has, with their labels and tasks.

        Raises:
            RequestError: it asks for another token.
            ServingError: it does not answer, or not as it should.
        """
        return self._run(self.get_call("/v1/models", results.served_models))

    def health(self) -> Health:
        """Whether the endpoint is live, and with which model.

        Raises:
            ServingError: it does not answer, or not as it should.
        """
        return self._run(self.get_call("/health", results.health_result))

    def ready(self) -> bool:
        """Whether requests are answered now, asked once: False also where nothing answers (yet).

        Raises:
            ServingError: something else than the endpoint answers.
        """
        return self._run(self.ready_call())

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

    def _run(self, call: Exchange[T]) -> T:
        outcome: Answer | Lost | None = None
        while True:
            try:
                step = call.send(outcome)
            except StopIteration as end:
                return end.value
            if isinstance(step, Wait):
                time.sleep(step.seconds)
                outcome = None
            else:
                outcome = self._send(step)

    def _send(self, step: Send) -> Answer | Lost:
        response = None
        try:
            response = self._http.send(step.request, stream=True)
            body = bytearray()
            for chunk in response.iter_bytes():
                body += chunk
                step.check_time()
            return Answer(response.status_code, response.headers, bytes(body))
        except httpx.HTTPError as error:
            return Lost(error, begun=response is not None)
        finally:
            if response is not None:
                response.close()


class AsyncClient(Calls):
    """As `Client`, with methods to await."""

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
    ) -> DetectResult:
        """See `Client.detect`."""
        data = await to_thread.run_sync(encoded, image)
        params = detect_params(threshold, top_k, classes, orientation)
        return await self._run(self.post_image_call("/v1/detect", data, params, results.detect_result))

    async def detect_many(
        self,
        images: Iterable[ImageSource],
        threshold: float = 0.5,
        top_k: int | None = None,
        classes: Sequence[str] | None = None,
        orientation: Orientation | None = None,
    ) -> list[DetectResult]:
        """See `Client.detect_many`."""
        calls = self.many_call(images, detect_params(threshold, top_k, classes, orientation))
        found: list[DetectResult] = []
        while call := await to_thread.run_sync(next, calls, None):
            found += await self._run(call)
        return found

    async def segment(
        self,
        image: ImageSource,
        kind: Kind = "instance",
        threshold: float | None = None,
        format: Literal["rle", "png"] = "rle",
        orientation: Orientation | None = None,
    ) -> SegmentResult:
        """See `Client.segment`."""
        data = await to_thread.run_sync(encoded, image)
        params = [("kind", kind), ("threshold", threshold), ("format", format), ("orientation", orientation)]
        return await self._run(self.post_image_call("/v1/segment", data, params, results.segment_result))

    async def models(self) -> list[ServedModel]:
        """See `Client.models`."""
        return await self._run(self.get_call("/v1/models", results.served_models))

    async def health(self) -> Health:
        """See `Client.health`."""
        return await self._run(self.get_call("/health", results.health_result))

    async def ready(self) -> bool:
        """See `Client.ready`."""
        return await self._run(self.ready_call())

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

    async def _run(self, call: Exchange[T]) -> T:
        outcome: Answer | Lost | None = None
        while True:
            try:
                step = call.send(outcome)
            except StopIteration as end:
                return end.value
            if isinstance(step, Wait):
                await anyio.sleep(step.seconds)
                outcome = None
            else:
                outcome = await self._send(step)

    async def _send(self, step: Send) -> Answer | Lost:
        response = None
        try:
            response = await self._http.send(step.request, stream=True)
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                step.check_time()
            return Answer(response.status_code, response.headers, bytes(body))
        except httpx.HTTPError as error:
            return Lost(error, begun=response is not None)
        finally:
            if response is not None:
                await response.aclose()
