"""What a model replica puts on its device, and when; batches themselves are tested with Serve in `test_app`."""

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest

from raydetr.registry.models import ResolvedModel, resolve
from raydetr.serving.detector import Batching, Detector, _Job
from tests.tiny_detr import png, save_tiny_detr


class OneAtATime(Detector):
    """Batches are names; each is on the device until the test lets it go."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.begun: list[str] = []
        self.go_on = threading.Semaphore(0)

    def _run(self, task: str, jobs: Any) -> Any:
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


@pytest.mark.slow
def test_a_batch_that_serve_keeps_does_not_keep_its_version(model, tmp_path):
    others = [resolve(str(save_tiny_detr(tmp_path / name, [name], edge=64)), "") for name in ("bee", "cow")]

    async def replace() -> None:
        detector = Detector(model, Batching(), "cpu", kept_versions=2)
        version = next(iter(detector.versions.values()))
        batch = [_Job(version, version.detector.prepare(png(60, 90, 0)), None)]
        (result,) = await detector._at_once("detect", batch)
        assert len(result.value.scores) > 0
        replaced = weakref.ref(version)
        del version
        for other in others:
            assert await detector.load(other) is None
        gc.collect()
        assert replaced() is None

    asyncio.run(replace())
