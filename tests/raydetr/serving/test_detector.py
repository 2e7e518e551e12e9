"""What a model replica puts on its device, and when; batches themselves are tested with Serve in `test_app`."""

import asyncio
import gc
import math
import threading
import time
import weakref
from collections.abc import Callable
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


class OneAtATime(Detector):
    """Batches are names; each is on the device, one for all as a GPU is, until the test lets it go."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.background_executor = self.executor
        self.begun: list[str] = []
        self.go_on = threading.Semaphore(0)

    def _run(self, task: str, jobs: Any, clock: Any = None) -> Any:
        self.begun.append(jobs)
        assert self.go_on.acquire(timeout=60)
        return jobs


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ResolvedModel:
    return resolve(str(save_tiny_detr(tmp_path_factory.mktemp("model") / "tiny", ["ant"], edge=64)), "")


def test_what_nobody_waits_for_is_computed_in_the_pauses_of_clients(model):
    async def ask() -> list[str]:
        detector = OneAtATime(model, Batching(), "cpu")

        async def begun(count: int) -> None:
            while len(detector.begun) < count:
                await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(detector._at_once("detect", "client 1"))]  # type: ignore[arg-type]
        await begun(1)
        for name in ("shadow 1", "shadow 2"):
            tasks.append(asyncio.create_task(detector._in_a_pause("detect", name)))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        tasks.append(asyncio.create_task(detector._at_once("detect", "client 2")))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        detector.go_on.release()  # client 1 ends
        await begun(2)
        detector.go_on.release()  # client 2 ends: a pause
        await begun(3)
        # One that comes now waits for this batch alone, not for the other one of the shadow.
        tasks.append(asyncio.create_task(detector._at_once("detect", "client 3")))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        for _ in range(3):
            detector.go_on.release()
        await asyncio.gather(*tasks)
        return detector.begun

    assert asyncio.run(ask()) == ["client 1", "client 2", "shadow 1", "client 3", "shadow 2"]


class Gated(Detector):
    """A costly batch counts until it is told to stop; a client's is on the device until the test lets it go."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.count = 0
        self.thread = ""
        self.stop, self.client_is_there, self.let_it_go = [threading.Event() for _ in range(3)]

    def _run(self, task: str, jobs: Any, clock: Any = None) -> Any:
        if jobs == "client":
            self.client_is_there.set()
            assert self.let_it_go.wait(60)
        else:
            self.thread = threading.current_thread().name
            while not self.stop.is_set():
                self.count += int(torch.ones(1))
                time.sleep(0.005)

    async def stands_still(self) -> bool:
        before = self.count + 1  # it may be between two functions of torch
        await asyncio.sleep(0.2)
        return self.count <= before

    async def goes_on(self) -> None:
        before = self.count + 1
        await self.until(lambda: self.count > before)

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await asyncio.sleep(0.005)


def test_a_client_interrupts_the_background_on_a_cpu(model):
    async def ask() -> None:
        detector = Gated(model, Batching(), "cpu")
        background = asyncio.create_task(detector._in_a_pause("detect", "costly", 60.0))  # type: ignore[arg-type]
        await detector.until(lambda: detector.count > 0)
        client = asyncio.create_task(detector._at_once("detect", "client"))  # type: ignore[arg-type]
        await detector.until(detector.client_is_there.is_set)
        assert await detector.stands_still()
        detector.let_it_go.set()
        await client
        await detector.goes_on()
        detector.stop.set()
        await background

    asyncio.run(asyncio.wait_for(ask(), 60))


def test_a_costly_image_whose_time_has_come_is_not_interrupted(model):
    async def ask() -> None:
        detector = Gated(model, Batching(), "cpu")
        client = asyncio.create_task(detector._at_once("detect", "client"))  # type: ignore[arg-type]
        await detector.until(detector.client_is_there.is_set)
        costly = asyncio.create_task(detector._in_a_pause("detect", "costly", 0.1))  # type: ignore[arg-type]
        await detector.until(lambda: detector._forced_at > 0)
        late = asyncio.create_task(detector._at_once("detect", "client"))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        detector.let_it_go.set()
        await client
        await detector.goes_on()  # while a client is waiting
        assert detector.thread.startswith("detect_")
        detector.stop.set()
        await asyncio.gather(costly, late)

    asyncio.run(asyncio.wait_for(ask(), 60))


def test_what_was_interrupted_continues_in_the_end_and_the_wait_is_not_its_time(model, monkeypatch):
    monkeypatch.setattr("raydetr.serving.detector.COSTLY_WAIT_S", 0.3)
    with _Interruptible(threading.Event()) as interruptible:
        began, clock = time.monotonic(), interruptible.clock()
        assert int(torch.ones(2).sum()) == 2
        took, computed = time.monotonic() - began, interruptible.clock() - clock
    assert interruptible.is_forced
    assert took >= 0.25
    assert took - computed >= 0.25


