"""The model replica: prepared images to detections or segments, in batches of one canonical shape."""

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
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from ray import serve
from torch.overrides import TorchFunctionMode

from detr.config import EngineName
from detr.inference.detector import Detections, PreparedImage, padding_share
from raydetr.errors import RaydetrError
from raydetr.registry.models import ResolvedModel
from raydetr.serving.images import CostlyImage
from raydetr.serving.loaded import Failure, LoadedModel, Precision
from raydetr.serving.memory import trim_memory
from raydetr.serving.metrics import ReplicaMetrics
from raydetr.serving.segments import ResponseFields, SegmentRequest

logger = logging.getLogger("ray.serve")
Value = TypeVar("Value")
Priority: TypeAlias = Literal["client", "costly", "shadow"]
"""Priority of an image: of a client, of a client but costly, or of a shadow comparison that no client waits for."""
COSTLY_WAIT_S = 5.0
"""Maximum time that clients' batches may delay a costly image, in seconds; then it is computed or resumed anyway."""
MAX_VERSIONS = 2
"""Maximum number of versions in a replica: the served one and the previous or next one. A challenger adds one."""


@dataclass(frozen=True)
class Batching:
    """Batching of a replica. It does not change any result."""

    max_size: int = 8
    """Maximum number of images of a batch."""
    wait_s: float = 0.01
    """Maximum time that an image waits for others of its shape, in seconds."""


@dataclass(frozen=True)
class Result(Generic[Value]):
    """Result for one image."""

    value: Value
    """`Detections`, `ResponseFields`, or a `Failure`."""
    model_ms: float
    """Time that the batch took on the device, in milliseconds."""


@dataclass(frozen=True)
class _Work:
    """Input of a job."""

    version: LoadedModel
    image: PreparedImage
    request: SegmentRequest | None


@dataclass(eq=False)
class _Job:
    """One image in a queue of Serve.

    A queue of Serve holds the arguments and results of its last batch until the next batch of that shape. A finished
    job must therefore hold nothing: no image, no result and no version.
    """

    work: _Work | None
    """Removed by the batch."""
    outcome: Result[Any] | Exception | None = None
    """Set by the batch, removed by the waiting client. An exception would hold the whole batch through its frames."""
    priority: Priority = "client"
    since: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    """Whether the client has stopped waiting."""


