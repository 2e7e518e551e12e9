"""What the routes do, without HTTP: prepares images on CPU threads and asks a model replica, within bounds."""

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

from detr.inference.detector import PreparedImage
from raydetr.errors import RequestError
from raydetr.serving.challenger import Challenger
from raydetr.serving.concurrently import all_or_none
from raydetr.serving.detector import Result
from raydetr.serving.images import CostlyImage
from raydetr.serving.loaded import Failure
from raydetr.serving.preparer import Preparer
from raydetr.serving.refusals import RETRY_AFTER_S, Unavailable, too_many
from raydetr.serving.served_version import ServedVersion
from raydetr.serving.shadow import ChampionAnswer
from raydetr.serving.shares import FairShare

T = TypeVar("T")
MAX_BODIES = 1024
"""Bodies that arrive at a time in one process."""
MAX_COSTLY = 4
"""Costly images of one process that replicas have at a time: their places are for the others."""
LOST_REPLICAS = 3
"""Replicas that may die under one image before its request fails; an answer has no side effect to repeat."""


class Service:
    """See the file's docstring.

    Args:
        current: the version that answers; replaced where an alias moves.
        detector: handle of the model replicas, `detector.Detector`.
        preparer: prepares the images of all requests, within its limits.
        max_requests: worked on or waiting at a time; beyond it is 429.
        replicas_ready: whether a model replica is ready, by Serve's own account; may block.
    """

    def __init__(
        self,
        current: ServedVersion,
        detector: DeploymentHandle[Any],
        preparer: Preparer,
        max_requests: int,
        replicas_ready: Callable[[], bool],
    ) -> None:
        self.current, self.detector, self.preparer = current, detector, preparer
        self.limits = preparer.limits
        self.challenger: Challenger | None = None  # set where one is tried
        self._replicas_ready = replicas_ready
        self._requests = FairShare(max_requests)
        self._bodies = FairShare(MAX_BODIES)
        self._costly = asyncio.Semaphore(MAX_COSTLY)
        self._bytes = FairShare(max(self.limits.max_bytes_in_flight, 2 * self.limits.max_bytes))

    @contextlib.contextmanager
    def body(self, client: str) -> Iterator[Callable[[int], None]]:
        """Room for one body, from before it arrives until its request is answered.

        Yields:
            what takes room for so many bytes more, and raises Unavailable where the client has had its share.

        Raises:
            Unavailable: 429 where the request could not be worked on if its body were here, or its client sends too
                many at a time.
        """
        if self._requests.is_full(client) or not self._bodies.take(client):
            raise too_many()
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if not self._bytes.take(client, count):
                raise too_many()
            taken += count

        try:
            yield take
        finally:
            self._bodies.give_back(client)
            self._bytes.give_back(client, taken)

    @contextlib.contextmanager
    def request(self, client: str) -> Iterator[ServedVersion]:
        """One request, whose body has arrived, within the bound; the version that answers it, if the challenger does
        not.

        Raises:
            Unavailable: 429 where there are too many, or the client has had its share.
        """
        if not self._requests.take(client):
            raise too_many()
        try:
            yield self.current
        finally:
            self._requests.give_back(client)

    async def answer(
        self, task: str, champion: ServedVersion, run: Callable[[ServedVersion], Awaitable[T]], begun: float
    ) -> T:
        """What `run` makes of the challenger, for its share of requests, or else of the champion.

        Args:
            task: detect or segment.
            champion: from `request`.
            run: computes a version's answer.
            begun: when the request came, by `time.monotonic`; the challenger has half of the deadline.
        """
        challenger = self.challenger
        if challenger is not None:
            within_s = begun + self.limits.deadline_s / 2 - time.monotonic()
            tried = await challenger.answer(task, champion, run, within_s)
            if tried is not None:
                return tried
        return await run(champion)

    def shadow(self, seen: ChampionAnswer, current: ServedVersion) -> None:
        """Have the challenger detect the same images too, for its share, once the champion has answered."""
        challenger = self.challenger
        if challenger is not None and challenger.is_other_than(current):
            busy = 2 * self._requests.used > self._requests.capacity
            challenger.shadow.consider(seen, current, challenger.current, busy)

    async def detect(
        self, images: Sequence[PreparedImage], current: ServedVersion, in_background: bool = False
    ) -> list[Result]:
        """Detections of images, which the model replicas get at once; in the background: in pauses of the others.

        Raises:
            Unavailable: of one of them.
        """

        async def one(image: PreparedImage) -> Result:
            async with contextlib.nullcontext() if in_background else self._turn(image):
                return await self._ask("detect", current.model, image, in_background)

        return await all_or_none(map(one, images))

    async def segment(self, image: PreparedImage, current: ServedVersion, request: Any) -> Result:
        """Segments of an image.

        Raises:
            RequestError: 409, the model has no mask head.
            Unavailable: as the class says.
        """
        if "segment" not in current.tasks:
            raise RequestError(
                409, f"The model {current.info.name} has no mask head: it detects (POST /v1/detect)."
            )
        async with self._turn(image):
            return await self._ask("segment", current.model, image, request)

    def _turn(self, image: PreparedImage) -> contextlib.AbstractAsyncContextManager[None]:
        return self._costly if isinstance(image, CostlyImage) else contextlib.nullcontext()

    async def _ask(self, method: str, *args: Any) -> Result:
        """One call of a model replica, of another one where that dies meanwhile."""
        for _ in range(LOST_REPLICAS):
            response = getattr(self.detector, method).remote(*args)
            try:
                result: Result = await response
            except asyncio.CancelledError:
                response.cancel()  # Serve does so for clients that went away, but not for our deadline
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
        """Whether a model replica has answered its warm-up and is there, and images are being decoded."""
        return await asyncio.to_thread(lambda: self._replicas_ready() and self.preparer.is_ready())


def no_replica() -> Unavailable:
    """The answer while there is no model replica."""
    return Unavailable(503, "No model replica is there: try again later.", RETRY_AFTER_S)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def client_of(request: Request) -> str:
    """Who sends a request, for its share of the endpoint: the name of its token, else its address."""
    name: str | None = getattr(request.state, "client", None)
    if name is not None:
        return f"token {name}"
    return request.client.host if request.client else ""


ServiceOf = Annotated[Service, Depends(_service)]
ClientOf = Annotated[str, Depends(client_of)]
