"""Prepare encoded images for the model, for all requests of a process."""

import asyncio
import contextlib
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from PIL import Image

from detr.image_processing.decode import Orientation
from detr.image_processing.processor import DetrImageProcessor
from detr.inference.detector import PreparedImage
from raydetr.errors import RequestError, ServingError
from raydetr.serving.bodies import Encoded
from raydetr.serving.concurrently import all_or_none
from raydetr.serving.decode_worker import Task
from raydetr.serving.decoding import Job, Lane, TaskResult, WorkerLost, WorkerProgram
from raydetr.serving.images import CostlyImage, Inspected, Limits, describe_image
from raydetr.serving.refusals import RETRY_AFTER_S, Unavailable
from raydetr.serving.shares import FairShare

LIGHT_S = 0.5
"""Maximum estimated CPU time of a light image, in seconds. A camera JPEG of 24 megapixels takes 0.3 s."""
BUSY_LIGHT_S = 0.05
"""The same for a client that has costly images waiting while others are active; 4 megapixels."""
LIGHT_CPU_S = 2.0
"""CPU time limit of a light image, in seconds. An image that exceeds it is retried as costly."""
ACTIVE_S = 10.0
"""Time for which a client counts as active after its last request, in seconds."""
PROBE_S = 3.0
"""Readiness probe: maximum time to inspect an image of one pixel, in seconds."""
_INSPECT_S, _INSPECT_BYTE_S = 1e-3, 1e-8


