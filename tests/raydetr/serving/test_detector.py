"""The order in which a model replica runs batches on its device. `test_app` tests the batches themselves with Serve."""

import asyncio
import gc
import math
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from ray.serve import batching

from detr.inference.detector import PreparedImage
from raydetr.registry.models import ResolvedModel, resolve
from raydetr.serving.detector import Batching, Detector, _Interruptible, _Job, _Work
from raydetr.serving.images import CostlyImage
from raydetr.serving.segments import SegmentRequest
from tests.tiny_detr import png, save_tiny_detr


class SteppedDetector(Detector):
    """Batches are names. One at a time is on the device, as on a GPU, until the test releases it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.background_executor = self.executor
        self.started: list[str] = []
        self.release = threading.Semaphore(0)

    def _run(self, task: str, jobs: Any, clock: Any = None) -> Any:
        self.started.append(jobs)
        assert self.release.acquire(timeout=60)
        return jobs


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ResolvedModel:
    return resolve(str(save_tiny_detr(tmp_path_factory.mktemp("model") / "tiny", ["ant"], edge=64)), "")


def test_shadow_batches_run_while_no_client_batch_is_in_flight(model):
    async def ask() -> list[str]:
        detector = SteppedDetector(model, Batching(), "cpu")

        async def wait_for_start(count: int) -> None:
            while len(detector.started) < count:
                await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(detector._run_now("detect", "client 1"))]  # type: ignore[arg-type]
        await wait_for_start(1)
        for name in ("shadow 1", "shadow 2"):
            tasks.append(asyncio.create_task(detector._run_when_idle("detect", name)))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        tasks.append(asyncio.create_task(detector._run_now("detect", "client 2")))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        detector.release.release()  # client 1 finishes
        await wait_for_start(2)
        detector.release.release()  # client 2 finishes: the device is idle
        await wait_for_start(3)
        # A client that arrives now waits for this shadow batch only, not for the other one.
        tasks.append(asyncio.create_task(detector._run_now("detect", "client 3")))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        for _ in range(3):
            detector.release.release()
        await asyncio.gather(*tasks)
        return detector.started

    assert asyncio.run(ask()) == ["client 1", "client 2", "shadow 1", "client 3", "shadow 2"]


class CountingDetector(Detector):
    """A costly batch counts until `stop` is set. A client's batch is on the device until `release_client` is set."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.count = 0
        self.thread = ""
        self.stop, self.client_started, self.release_client = [threading.Event() for _ in range(3)]

    def _run(self, task: str, jobs: Any, clock: Any = None) -> Any:
        if jobs == "client":
            self.client_started.set()
            assert self.release_client.wait(60)
        else:
            self.thread = threading.current_thread().name
            while not self.stop.is_set():
                self.count += int(torch.ones(1))
                time.sleep(0.005)

    async def is_interrupted(self) -> bool:
        before = self.count + 1  # it may be between two torch functions
        until = time.monotonic() + 1.0  # on a busy machine, a thread may not run for a while
        while time.monotonic() < until:
            await asyncio.sleep(0.01)
            if self.count > before:
                return False
        return True

    async def wait_until_resumed(self) -> None:
        before = self.count + 1
        await self.wait_until(lambda: self.count > before)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.005)

    def run_test(self, ask: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a test; release the threads if it fails, since the interpreter waits for them when it exits."""
        try:
            asyncio.run(asyncio.wait_for(ask(), 60))
        finally:
            self.stop.set()
            self.release_client.set()


def test_a_client_interrupts_background_batches_on_a_cpu(model):
    detector = CountingDetector(model, Batching(), "cpu")

    async def ask() -> None:
        background = asyncio.create_task(detector._run_when_idle("detect", "costly", 60.0))  # type: ignore[arg-type]
        await detector.wait_until(lambda: detector.count > 0)
        client = asyncio.create_task(detector._run_now("detect", "client"))  # type: ignore[arg-type]
        await detector.wait_until(detector.client_started.is_set)
        assert await detector.is_interrupted()
        detector.release_client.set()
        await client
        await detector.wait_until_resumed()
        detector.stop.set()
        await background

    detector.run_test(ask)


def test_a_costly_image_that_has_waited_long_enough_is_not_interrupted(model):
    detector = CountingDetector(model, Batching(), "cpu")

    async def ask() -> None:
        client = asyncio.create_task(detector._run_now("detect", "client"))  # type: ignore[arg-type]
        await detector.wait_until(detector.client_started.is_set)
        costly = asyncio.create_task(detector._run_when_idle("detect", "costly", 0.1))  # type: ignore[arg-type]
        await detector.wait_until(lambda: detector._last_forced_at > 0)
        late = asyncio.create_task(detector._run_now("detect", "client"))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        detector.release_client.set()
        await client
        await detector.wait_until_resumed()  # while a client is waiting
        assert detector.thread.startswith("detect_")
        detector.stop.set()
        await asyncio.gather(costly, late)

    detector.run_test(ask)


def test_an_interrupted_batch_resumes_after_the_limit_and_its_wait_is_not_measured(model, monkeypatch):
    monkeypatch.setattr("raydetr.serving.detector.COSTLY_WAIT_S", 0.3)
    with _Interruptible(threading.Event()) as interruptible:
        started, clock = time.monotonic(), interruptible.clock()
        assert int(torch.ones(2).sum()) == 2
        took, computed = time.monotonic() - started, interruptible.clock() - clock
    assert interruptible.is_forced
    assert took >= 0.25
    assert took - computed >= 0.25


def test_results_do_not_depend_on_concurrent_batches(model):
    """Both threads use the same model."""
    detector = Detector(model, Batching(), "cpu")
    (version,) = detector.versions.values()

    def image(seed: int) -> _Job:
        pixels = np.random.default_rng(seed).integers(0, 256, (3, 64, 96), np.uint8)
        return _Job(_Work(version, PreparedImage(pixels, (64, 96), (64, 96)), None))

    async def ask() -> list[Any]:
        tasks = []
        for seed in range(40):
            tasks.append(asyncio.create_task(detector._run_when_idle("detect", [image(seed)])))
            await asyncio.sleep(0)  # it starts on an idle device, and a client follows
            tasks.append(asyncio.create_task(detector._run_now("detect", [image(seed + 1)])))
            await asyncio.sleep(0.002)
        return [result.value for (result,) in await asyncio.gather(*tasks)]  # type: ignore[union-attr]

    expected = [detector._run("detect", [image(seed)])[0].value for seed in range(41)]  # type: ignore[union-attr]
    values = asyncio.run(ask())
    for value, seed in zip(values, [seed + more for seed in range(40) for more in (0, 1)], strict=True):
        assert np.array_equal(value.scores, expected[seed].scores)
        assert np.array_equal(value.boxes_xyxy, expected[seed].boxes_xyxy)


def test_costly_images_run_on_an_idle_device_or_after_a_maximum_wait(model):
    async def ask() -> tuple[list[str], float]:
        detector = SteppedDetector(model, Batching(), "cpu")

        async def wait_for_start(count: int) -> None:
            while len(detector.started) < count:
                await asyncio.sleep(0.01)

        clients = [asyncio.create_task(detector._run_now("detect", "client")) for _ in range(4)]  # type: ignore[arg-type]
        await wait_for_start(1)
        started = time.monotonic()
        costly = [
            asyncio.create_task(detector._run_when_idle("detect", "costly", 0.2))  # type: ignore[arg-type]
            for _ in range(2)
        ]
        await asyncio.sleep(0.3)  # one of them is queued now, behind the clients
        clients.append(asyncio.create_task(detector._run_now("detect", "late client")))  # type: ignore[arg-type]
        for done in range(6):
            await wait_for_start(done + 1)
            detector.release.release()
        waited = detector._last_forced_at - started
        detector.release.release()
        await asyncio.gather(*clients, *costly)
        return detector.started, waited

    order, waited = asyncio.run(ask())
    assert order == [*["client"] * 4, "costly", "late client", "costly"]
    assert waited >= 0.19


@pytest.mark.slow
def test_a_batch_that_serve_retains_does_not_retain_its_version(model, tmp_path):
    others = [resolve(str(save_tiny_detr(tmp_path / name, [name], edge=64)), "") for name in ("bee", "cow")]

    async def replace() -> None:
        detector = Detector(model, Batching(), "cpu", max_versions=2)
        version = next(iter(detector.versions.values()))
        batch = [_Job(_Work(version, version.detector.prepare(png(60, 90, 0)), None))]
        (result,) = await detector._run_now("detect", batch)
        assert result is not None
        assert len(result.value.scores) > 0
        replaced = weakref.ref(version)
        del version
        for other in others:
            assert await detector.load(other) is None
        gc.collect()
        assert replaced() is None

    asyncio.run(replace())


class FakeModelDetector(Detector):
    """Queues and jobs of a detector, without a model. Results are arrays, and a shape of height 3 fails."""

    def __init__(self) -> None:
        self.batching, self.queues = Batching(4, 0.01), {}
        self._client_batches, self._idle, self._background = 0, asyncio.Event(), asyncio.Lock()
        self._last_forced_at, self._no_client = -math.inf, threading.Event()
        self.executor = self.background_executor = ThreadPoolExecutor(1)
        self.metrics = MagicMock()
        self.values: list[weakref.ref] = []

    async def _version(self, model: Any) -> Any:
        return self

    def _values(self, group: list[_Work]) -> list[Any]:
        if group[0].image.shape[0] == 3:
            raise RuntimeError("no kernel for this shape")
        values = [np.full((100, 100), id(work)) for work in group]
        self.values += [weakref.ref(value) for value in values]
        return values


def test_no_image_or_result_is_retained_after_the_answer(monkeypatch):
    """Serve has a queue for each shape, and each queue retains its last batch."""
    monkeypatch.setattr(
        batching._BatchQueue, "_warn_if_max_batch_size_exceeds_max_ongoing_requests", lambda _: None
    )

    async def run() -> None:
        detector = FakeModelDetector()
        images: list[weakref.ref] = []

        async def ask(height: int, method: Any, *args: Any) -> None:
            image = PreparedImage(np.zeros((3, height, 64), np.uint8), (height, 64), (height, 64))
            images.append(weakref.ref(image))
            if height == 3:
                with pytest.raises(RuntimeError, match="no kernel"):
                    await method(None, image, *args)
            else:
                assert isinstance((await method(None, image, *args)).value, np.ndarray)

        segments = SegmentRequest("instance", 0.5, "rle")
        for height in range(1, 6):
            await asyncio.gather(
                *[ask(height, detector.detect) for _ in range(5)],
                *[ask(height, detector.detect, True) for _ in range(5)],
                *[ask(height, detector.segment, segments) for _ in range(3)],
            )
        costly = [PreparedImage(np.zeros((3, 7, 64), np.uint8), (7, 64), (7, 64)) for _ in range(3)]
        sizes = detector.metrics.batch_size.observe
        sizes.reset_mock()
        await asyncio.gather(
            *[detector.detect(None, CostlyImage(*vars(image).values())) for image in costly]  # type: ignore[arg-type]
        )
        assert [call.args[0] for call in sizes.call_args_list] == [1, 1, 1]
        detector.queues.popitem()
        cancelled = [asyncio.ensure_future(ask(4, detector.detect)) for _ in range(3)]
        await asyncio.sleep(0.001)
        for task in cancelled:
            task.cancel()
        await asyncio.gather(*cancelled, return_exceptions=True)
        cancelled.clear()
        del task  # its exception has a frame with the image
        await asyncio.sleep(0.05)
        gc.collect()
        assert len(images) == 68
        assert len(detector.queues) == 15
        assert sum(image() is not None for image in images) == 0
        assert sum(value() is not None for value in detector.values) == 0
        detector.queues.clear()  # while the loop exists: Serve's queues create a new one when they are deleted
        gc.collect()
        detector.executor.shutdown()

    asyncio.run(run())
