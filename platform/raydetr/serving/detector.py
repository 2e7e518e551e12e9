"""The model replica: prepared images in, detections or segments out, in batches of equal canonical shape."""

import asyncio
import contextlib
import gc
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from ray import serve
from torch.overrides import TorchFunctionMode

from detr.inference.detector import PreparedImage, padding_share
from detr.inference.optimize import Engine
from raydetr.errors import RaydetrError
from raydetr.registry.models import ResolvedModel
from raydetr.serving.images import CostlyImage
from raydetr.serving.loaded import Failure, LoadedModel, Precision
from raydetr.serving.memory import give_back_memory
from raydetr.serving.metrics import ReplicaMetrics
from raydetr.serving.segments import SegmentRequest

logger = logging.getLogger("ray.serve")
Priority: TypeAlias = Literal["client", "costly", "shadow"]
"""Of an image: for a client, for a client that sent a costly image, for nobody who waits."""
COSTLY_WAIT_S = 5.0
"""Longest time without a pause until a costly image is computed before the others or continued, in seconds."""
KEPT_VERSIONS = 2
"""Versions that a replica holds: the one that answers, and the one before or next; with a challenger one more."""


@dataclass(frozen=True)
class Batching:
    """How a replica forms batches; it does not change any answer."""

    max_size: int = 8
    """Most images of a batch."""
    wait_s: float = 0.01
    """Longest time that an image waits for others of its shape, in seconds."""


@dataclass(frozen=True)
class Result:
    """What became of one image."""

    value: Any
    """`detr.inference.detector.Detections`, what `segments.segments` gives, or a `Failure`."""
    model_ms: float
    """Time of its batch on the device, in milliseconds."""


@dataclass(frozen=True)
class _Work:
    """What a job is about."""

    version: LoadedModel
    image: PreparedImage
    request: SegmentRequest | None


@dataclass(eq=False)
class _Job:
    """One image in a queue of Serve, which keeps its last batch, with arguments and results, until the next one of
    that shape comes. So a job holds nothing once it is over: neither the image, nor the result, nor the version.
    """

    work: _Work | None
    """Taken out by the batch."""
    outcome: Result | Exception | None = None
    """Taken out by the client, for whom the batch puts it here. An exception would hold the whole batch by its frames."""
    priority: Priority = "client"
    since: float = field(default_factory=time.monotonic)
    gone: bool = False
    """Its client does not wait any more."""


