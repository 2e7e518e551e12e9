"""From encoded images to prepared ones, for all requests of a process."""

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
from raydetr.serving.decoding import Answer, Job, Lane, WorkerLost, WorkerProgram
from raydetr.serving.images import CostlyImage, Inspected, Limits, called
from raydetr.serving.refusals import RETRY_AFTER_S, Unavailable
from raydetr.serving.shares import FairShare

LIGHT_S = 0.5
"""Estimated seconds up to which an image can be light: a JPEG of 24 megapixels from a camera takes 0.3."""
BUSY_LIGHT_S = 0.05
"""The same for a client that has costly images waiting while others are active: 4 megapixels."""
LIGHT_CPU_S = 2.0
"""Processor time of an image that was taken for light; one that needs more is costly after all."""
ACTIVE_S = 10.0
"""Time after its last request in which a client counts as active, in seconds."""
PROBE_S = 3.0
"""Longest time for looking at an image of one pixel while the endpoint is ready, in seconds."""
_INSPECT_S, _INSPECT_BYTE_S = 1e-3, 1e-8


class Preparer:
    """Prepares the images of all requests of a process, in worker processes that can be lost.

    Images are inspected first: an estimate of the work decides whether an image is light or costly. Either kind has its
    own workers, so that photos never wait for costly images, however many there are; those for costly images run only
    while a core is idle. A light image has at most a third of `Limits.max_pixels`, so that one of them does not keep the
    others from decoding. At any time images of at most five thirds of `Limits.max_pixels` are being decoded.

    Args:
        limits: on each image.
        max_costly: requests with costly images, in work or waiting; those beyond get 429, and so do those whose
            estimates add up to more than the workers do in half of `Limits.deadline_s`.
        workers: for light images, and half as many for costly ones; None: as many as there are cores, at most 4.
        program: starts the workers; None: a new one.
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
        # Half the cores: an idle one is idle for the model too, and memory bandwidth has no priorities.
        costly_workers = max(1, workers // 2)
        self._costly = Lane(self._program, "costly", costly_workers, True, limits.max_pixels)
        self._costly_s = FairShare(max(costly_workers * limits.deadline_s / 2, limits.decode_s))
        self._asked_at: dict[str, float] = {}
        self._min_costly_s = self._costly_s.capacity / max_costly
        self._probe: Future[Answer] | None = None

    def start(self) -> bool:
        """Start a worker, which takes seconds; else the first image does. Whether one answers."""
        return self._probe_answers(None)

    def is_ready(self) -> bool:
        """Whether images are being decoded; looks at one of one pixel, for at most `PROBE_S`."""
        return self._probe_answers(PROBE_S)

    def close(self) -> None:
        """End the workers, once they have answered what they are at; not the program that starts them."""
        self._light.close()
        self._costly.close()

    async def prepare(
        self,
        images: Sequence[Encoded],
        processor: DetrImageProcessor,
        client: str = "",
        orientation: Orientation = "ignore",
    ) -> list[PreparedImage]:
        """Prepare the images of one request; none is decoded before all were inspected.

        Costly ones become `CostlyImage`s, for which the model has lower priority. So do other images of a client that
        has costly ones waiting, while other clients are active.

        Args:
            images: encoded. Messages number them where there are several.
            processor: its conversion and resize are applied.
            client: who sent them; busy clients have equal shares of the workers.
            orientation: whether they are turned upright by their EXIF orientation.

        Raises:
            RequestError: see `images.inspect_image` and `images.prepare`; 413 also for an image that took more
                processor time than it may, 400 for one that ends its worker.
            Unavailable: 429 for costly images while too many others wait, 503 while no worker starts.
        """
        now = time.monotonic()
        self._asked_at = {name: at for name, at in self._asked_at.items() if now - at < ACTIVE_S}
        self._asked_at[client] = now
        numbers: list[int | None] = [None] if len(images) == 1 else list(range(1, len(images) + 1))
        inspected = await all_or_none(self._inspect(*each, client) for each in zip(images, numbers))
        settings = json.dumps(processor.to_dict())
        jobs = [
            Job(
                self._task(settings, number, orientation, min(LIGHT_CPU_S, self.limits.decode_s)),
                data,
                client,
                *found,
            )
            for data, number, found in zip(images, numbers, inspected)
        ]
        light_s = BUSY_LIGHT_S if self._comes_last(client) else LIGHT_S
        costly = [job for job in jobs if job.seconds > light_s or 3 * job.pixels > self.limits.max_pixels]
        if not costly:
            prepared = await all_or_none(self._light_image(job) for job in jobs)
            return [_as_costly(image) for image in prepared] if self._comes_last(client) else prepared
        with self._costly_place(client, sum(job.seconds for job in costly)):
            # One after the other: a request has one worker for costly images at a time.
            return [await (self._costly_image if job in costly else self._light_image)(job) for job in jobs]

    def _comes_last(self, client: str) -> bool:
        """Whether a client has costly images waiting, and is not alone."""
        return self._costly_s.held(client) > 0 and len(self._asked_at) > 1

    async def _inspect(self, data: Encoded, number: int | None, client: str) -> Inspected:
        task = self._task(None, number, "ignore", min(LIGHT_CPU_S, self.limits.decode_s))
        seconds = _INSPECT_S + _INSPECT_BYTE_S * len(data)
        try:
            found = await _result(self._light, Job(task, data, client, 0, seconds))
        except WorkerLost as lost:
            raise _refusal(lost, task) from lost
        assert isinstance(found, Inspected)
        return found

    async def _light_image(self, job: Job) -> PreparedImage:
        data = job.data
        try:
            return await _prepared(self._light, job)
        except WorkerLost as lost:
            if not lost.out_of_time:
                raise _refusal(lost, job.task) from lost
        with self._costly_place(job.client, LIGHT_CPU_S):
            return await self._costly_image(Job(job.task, data, job.client, job.pixels, LIGHT_CPU_S))

    async def _costly_image(self, job: Job) -> CostlyImage:
        task = self._task(job.task.processor, job.task.number, job.task.orientation, self.limits.decode_s)
        try:
            return _as_costly(
                await _prepared(self._costly, Job(task, job.data, job.client, job.pixels, job.seconds))
            )
        except WorkerLost as lost:
            raise _refusal(lost, task) from lost

    @contextlib.contextmanager
    def _costly_place(self, client: str, seconds: float) -> Iterator[None]:
        amount = min(max(seconds, self._min_costly_s), self._costly_s.capacity)
        if not self._costly_s.take(client, amount):
            message = "Too many costly images are waiting: send a smaller one, or later."
            raise Unavailable(429, message, RETRY_AFTER_S, slowly=True)
        try:
            yield
        finally:
            self._costly_s.give_back(client, amount)

    def _task(
        self, processor: str | None, number: int | None, orientation: Orientation, cpu_s: float
    ) -> Task:
        return Task(self.limits, processor, orientation, number, cpu_s, self.limits.deadline_s)

    def _probe_answers(self, timeout_s: float | None) -> bool:
        if self._probe is None or self._probe.done():  # else the one that is on its way tells
            task = self._task(None, None, "ignore", LIGHT_CPU_S)
            self._probe = self._light.submit(Job(task, _one_pixel(), "", 0, _INSPECT_S))
        try:
            return isinstance(self._probe.result(timeout_s), Inspected)
        except (TimeoutError, WorkerLost, ServingError):
            return False


async def _result(lane: Lane, job: Job) -> Answer:
    try:
        return await asyncio.wrap_future(lane.submit(job))
    except RequestError:
        raise
    except ServingError as error:
        raise Unavailable(503, str(error), RETRY_AFTER_S) from error


async def _prepared(lane: Lane, job: Job) -> PreparedImage:
    image = await _result(lane, job)
    assert isinstance(image, PreparedImage)
    return image


def _as_costly(image: PreparedImage) -> CostlyImage:
    return CostlyImage(image.pixels, image.size, image.original_size)


def _refusal(lost: WorkerLost, task: Task) -> RequestError:
    image = called(task.number)
    if lost.out_of_time:
        return RequestError(
            413,
            f"{image} takes more than {task.cpu_s:g} s to decode: save it as a baseline JPEG, or smaller.",
        )
    return RequestError(
        400, f"{image} cannot be decoded: it ends the decoder. Save it again with an image editor."
    )


def _one_pixel() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    return file.getvalue()