class Preparer:
    """Prepares the images of all requests of a process in expendable worker processes.

    Each image is inspected first, and the estimated cost decides whether it is light or costly. Each kind has its own
    workers, so photos never wait for costly images, regardless of their number. Workers for costly images run only
    while a core is idle. A light image has at most a third of `Limits.max_pixels`, so that a single one does not block
    the others. In total, at most five thirds of `Limits.max_pixels` are decoded at a time: two thirds in the lane of
    light images and `max_pixels` in the lane of costly ones.

    Args:
        limits: limits of each image.
        max_costly: maximum number of requests with costly images, in progress or waiting. Further ones get 429, as do
            requests when the estimates of all add up to more than the workers can do in half of `Limits.deadline_s`.
        workers: number of workers for light images; half as many for costly ones. None: one per core, at most 4.
        program: starts the workers; None creates one.
    """

    def __init__(
        self,
        limits: Limits,
        max_costly: int = 32,
        workers: int | None = None,
        program: WorkerProgram | None = None,
    ) -> None:
        self.limits = limits
        workers = workers or min(4, os.cpu_count() or 1)
        self._program = program or WorkerProgram()
        self._light = Lane(self._program, "light", workers, False, limits.max_pixels * 2 / 3)
        # Half the cores: the model needs idle cores as well, and memory bandwidth cannot be prioritized.
        costly_workers = max(1, workers // 2)
        self._costly = Lane(self._program, "costly", costly_workers, True, limits.max_pixels)
        self._costly_s = FairShare(max(costly_workers * limits.deadline_s / 2, limits.decode_s))
        self._last_request_at: dict[str, float] = {}
        self._min_costly_s = self._costly_s.capacity / max_costly
        self._probe: Future[TaskResult] | None = None

    def start(self) -> bool:
        """Start a worker, which takes seconds, before the first image. Returns whether it answers."""
        return self._probe_answers(None)

    def is_ready(self) -> bool:
        """Check that the workers answer, with an image of one pixel, within `PROBE_S`."""
        return self._probe_answers(PROBE_S)

    def close(self) -> None:
        """Finish the jobs in progress and stop the workers, but not the program that starts them."""
        self._light.close()
        self._costly.close()

    async def prepare(
        self,
        images: Sequence[Encoded],
        processor: DetrImageProcessor,
        client: str = "",
        orientation: Orientation = "ignore",
    ) -> list[PreparedImage]:
        """Prepare the images of one request. All of them are inspected before the first one is decoded.

        Costly images become `CostlyImage`s, which the model computes with lower priority. While other clients are
        active, so do all images of a client that has costly images waiting.

        Args:
            images: encoded images. Messages number them if there are several.
            processor: image processor whose conversion and resize are applied.
            client: the sender; busy clients have equal shares of the workers.
            orientation: whether images are turned upright by their EXIF orientation.

        Raises:
            RequestError: see `images.inspect_image` and `images.prepare`; 413 also for an image that exceeds its CPU
                time limit, 400 for one that crashes its worker.
            Unavailable: 429 for costly images while too many are waiting, 503 if no worker starts.
        """
        now = time.monotonic()
        self._last_request_at = {
            name: at for name, at in self._last_request_at.items() if now - at < ACTIVE_S
        }
        self._last_request_at[client] = now
        numbers: list[int | None] = [None] if len(images) == 1 else list(range(1, len(images) + 1))
        inspected = await all_or_none(self._inspect(*each, client) for each in zip(images, numbers))
        settings = json.dumps(processor.to_dict())
        jobs = [
            Job(
                self._task(settings, number, orientation, min(LIGHT_CPU_S, self.limits.decode_s)),
                data,
                client,
                *cost,
            )
            for data, number, cost in zip(images, numbers, inspected)
        ]
        light_s = BUSY_LIGHT_S if self._is_deprioritized(client) else LIGHT_S
        costly = [job for job in jobs if job.seconds > light_s or 3 * job.pixels > self.limits.max_pixels]
        if not costly:
            prepared = await all_or_none(self._prepare_light(job) for job in jobs)
            return [_as_costly(image) for image in prepared] if self._is_deprioritized(client) else prepared
        with self._reserve_costly(client, sum(job.seconds for job in costly)):
            # One after the other: a request uses at most one worker for costly images at a time.
            return [
                await (self._prepare_costly if job in costly else self._prepare_light)(job) for job in jobs
            ]

    def _is_deprioritized(self, client: str) -> bool:
        """Check whether a client has costly images waiting while other clients are active."""
        return self._costly_s.held(client) > 0 and len(self._last_request_at) > 1

    async def _inspect(self, data: Encoded, number: int | None, client: str) -> Inspected:
        task = self._task(None, number, "ignore", min(LIGHT_CPU_S, self.limits.decode_s))
        seconds = _INSPECT_S + _INSPECT_BYTE_S * len(data)
        try:
            inspected = await _result(self._light, Job(task, data, client, 0, seconds))
        except WorkerLost as lost:
            raise _error_for_lost_worker(lost, task) from lost
        assert isinstance(inspected, Inspected)
        return inspected

    async def _prepare_light(self, job: Job) -> PreparedImage:
        data = job.data
        try:
            return await _prepared_image(self._light, job)
        except WorkerLost as lost:
            if not lost.out_of_time:
                raise _error_for_lost_worker(lost, job.task) from lost
        with self._reserve_costly(job.client, LIGHT_CPU_S):
            return await self._prepare_costly(Job(job.task, data, job.client, job.pixels, LIGHT_CPU_S))

    async def _prepare_costly(self, job: Job) -> CostlyImage:
        task = self._task(job.task.processor, job.task.number, job.task.orientation, self.limits.decode_s)
        try:
            return _as_costly(
                await _prepared_image(self._costly, Job(task, job.data, job.client, job.pixels, job.seconds))
            )
        except WorkerLost as lost:
            raise _error_for_lost_worker(lost, task) from lost

    @contextlib.contextmanager
    def _reserve_costly(self, client: str, seconds: float) -> Iterator[None]:
        amount = min(max(seconds, self._min_costly_s), self._costly_s.capacity)
        if not self._costly_s.acquire(client, amount):
            message = "Too many costly images are waiting: send a smaller image, or try again later."
            raise Unavailable(429, message, RETRY_AFTER_S, delayed=True)
        try:
            yield
        finally:
            self._costly_s.release(client, amount)

    def _task(
        self, processor: str | None, number: int | None, orientation: Orientation, cpu_s: float
    ) -> Task:
        return Task(self.limits, processor, orientation, number, cpu_s, self.limits.deadline_s)

    def _probe_answers(self, timeout_s: float | None) -> bool:
        if self._probe is None or self._probe.done():  # else reuse the probe in flight
            task = self._task(None, None, "ignore", LIGHT_CPU_S)
            self._probe = self._light.submit(Job(task, _one_pixel(), "", 0, _INSPECT_S))
        try:
            return isinstance(self._probe.result(timeout_s), Inspected)
        except (TimeoutError, WorkerLost, ServingError):
            return False


async def _result(lane: Lane, job: Job) -> TaskResult:
    try:
        return await asyncio.wrap_future(lane.submit(job))
    except RequestError:
        raise
    except ServingError as error:
        raise Unavailable(503, str(error), RETRY_AFTER_S) from error


async def _prepared_image(lane: Lane, job: Job) -> PreparedImage:
    image = await _result(lane, job)
    assert isinstance(image, PreparedImage)
    return image


def _as_costly(image: PreparedImage) -> CostlyImage:
    return CostlyImage(image.pixels, image.size, image.original_size)


def _error_for_lost_worker(lost: WorkerLost, task: Task) -> RequestError:
    image = describe_image(task.number)
    if lost.out_of_time:
        return RequestError(
            413,
            f"{image} takes more than {task.cpu_s:g} s to decode: save it as a baseline JPEG or reduce its size.",
        )
    return RequestError(
        400, f"{image} cannot be decoded: it crashes the decoder. Save it again with an image editor."
    )


def _one_pixel() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()