class _Interruptible(TorchFunctionMode):
    """Has this thread wait before each function of torch while clients' batches are computed.

    Args:
        no_client: set while there are none.
    """

    def __init__(self, no_client: threading.Event) -> None:
        super().__init__()
        self._no_client, self._until = no_client, time.monotonic() + COSTLY_WAIT_S
        self._waited_s = 0.0
        self.is_forced = False
        """Whether it went on next to a client."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._no_client.is_set() and not self.is_forced:
            since = time.monotonic()
            self.is_forced = not self._no_client.wait(max(self._until - since, 0.0))
            self._waited_s += time.monotonic() - since
        return func(*args, **(kwargs or {}))

    def clock(self) -> float:
        """Monotonic time without that in which this thread waited, in seconds."""
        return time.monotonic() - self._waited_s


class Detector:
    """Model versions on one device, with one `serve.batch` queue for each canonical shape.

    Only equal shapes share a forward pass, so an answer never depends on who else is in the batch. A request says
    which version it was prepared for; one that is not here yet is loaded beside the others.

    Args:
        model: the version to begin with: loaded, checked and warm before the replica counts as ready.
        batching: of the queues.
        device: torch's name of it.
        precision: what the model computes in.
        engine: what computes it; see `detr.inference.optimize.optimized`.
        kept_versions: that it holds, those that were asked for last.

    What is asked in the background never shares a batch with what clients wait for, and is computed in their pauses.
    Costly images are computed in the same way, one by one, and every `COSTLY_WAIT_S` one of them like any other image
    where there is no pause. A client that comes meanwhile interrupts such a batch where torch computes on the CPU (for
    `COSTLY_WAIT_S` at most); elsewhere it waits for one of them at most.

    Raises:
        ServingError: the version does not answer its reference image as it should.
    """

    def __init__(
        self,
        model: ResolvedModel,
        batching: Batching,
        device: str,
        precision: Precision = "float32",
        engine: Engine = "torch",
        kept_versions: int = KEPT_VERSIONS,
    ) -> None:
        self.batching, self.device, self.precision, self.engine = batching, device, precision, engine
        self.kept_versions = kept_versions
        self.metrics = ReplicaMetrics()
        self.versions: OrderedDict[str, LoadedModel] = OrderedDict([(_key(model), self._load(model))])
        self.loading: dict[str, asyncio.Task[LoadedModel]] = {}
        self.queues: dict[tuple[str, tuple[int, int], Priority], Callable[[_Job], Awaitable[None]]] = {}
        self._batches = 0  # of clients, on the device or waiting for it
        self._pause = asyncio.Event()
        self._pause.set()
        self._no_client = threading.Event()  # the same for threads
        self._no_client.set()
        self._background = asyncio.Lock()
        self._forced_at = -math.inf
        # One thread: one batch at a time is on the device, and the event loop is free to fill the next.
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="detect")
        # A second one for what can be interrupted: what a GPU or OpenVINO has started cannot.
        self.background_executor = self.executor
        if device == "cpu" and engine == "torch":
            self.background_executor = ThreadPoolExecutor(1, "detect-background")
        # Always the same one: what a thread has freed stays with it, and each new one would add to that.
        self.loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")

    async def detect(self, model: ResolvedModel, image: PreparedImage, in_background: bool = False) -> Result:
        """Detections of one image, computed together with others of its shape that wait."""
        work = _Work(await self._version(model), image, None)
        priority = "shadow" if in_background else _priority(image)
        return await self._answer(_Job(work, priority=priority), "detect", image.shape)

    async def segment(self, model: ResolvedModel, image: PreparedImage, request: SegmentRequest) -> Result:
        """Segments of one image, computed together with others of its shape that wait."""
        work = _Work(await self._version(model), image, request)
        return await self._answer(_Job(work, priority=_priority(image)), "segment", image.shape)

    async def load(self, model: ResolvedModel, in_use: Sequence[ResolvedModel] = ()) -> str | None:
        """Have a version loaded, checked and warm; the one that answers now goes on answering meanwhile.

        Args:
            model: the version.
            in_use: versions that do not make room for it, asked for lately or not.

        Returns:
            None, or why the version cannot be served.
        """
        for used in in_use:
            if _key(used) in self.versions:
                self.versions.move_to_end(_key(used))
        try:
            await self._version(model)
        except (RaydetrError, OSError, ValueError, RuntimeError) as error:
            logger.exception("%s cannot be served", model.label)
            return f"{type(error).__name__}: {error}"
        return None

    async def check_health(self) -> None:
        """Serve asks this every few seconds, and replaces the replica where it fails: the device must still compute.

        What was freed meanwhile is given back: a few milliseconds, without which the memory between the blocks that are
        in use fills up again after each version that was loaded.
        """
        newest = next(reversed(self.versions.values()))
        await asyncio.get_running_loop().run_in_executor(None, _touch, newest)
        await asyncio.get_running_loop().run_in_executor(None, give_back_memory)

    async def _version(self, model: ResolvedModel) -> LoadedModel:
        key = _key(model)
        if (version := self.versions.get(key)) is not None:
            self.versions.move_to_end(key)  # what is asked for is the last to go
            return version
        task = self.loading.get(key)
        if task is None:
            task = self.loading[key] = asyncio.create_task(self._add(key, model))
            task.add_done_callback(lambda _: self.loading.pop(key))
        # A client that goes away must not end what others wait for.
        return await asyncio.shield(task)

    async def _add(self, key: str, model: ResolvedModel) -> LoadedModel:
        version = await asyncio.get_running_loop().run_in_executor(self.loader, self._load, model)
        self.versions[key] = version
        while len(self.versions) > self.kept_versions:
            self.versions.popitem(last=False)
        await asyncio.get_running_loop().run_in_executor(self.loader, gc.collect)
        await asyncio.get_running_loop().run_in_executor(self.loader, give_back_memory)
        return version

    def _load(self, model: ResolvedModel) -> LoadedModel:
        version = LoadedModel.load(model, self.device, self.precision, self.engine)
        version.check()
        return version

    async def _answer(self, job: _Job, task: str, shape: tuple[int, int]) -> Result:
        key = (task, shape, job.priority)
        queue = self.queues.get(key)
        if queue is None:
            queue = self.queues[key] = self._new_queue(task, job.priority)
        try:
            await queue(job)
        except asyncio.CancelledError:
            job.gone, job.work, job.outcome = True, None, None
            raise
        outcome, job.outcome = job.outcome, None
        if isinstance(outcome, Result):
            return outcome
        assert outcome is not None
        raise outcome

    def _new_queue(self, task: str, priority: Priority) -> Callable[[_Job], Awaitable[None]]:
        # A client that comes meanwhile waits for at most one costly image.
        max_size = 1 if priority == "costly" else self.batching.max_size

        @serve.batch(max_batch_size=max_size, batch_wait_timeout_s=self.batching.wait_s)
        async def run_batch(jobs: list[_Job]) -> list[None]:
            outcomes: Sequence[Result | Exception | None]
            try:
                if priority == "client":
                    outcomes = await self._at_once(task, jobs)
                else:
                    wait_s = COSTLY_WAIT_S if priority == "costly" else math.inf
                    outcomes = await self._in_a_pause(task, jobs, wait_s)
            except Exception as error:
                outcomes = [error] * len(jobs)
            for job, outcome in zip(jobs, outcomes, strict=True):
                if not job.gone:
                    job.outcome = outcome
            return [None] * len(jobs)

        return run_batch

    async def _at_once(self, task: str, jobs: list[_Job]) -> list[Result | None]:
        self._batches += 1
        self._pause.clear()
        self._no_client.clear()
        try:
            return await asyncio.get_running_loop().run_in_executor(self.executor, self._run, task, jobs)
        finally:
            self._batches -= 1
            if not self._batches:
                self._pause.set()
                self._no_client.set()

    async def _in_a_pause(self, task: str, jobs: list[_Job], wait_s: float = math.inf) -> list[Result | None]:
        """Run a batch while no client's batch is there; or once, every `wait_s`, where there always is one."""
        since = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                left_s = max(since, self._forced_at) + wait_s - time.monotonic()
                await asyncio.wait_for(self._pause.wait(), None if math.isinf(left_s) else max(left_s, 0.0))
            async with self._background:
                is_forced = time.monotonic() >= max(since, self._forced_at) + wait_s
                if self._batches and is_forced:
                    self._forced_at = time.monotonic()
                if is_forced or not self._batches:
                    executor, run = self.background_executor, self._run_in_pauses
                    if self._batches or executor is self.executor:
                        executor, run = self.executor, self._run
                    return await asyncio.get_running_loop().run_in_executor(executor, run, task, jobs)

    def _run_in_pauses(self, task: str, jobs: list[_Job]) -> list[Result | None]:
        with _Interruptible(self._no_client) as interruptible:
            results = self._run(task, jobs, interruptible.clock)
        if interruptible.is_forced:
            self._forced_at = time.monotonic()
        return results

    def _run(
        self, task: str, jobs: list[_Job], clock: Callable[[], float] = time.monotonic
    ) -> list[Result | None]:
        """Results of a batch, in order, None where the client has gone; while an alias moves the jobs may be of two
        versions.
        """
        started = time.monotonic()
        results: list[Result | None] = [None] * len(jobs)
        groups: dict[int, list[tuple[int, _Work]]] = {}
        for place, job in enumerate(jobs):
            self.metrics.queue_wait_ms.observe(1000 * (started - job.since))
            work, job.work = job.work, None
            if work is not None:
                groups.setdefault(id(work.version), []).append((place, work))
        for group in groups.values():
            computing_since = clock()
            values = self._values([work for _, work in group])
            took = 1000 * (clock() - computing_since)
            self.metrics.model_ms.observe(took, {"task": task})
            self.metrics.batch_size.observe(len(group), {"task": task})
            share = padding_share(work.image.size for _, work in group)
            self.metrics.padding_share.observe(share, {"task": task})
            for (place, _), value in zip(group, values, strict=True):
                if isinstance(value, Failure):
                    self.metrics.out_of_memory.inc()
                results[place] = Result(value, took)
        return results

    @staticmethod
    def _values(group: list[_Work]) -> list[Any]:
        version = group[0].version
        if group[0].request is None:
            return version.detect([work.image for work in group])
        return version.segment([(work.image, work.request) for work in group if work.request is not None])


def _priority(image: PreparedImage) -> Priority:
    return "costly" if isinstance(image, CostlyImage) else "client"


def _key(model: ResolvedModel) -> str:
    return f"{model.address} {model.digest}"


def _touch(version: LoadedModel) -> None:
    """A calculation on the model's device: after an error in a kernel CUDA fails every one."""
    next(version.detector.model.parameters()).sum().item()
