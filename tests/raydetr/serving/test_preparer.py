import asyncio
import dataclasses
import time

import numpy as np
import psutil
import pytest

from detr.inference.detector import prepare_image
from raydetr.errors import RequestError, ServingError
from raydetr.serving import preparer as module
from raydetr.serving.decoding import Lane
from raydetr.serving.images import CostlyImage, Limits, inspect_image
from raydetr.serving.preparer import LIGHT_S, Preparer
from raydetr.serving.refusals import Unavailable
from tests.raydetr.serving.costly import progressive_jpeg
from tests.raydetr.serving.decoders import preparer, program
from tests.raydetr.serving.guarded_app import PROCESSOR
from tests.raydetr.serving.oriented import oriented
from tests.tiny_detr import png

COSTLY = progressive_jpeg(640, 640, 80)
"""Costly by its estimate in these tests; takes some hundredths of a second."""
LONGER = progressive_jpeg(1200, 1200, 45)
"""A tenth of a second."""


@pytest.fixture(autouse=True)
def _low_threshold_for_costly_images(monkeypatch):
    monkeypatch.setattr(module, "LIGHT_S", 0.04)


@pytest.fixture
def own():
    """Create preparers for a single test, with one worker of each kind."""
    made: list[Preparer] = []

    def make(limits: Limits = Limits(), max_costly: int = 32) -> Preparer:  # noqa: B008
        made.append(Preparer(limits, max_costly, 1, program()))
        return made[-1]

    yield make
    for each in made:
        each.close()


def prepare(images, limits: Limits = Limits()):  # noqa: B008
    return asyncio.run(preparer(limits).prepare(images, PROCESSOR))


def test_images_are_prepared_in_order_like_the_detector_does():
    images = [png(20 + i, 30, i) for i in range(5)]
    for data, prepared in zip(images, prepare(images), strict=True):
        assert np.array_equal(prepared.pixels, prepare_image(data, PROCESSOR).pixels)


def test_no_image_is_decoded_if_one_is_rejected_by_its_header(monkeypatch):
    monkeypatch.setattr(Preparer, "_prepare_light", None)
    with pytest.raises(RequestError, match="Image 3 has 50 x 50 pixels"):
        prepare([png(5, 5), png(5, 5), png(50, 50)], Limits(max_pixels=1000))


def test_a_costly_image_is_marked_for_the_model():
    light, costly = prepare([png(20, 30), COSTLY])
    assert not isinstance(light, CostlyImage)
    assert isinstance(costly, CostlyImage)
    assert np.array_equal(costly.pixels, prepare_image(COSTLY, PROCESSOR).pixels)


def test_a_client_with_costly_images_has_low_priority_while_others_are_active(own):
    async def has_low_priority(images: Preparer, client: str) -> bool:
        (prepared,) = await images.prepare([png(20, 30)], PROCESSOR, client)
        return isinstance(prepared, CostlyImage)

    async def run() -> None:
        images = own()
        waiting = asyncio.create_task(images.prepare([LONGER, LONGER], PROCESSOR, "costly"))
        while not images._costly_s.used:
            await asyncio.sleep(0.001)
        assert not await has_low_priority(images, "costly")
        assert not await has_low_priority(images, "other")
        assert await has_low_priority(images, "costly")
        assert not await has_low_priority(images, "other")
        await waiting
        assert not await has_low_priority(images, "costly")

    asyncio.run(run())


def test_an_image_is_turned_upright_on_request():
    data = oriented("PNG", 6)
    (ignored,) = prepare([data])
    (applied,) = asyncio.run(preparer().prepare([data], PROCESSOR, orientation="apply"))
    assert applied.original_size == ignored.original_size[::-1]


def test_photos_do_not_wait_for_costly_images_of_the_same_client(own):
    async def run() -> list[str]:
        images, done = own(), []

        async def one(name: str, data: bytes) -> None:
            await images.prepare([data], PROCESSOR, "client")
            done.append(name)

        costly = [asyncio.create_task(one("costly", COSTLY)) for _ in range(4)]
        await asyncio.sleep(0.05)
        await one("photo", png(20, 30))
        await asyncio.gather(*costly)
        return done

    assert "photo" in asyncio.run(run())[:2]


