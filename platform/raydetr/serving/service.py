"""What the routes do, without HTTP: prepares images on CPU threads and asks a model replica, within bounds."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

from fastapi import Depends, Request
from ray.exceptions import RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle

from detr.config import DetrConfig
from detr.detector import PreparedImage
from detr.image_processing.processor import DetrImageProcessor
from raydetr.errors import RequestError
from raydetr.registry.models import ResolvedModel, local_folder
from raydetr.serving.detector import Result
from raydetr.serving.images import Limits, Preparer
from raydetr.serving.loaded import Failure, has_masks
from raydetr.serving.refusals import RETRY_AFTER_S, Unavailable, too_many
from raydetr.serving.schemas import ModelInfo
from raydetr.serving.shadow import Seen

if TYPE_CHECKING:
    from raydetr.serving.challenger import Challenger

T = TypeVar("T")
LOST_REPLICAS = 3
"""Replicas that may die under one image before its request fails; an answer has no side effect to repeat."""


@dataclass(frozen=True)
class Current:
    """A model version as the HTTP side knows it; one request uses one of them from its beginning to its end."""

    model: ResolvedModel
    info: ModelInfo
    preparer: Preparer
    id2label: dict[int, str]
    tasks: tuple[str, ...]

    def prepares_otherwise_than(self, other: "Current") -> bool:
        """Whether an image prepared for one version is none for the other."""
        return self.preparer.image_processor.to_dict() != other.preparer.image_processor.to_dict()

    @classmethod
    def of(cls, model: ResolvedModel, limits: Limits) -> Self:
        """Read it from the version's files; limits are those on one request."""
        folder = local_folder(model)
        config = DetrConfig.from_pretrained(folder)
        return cls(
            model,
            ModelInfo(name=model.name or model.label, version=model.version),
            Preparer(DetrImageProcessor.from_pretrained(folder), limits),
            config.id2label,
            ("detect", "segment") if has_masks(config) else ("detect",),
        )


class Service:
    """See the file's docstring.

    Args:
        current: the version that answers; replaced where an alias moves.
        detector: handle of the model replicas, `detector.Detector`.
        limits: on one request.
        most_requests: worked on or waiting at a time; beyond it is 429.
        replicas_ready: whether a model replica is ready, by Serve's own account; may block.
    """

    def __init__(
        self,
        current: Current,
        detector: DeploymentHandle[Any],
        limits: Limits,
        most_requests: int,
        replicas_ready: Callable[[], bool],
    ) -> None:
        self.current, self.detector, self.limits = current, detector, limits
        self.most_requests = most_requests
        self.challenger: Challenger | None = None  # set where one is tried
        self._replicas_ready = replicas_ready
        self._requests = 0

    @contextlib.contextmanager
    def request(self) -> Iterator[Current]:
        """One request within the bound; the version that answers it, if the challenger does not.

        Raises:
            Unavailable: 429 where there are too many; before anything of the body is read.
        """
        if self._requests >= self.most_requests:
            raise too_many()
        self._requests += 1
        try:
            yield self.current
        finally:
            self._requests -= 1

    async def answer(
        self, task: str, champion: Current, run: Callable[[Current], Awaitable[T]], begun: float
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

    def shadow(self, seen: Seen, current: Current) -> None:
        """Have the challenger detect the same images too, for its share, once the champion has answered."""
        challenger = self.challenger
        if challenger is not None and challenger.is_other_than(current):
            busy = 2 * self._requests > self.most_requests
            challenger.shadow.consider(seen, current, challenger.current, busy)

    async def detect(
        self, images: Sequence[PreparedImage], current: Current, in_background: bool = False
    ) -> list[Result]:
        """Detections of images, which the model replicas get at once; in the background: in pauses of the others.

        Raises:
            Unavailable: of one of them.
        """
        return await _all([self._ask("detect", current.model, image, in_background) for image in images])

    async def segment(self, image: PreparedImage, current: Current, request: Any) -> Result:
        """Segments of an image.

        Raises:
            RequestError: 409, the model has no mask head.
            Unavailable: as the class says.
        """
        if "segment" not in current.tasks:
            raise RequestError(
                409, f"The model {current.info.name} has no mask head: it detects (POST /v1/detect)."
            )
        return await self._ask("segment", current.model, image, request)

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
        """Whether a model replica has answered its warm-up and is there."""
        return await asyncio.to_thread(self._replicas_ready)


def no_replica() -> Unavailable:
    """The answer while there is no model replica."""
    return Unavailable(503, "No model replica is there: try again later.", RETRY_AFTER_S)


async def _all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; where one fails, or the caller is cancelled, the others are cancelled too."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(_service)]
