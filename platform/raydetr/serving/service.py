"""The service behind the routes, without HTTP: admission limits, and calls of the model replicas."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from ray.exceptions import RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle

from detr.inference.detector import Detections, PreparedImage
from raydetr.errors import RequestError
from raydetr.serving.challenger import Challenger
from raydetr.serving.concurrently import all_or_none
from raydetr.serving.detector import Result
from raydetr.serving.images import CostlyImage
from raydetr.serving.loaded import Failure
from raydetr.serving.preparer import Preparer
from raydetr.serving.refusals import RETRY_AFTER_S, Unavailable, too_many
from raydetr.serving.segments import ResponseFields, SegmentRequest
from raydetr.serving.served_version import ServedVersion
from raydetr.serving.shadow import ChampionAnswer
from raydetr.serving.shares import FairShare

T = TypeVar("T")
MAX_BODIES = 1024
"""Maximum number of bodies that arrive concurrently in one process."""
MAX_COSTLY = 4
"""Maximum number of costly images per process that are at the replicas, so that other images find room there."""
MAX_ATTEMPTS = 3
"""Maximum number of calls for one image if replicas die. Calls have no side effects, so repeating them is safe."""


class Service:
    """Admits requests and calls the model replicas.

    Args:
        version: the served version; replaced when the alias moves.
        detector: handle of the model replicas, `detector.Detector`.
        preparer: prepares the images of all requests, within its limits.
        max_requests: maximum number of requests in progress or waiting; further ones get 429.
        replicas_ready: returns whether a model replica is ready by Serve's status; may block.
    """

    def __init__(
        self,
        version: ServedVersion,
        detector: DeploymentHandle[Any],
        preparer: Preparer,
        max_requests: int,
        replicas_ready: Callable[[], bool],
    ) -> None:
        self.version, self.detector, self.preparer = version, detector, preparer
        self.limits = preparer.limits
        self.challenger: Challenger | None = None
        self._replicas_ready = replicas_ready
        self._requests = FairShare(max_requests)
        self._bodies = FairShare(MAX_BODIES)
        self._costly = asyncio.Semaphore(MAX_COSTLY)
        self._bytes = FairShare(max(self.limits.max_bytes_in_flight, 2 * self.limits.max_bytes))

    @contextlib.contextmanager
    def body(self, client: str) -> Iterator[Callable[[int], None]]:
        """Reserve a place for one body, from before it arrives until its request is answered.

        Yields:
            a function that reserves a number of bytes, and raises Unavailable if the client has used up its share.

        Raises:
            Unavailable: 429 if there is no place for the request, or the client sends too many bodies concurrently.
        """
        if self._requests.is_full(client) or not self._bodies.acquire(client):
            raise too_many()
        reserved = 0

        def reserve(count: int) -> None:
            nonlocal reserved
            if not self._bytes.acquire(client, count):
                raise too_many()
            reserved += count

        try:
            yield reserve
        finally:
            self._bodies.release(client)
            self._bytes.release(client, reserved)

    @contextlib.contextmanager
    def request(self, client: str) -> Iterator[ServedVersion]:
        """Reserve a place for one request whose body has arrived.

        Yields:
            the champion: the version that answers unless the challenger does.

        Raises:
            Unavailable: 429 if there are too many requests, or the client has used up its share.
        """
        if not self._requests.acquire(client):
            raise too_many()
        try:
            yield self.version
        finally:
            self._requests.release(client)

    async def answer(
        self, task: str, champion: ServedVersion, run: Callable[[ServedVersion], Awaitable[T]], started: float
    ) -> T:
        """Return the challenger's answer for its share of requests, else the champion's.

        Args:
            task: detect or segment.
            champion: the version from `request`.
            run: computes the answer of a version.
            started: arrival of the request, by `time.monotonic`; the challenger has half of the deadline.
        """
        challenger = self.challenger
        if challenger is not None:
            within_s = started + self.limits.deadline_s / 2 - time.monotonic()
            answer = await challenger.answer(task, champion, run, within_s)
            if answer is not None:
                return answer
        return await run(champion)

    def shadow(self, answer: ChampionAnswer, champion: ServedVersion) -> None:
        """Start a shadow comparison with the challenger for its share of images, after the champion has answered."""
        challenger = self.challenger
        if challenger is not None and challenger.differs_from(champion):
            busy = 2 * self._requests.used > self._requests.capacity
            challenger.shadow.submit(answer, champion, challenger.version, busy)

    async def detect(
        self, images: Sequence[PreparedImage], version: ServedVersion, in_background: bool = False
    ) -> list[Result[Detections]]:
        """Detect objects in images, which are sent to the model replicas concurrently.

        Args:
            images: prepared for `version`.
            version: the version that computes the result.
            in_background: compute them while no image of a client is computed.

        Raises:
            Unavailable: one of the images got no result.
        """

        async def one(image: PreparedImage) -> Result[Detections]:
            async with contextlib.nullcontext() if in_background else self._costly_limit(image):
                return await self._call_replica("detect", version.model, image, in_background)

        return await all_or_none(map(one, images))

    async def segment(
        self, image: PreparedImage, version: ServedVersion, request: SegmentRequest
    ) -> Result[ResponseFields]:
        """Segment an image.

        Raises:
            RequestError: 409 if the model has no mask head.
            Unavailable: the image got no result.
        """
        if "segment" not in version.tasks:
            raise RequestError(409, f"The model {version.info.name} has no mask head: use POST /v1/detect.")
        async with self._costly_limit(image):
            return await self._call_replica("segment", version.model, image, request)

    def _costly_limit(self, image: PreparedImage) -> contextlib.AbstractAsyncContextManager[None]:
        return self._costly if isinstance(image, CostlyImage) else contextlib.nullcontext()

    async def _call_replica(self, method: str, *args: Any) -> Result[Any]:
        """Call a model replica, and another one if it dies during the call."""
        for _ in range(MAX_ATTEMPTS):
            response = getattr(self.detector, method).remote(*args)
            try:
                result: Result[Any] = await response
            except asyncio.CancelledError:
                response.cancel()  # Serve cancels it when a client disconnects, but not at our deadline
                raise
            except BackPressureError as error:
                raise too_many() from error
            except DeploymentUnavailableError as error:
                raise no_replica() from error
            except (RayActorError, ReplicaUnavailableError, RequestCancelledError):
                continue
            if isinstance(result.value, Failure):
                raise Unavailable(result.value.status, result.value.message, RETRY_AFTER_S)
            return result
        raise no_replica()

    async def is_ready(self) -> bool:
        """Check that a model replica is running and warm, and that images are being decoded."""
        return await asyncio.to_thread(lambda: self._replicas_ready() and self.preparer.is_ready())


def no_replica() -> Unavailable:
    """Build the error for a missing model replica."""
    return Unavailable(503, "No model replica is available: try again later.", RETRY_AFTER_S)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def client_of(request: Request) -> str:
    """Return the client of a request, for fair sharing: the name of its token, else its IP address."""
    name: str | None = getattr(request.state, "client", None)
    if name is not None:
        return f"token {name}"
    return request.client.host if request.client else ""


ServiceOf = Annotated[Service, Depends(_service)]
ClientOf = Annotated[str, Depends(client_of)]