def test_costly_images_beyond_the_maximum_get_429_and_photos_do_not(own):
    async def run() -> list[int | None]:
        images = own(max_costly=4)

        async def one(data: bytes, client: str) -> int | None:
            try:
                await images.prepare([data], PROCESSOR, client)
            except Unavailable as error:
                return error.status
            return None

        requests = [*[(COSTLY, "a")] * 6, (png(20, 30), "a"), (COSTLY, "b")]
        return await asyncio.gather(*[one(*each) for each in requests])

    outcomes = asyncio.run(run())
    assert outcomes[:6].count(429) == 3
    assert outcomes[6:] == [None, None]


def test_a_large_image_is_costly_regardless_of_its_estimate(own, monkeypatch):
    images, lanes = own(Limits(max_pixels=3000)), []
    submit = Lane.submit
    monkeypatch.setattr(Lane, "submit", lambda lane, job: lanes.append(lane) or submit(lane, job))
    asyncio.run(images.prepare([png(20, 50), png(20, 51)], PROCESSOR))
    assert lanes.count(images._costly) == 1


def test_a_request_with_many_costly_images_uses_one_worker_at_a_time():
    images = Preparer(Limits(), 32, 2, program())
    maximum = 0

    async def watch() -> None:
        nonlocal maximum
        while True:
            maximum = max(maximum, images._costly._in_progress)
            await asyncio.sleep(0.002)

    async def run() -> None:
        watching = asyncio.create_task(watch())
        await images.prepare([COSTLY, png(9, 9), COSTLY], PROCESSOR)
        watching.cancel()

    asyncio.run(run())
    images.close()
    assert maximum == 640 * 640


def test_a_light_image_that_exceeds_its_time_is_retried_as_costly(monkeypatch):
    monkeypatch.setattr(module, "LIGHT_S", 100.0)
    monkeypatch.setattr(module, "LIGHT_CPU_S", 0.02)
    (prepared,) = prepare([LONGER])
    assert prepared.original_size == (1200, 1200)


def test_an_image_that_exceeds_its_cpu_time_is_rejected(monkeypatch):
    task = Preparer._task
    monkeypatch.setattr(
        Preparer, "_task", lambda *given: dataclasses.replace(task(*given), cpu_s=0.02 if given[1] else 60)
    )
    with pytest.raises(RequestError, match=r"The image takes more than 0\.02 s to decode") as error:
        prepare([LONGER])
    assert error.value.status == 413
    monkeypatch.undo()
    assert len(prepare([png(9, 9)])) == 1


def test_an_endpoint_with_a_stuck_worker_is_not_ready(own, monkeypatch):
    images = own()
    assert images.start()
    monkeypatch.setattr(module, "PROBE_S", 0.2)
    parent = psutil.Process(program()._process.pid)
    worker = max(parent.children(), key=lambda each: (each.create_time(), each.pid))
    worker.suspend()
    try:
        assert not images.is_ready()
        assert not images.is_ready()
    finally:
        worker.resume()
    deadline = time.monotonic() + 30
    while not images.is_ready():
        assert time.monotonic() < deadline


def test_an_endpoint_without_workers_is_not_ready_and_answers_503(own, monkeypatch):
    images = own()

    def no_worker(idle_priority: bool) -> None:
        raise ServingError("no worker")

    monkeypatch.setattr(program(), "new_worker", no_worker)
    assert not images.is_ready()
    with pytest.raises(Unavailable) as error:
        asyncio.run(images.prepare([png(9, 9)], PROCESSOR))
    assert (error.value.status, error.value.retry_after_s) == (503, 1.0)
    monkeypatch.undo()
    assert images.is_ready()


def test_a_cancelled_request_releases_its_places(own):
    async def run(images: Preparer) -> None:
        requests = [asyncio.ensure_future(images.prepare([COSTLY], PROCESSOR, "a")) for _ in range(5)]
        await asyncio.sleep(0.1)
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        assert images._costly_s.used == pytest.approx(0)
        await images.prepare([COSTLY], PROCESSOR, "a")

    asyncio.run(run(own()))


def test_the_costly_image_of_these_tests_is_costly():
    assert inspect_image(COSTLY, Limits()).seconds > module.LIGHT_S
    assert inspect_image(png(600, 800), Limits()).seconds < LIGHT_S