def test_answers_are_the_same_while_others_are_computed(model):
    """Both threads use one model."""
    detector = Detector(model, Batching(), "cpu")
    (version,) = detector.versions.values()

    def image(seed: int) -> _Job:
        pixels = np.random.default_rng(seed).integers(0, 256, (3, 64, 96), np.uint8)
        return _Job(_Work(version, PreparedImage(pixels, (64, 96), (64, 96)), None))

    async def ask() -> list[Any]:
        tasks = []
        for seed in range(40):
            tasks.append(asyncio.create_task(detector._in_a_pause("detect", [image(seed)])))
            await asyncio.sleep(0)  # a pause for it, and a client right after
            tasks.append(asyncio.create_task(detector._at_once("detect", [image(seed + 1)])))
            await asyncio.sleep(0.002)
        return [found.value for (found,) in await asyncio.gather(*tasks)]  # type: ignore[union-attr]

    expected = [detector._run("detect", [image(seed)])[0].value for seed in range(41)]  # type: ignore[union-attr]
    found = asyncio.run(ask())
    for got, seed in zip(found, [seed + more for seed in range(40) for more in (0, 1)], strict=True):
        assert np.array_equal(got.scores, expected[seed].scores)
        assert np.array_equal(got.boxes_xyxy, expected[seed].boxes_xyxy)


def test_costly_images_are_computed_in_pauses_and_one_of_them_at_times_without_any(model):
    async def ask() -> tuple[list[str], float]:
        detector = OneAtATime(model, Batching(), "cpu")

        async def begun(count: int) -> None:
            while len(detector.begun) < count:
                await asyncio.sleep(0.01)

        clients = [asyncio.create_task(detector._at_once("detect", "client")) for _ in range(4)]  # type: ignore[arg-type]
        await begun(1)
        started = time.monotonic()
        costly = [
            asyncio.create_task(detector._in_a_pause("detect", "costly", 0.2))  # type: ignore[arg-type]
            for _ in range(2)
        ]
        await asyncio.sleep(0.3)  # one of them is in line now, behind the clients
        clients.append(asyncio.create_task(detector._at_once("detect", "late client")))  # type: ignore[arg-type]
        for done in range(6):
            await begun(done + 1)
            detector.go_on.release()
        waited = detector._forced_at - started
        detector.go_on.release()
        await asyncio.gather(*clients, *costly)
        return detector.begun, waited

    order, waited = asyncio.run(ask())
    assert order == [*["client"] * 4, "costly", "late client", "costly"]
    assert waited >= 0.19


@pytest.mark.slow
def test_a_batch_that_serve_keeps_does_not_keep_its_version(model, tmp_path):
    others = [resolve(str(save_tiny_detr(tmp_path / name, [name], edge=64)), "") for name in ("bee", "cow")]

    async def replace() -> None:
        detector = Detector(model, Batching(), "cpu", kept_versions=2)
        version = next(iter(detector.versions.values()))
        batch = [_Job(_Work(version, version.detector.prepare(png(60, 90, 0)), None))]
        (result,) = await detector._at_once("detect", batch)
        assert result is not None
        assert len(result.value.scores) > 0
        replaced = weakref.ref(version)
        del version
        for other in others:
            assert await detector.load(other) is None
        gc.collect()
        assert replaced() is None

    asyncio.run(replace())


class Computes(Detector):
    """Queues and jobs of a detector, without a model: boxes are noise, and a shape of height 3 fails."""

    def __init__(self) -> None:
        self.batching, self.queues = Batching(4, 0.01), {}
        self._batches, self._pause, self._background = 0, asyncio.Event(), asyncio.Lock()
        self._forced_at, self._no_client = -math.inf, threading.Event()
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


def test_nothing_of_an_image_is_retained_once_it_is_answered(monkeypatch):
    """Serve's queues, of which there is one for each shape, keep their last batch."""
    monkeypatch.setattr(
        batching._BatchQueue, "_warn_if_max_batch_size_exceeds_max_ongoing_requests", lambda _: None
    )

    async def run() -> None:
        detector = Computes()
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
        gone = [asyncio.ensure_future(ask(4, detector.detect)) for _ in range(3)]
        await asyncio.sleep(0.001)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        gone.clear()
        del task  # whose exception has a frame with the image
        await asyncio.sleep(0.05)
        gc.collect()
        assert len(images) == 68
        assert len(detector.queues) == 15
        assert sum(image() is not None for image in images) == 0
        assert sum(value() is not None for value in detector.values) == 0
        detector.queues.clear()  # while there is a loop: Serve's queues make a new one when they are deleted
        gc.collect()
        detector.executor.shutdown()

    asyncio.run(run())