class _Interruptible(TorchFunctionMode):
    """Pause this thread before each torch function while batches of clients are computed.

    Args:
        no_client: set while no batch of a client is in flight.
    """

    def __init__(self, no_client: threading.Event) -> None:
        super().__init__()
        self._no_client, self._until = no_client, time.monotonic() + COSTLY_WAIT_S
        self._waited_s = 0.0
        self.is_forced = False
        """Whether it resumed after `COSTLY_WAIT_S` although a client was being served."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._no_client.is_set() and not self.is_forced:
            since = time.monotonic()
            self.is_forced = not self._no_client.wait(max(self._until - since, 0.0))
            self._waited_s += time.monotonic() - since
        return func(*args, **(kwargs or {}))

    def clock(self) -> float:
        """Return the monotonic time minus the time that this thread was paused, in seconds."""
        return time.monotonic() - self._waited_s


class Detector:
    """Model versions on one device, with one `serve.batch` queue for each canonical shape.

    Only equal shapes share a forward pass, so a result never depends on the other images of the batch. A request names
    the version that it was prepared for; a version that is not loaded yet is loaded next to the others.

    Background work (shadow comparisons) never shares a batch with images of clients, and is computed while no client's
    batch is in flight. Costly images are computed in the same way, one at a time; if clients leave no idle time, one of
    them is computed every `COSTLY_WAIT_S` anyway. A client's batch that arrives meanwhile interrupts such a batch if
    torch computes on the CPU, for at most `COSTLY_WAIT_S`. On a GPU or with OpenVINO it waits for at most one of them.

    Args:
        model: the first version; loaded, checked and warmed up before the replica is ready.
        batching: batching of the queues.
        device: torch device.
        precision: precision of the model.
        engine: inference engine, see `detr.inference.optimize.optimized`.
        max_versions: maximum number of loaded versions; the least recently used one is dropped.

    Raises:
        ServingError: the version fails the check on its reference image.
    """

    def __init__(
        self,
        model: ResolvedModel,
        batching: Batching,
        device: str,
        precision: Precision = "float32",
        engine: EngineName = "torch",
        max_versions: int = MAX_VERSIONS,
    ) -> None:
        self.batching, self.device, self.precision, self.engine = batching, device, precision, engine
        self.max_versions = max_versions
        self.metrics = ReplicaMetrics()
        self.versions: OrderedDict[str, LoadedModel] = OrderedDict([(_key(model), self._load(model))])
        self.loading: dict[str, asyncio.Task[LoadedModel]] = {}
        self.queues: dict[tuple[str, tuple[int, int], Priority], Callable[[_Job], Awaitable[None]]] = {}
        self._client_batches = 0  # on the device or waiting for it
        self._idle = asyncio.Event()  # set while no client's batch is in flight
        self._idle.set()
        self._no_client = threading.Event()  # the same as `_idle`, for threads
        self._no_client.set()
        self._background = asyncio.Lock()
        self._last_forced_at = -math.inf
        # One thread: one batch at a time is on the device, while the event loop fills the next one.
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="detect")
        # A second thread for batches that can be interrupted. A GPU or OpenVINO finishes what it has started.
        self.background_executor = self.executor
        if device == "cpu" and engine == "torch":
            self.background_executor = ThreadPoolExecutor(1, "detect-background")
        # Always the same thread: glibc retains what a thread has freed, and each new thread would add to that.
        self.loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")

    async def detect(
        self, model: ResolvedModel, image: PreparedImage, in_background: bool = False
    ) -> Result[Detections | Failure]:
        """Detect objects in one image, batched with waiting images of its shape."""
        work = _Work(await self._version(model), image, None)
        priority = "shadow" if in_background else _priority(image)
        return await self._answer(_Job(work, priority=priority), "detect", image.shape)

    async def segment(
        self, model: ResolvedModel, image: PreparedImage, request: SegmentRequest
    ) -> Result[ResponseFields | Failure]:
        """Segment one image, batched with waiting images of its shape."""
        work = _Work(await self._version(model), image, request)
        return await self._answer(_Job(work, priority=_priority(image)), "segment", image.shape)

    async def load(self, model: ResolvedModel, in_use: Sequence[ResolvedModel] = ()) -> str | None:
        """Load, check and warm up a version while the served one continues to answer.

        Args:
            model: the version.
            in_use: versions that must not be dropped to make room for it, even if they are the least recently used.

        Returns:
            None, or the reason why the version cannot be served.
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
        """Check that the device still computes. Serve calls this every few seconds and replaces a replica that fails.

        Freed memory is returned to the operating system as well, which takes a few milliseconds. Without it, the gaps
        between used blocks grow with each version that is loaded.
        """
        newest = next(reversed(self.versions.values()))
        await asyncio.get_running_loop().run_in_executor(None, _check_device, newest)
        await asyncio.get_running_loop().run_in_executor(None, trim_memory)

    async def _version(self, model: ResolvedModel) -> LoadedModel:
        key = _key(model)
        if (version := self.versions.get(key)) is not None:
            self.versions.move_to_end(key)  # least recently used first
            return version
        task = self.loading.get(key)
        if task is None:
            task = self.loading[key] = asyncio.create_task(self._add(key, model))
            task.add_done_callback(lambda _: self.loading.pop(key))
        # A client that disconnects must not cancel a load that others wait for.
        return await asyncio.shield(task)

    async def _add(self, key: str, model: ResolvedModel) -> LoadedModel:
        version = await asyncio.get_running_loop().run_in_executor(self.loader, self._load, model)
        self.versions[key] = version
        while len(self.versions) > self.max_versions:
            self.versions.popitem(last=False)
        await asyncio.get_running_loop().run_in_executor(self.loader, gc.collect)
        await asyncio.get_running_loop().run_in_executor(self.loader, trim_memory)
        return version

    def _load(self, model: ResolvedModel) -> LoadedModel:
        version = LoadedModel.load(model, self.device, self.precision, self.engine)
        version.check()
        return version

    async def _answer(self, job: _Job, task: str, shape: tuple[int, int]) -> Result[Any]:
        key = (task, shape, job.priority)
        queue = self.queues.get(key)
        if queue is None:
            queue = self.queues[key] = self._new_queue(task, job.priority)
        try:
            await queue(job)
        except asyncio.CancelledError:
            job.cancelled, job.work, job.outcome = True, None, None
            raise
        outcome, job.outcome = job.outcome, None
        if isinstance(outcome, Result):
            return outcome
        assert outcome is not None
        raise outcome

    def _new_queue(self, task: str, priority: Priority) -> Callable[[_Job], Awaitable[None]]:
        # A client that arrives meanwhile waits for at most one costly image.
        max_size = 1 if priority == "costly" else self.batching.max_size

        @serve.batch(max_batch_size=max_size, batch_wait_timeout_s=self.batching.wait_s)
        async def run_batch(jobs: list[_Job]) -> list[None]:
            outcomes: Sequence[Result[Any] | Exception | None]
            try:
                if priority == "client":
                    outcomes = await self._run_now(task, jobs)
                else:
                    wait_s = COSTLY_WAIT_S if priority == "costly" else math.inf
                    outcomes = await self._run_when_idle(task, jobs, wait_s)
            except Exception as error:
                outcomes = [error] * len(jobs)
            for job, outcome in zip(jobs, outcomes, strict=True):
                if not job.cancelled:
                    job.outcome = outcome
            return [None] * len(jobs)

        return run_batch

    async def _run_now(self, task: str, jobs: list[_Job]) -> list[Result[Any] | None]:
        self._client_batches += 1
        self._idle.clear()
        self._no_client.clear()
        try:
            return await asyncio.get_running_loop().run_in_executor(self.executor, self._run, task, jobs)
        finally:
            self._client_batches -= 1
            if not self._client_batches:
                self._idle.set()
                self._no_client.set()

    async def _run_when_idle(
        self, task: str, jobs: list[_Job], wait_s: float = math.inf
    ) -> list[Result[Any] | None]:
        """Run a batch while no client's batch is in flight. If clients leave no idle time, run one every `wait_s`."""
        since = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                left_s = max(since, self._last_forced_at) + wait_s - time.monotonic()
                await asyncio.wait_for(self._idle.wait(), None if math.isinf(left_s) else max(left_s, 0.0))
            async with self._background:
                # Check again: while this batch waited, a client's batch may have arrived or another one been forced.
                is_forced = time.monotonic() >= max(since, self._last_forced_at) + wait_s
                if self._client_batches and is_forced:
                    self._last_forced_at = time.monotonic()
                if is_forced or not self._client_batches:
                    executor, run = self.background_executor, self._run_interruptible
                    if self._client_batches or executor is self.executor:
                        executor, run = self.executor, self._run
                    return await asyncio.get_running_loop().run_in_executor(executor, run, task, jobs)

    def _run_interruptible(self, task: str, jobs: list[_Job]) -> list[Result[Any] | None]:
        with _Interruptible(self._no_client) as interruptible:
            results = self._run(task, jobs, interruptible.clock)
        if interruptible.is_forced:
            self._last_forced_at = time.monotonic()
        return results

    def _run(
        self, task: str, jobs: list[_Job], clock: Callable[[], float] = time.monotonic
    ) -> list[Result[Any] | None]:
        """Return the results of a batch in order, None for cancelled jobs.

        While an alias moves, a batch may contain jobs of two versions.
        """
        started = time.monotonic()
        results: list[Result[Any] | None] = [None] * len(jobs)
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
    def _values(group: list[_Work]) -> Sequence[Detections | ResponseFields | Failure]:
        version = group[0].version
        if group[0].request is None:
            return version.detect([work.image for work in group])
        return version.segment([(work.image, work.request) for work in group if work.request is not None])


def _priority(image: PreparedImage) -> Priority:
    return "costly" if isinstance(image, CostlyImage) else "client"


def _key(model: ResolvedModel) -> str:
    return f"{model.model_uri} {model.digest}"


def _check_device(version: LoadedModel) -> None:
    """Compute something on the model's device: after an error in a kernel, every CUDA call fails."""
    next(version.detector.model.parameters()).sum().item()
