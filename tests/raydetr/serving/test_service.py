"""Errors of Serve and admission limits of the service, with a fake handle that fails like Serve's."""

import asyncio
import contextlib
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from detr.inference.detector import ObjectDetector, PreparedImage
from raydetr.errors import RequestError
from raydetr.registry.models import resolve
from raydetr.serving.detector import Result
from raydetr.serving.images import CostlyImage, Limits
from raydetr.serving.loaded import OUT_OF_MEMORY
from raydetr.serving.refusals import Unavailable
from raydetr.serving.served_version import ServedVersion
from raydetr.serving.service import MAX_COSTLY, Service
from tests.raydetr.serving.decoders import preparer
from tests.tiny_detr import png, save_tiny_detr

RESULT = Result("detections", 1.0)


class Call:
    """Like `DeploymentResponse`: awaitable and cancellable."""

    def __init__(self, outcome: Any) -> None:
        self.outcome, self.cancelled = outcome, False

    def __await__(self):
        return self._outcome().__await__()

    async def _outcome(self):
        if self.outcome is None:
            await asyncio.Event().wait()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        if callable(self.outcome):
            return await self.outcome()
        return self.outcome

    def cancel(self) -> None:
        self.cancelled = True


class Replicas:
    """Like the handle of the model replicas. Each call has the next outcome; None never finishes."""

    def __init__(self, *outcomes: Any) -> None:
        self.calls = [Call(outcome) for outcome in outcomes]
        self.made: list[Call] = []
        self.detect = self

    def remote(self, *_: object) -> Call:
        self.made.append(self.calls[len(self.made)])
        return self.made[-1]


@pytest.fixture(scope="module")
def version(tmp_path_factory) -> ServedVersion:
    folder = save_tiny_detr(tmp_path_factory.mktemp("model") / "tiny", ["ant"], edge=64)
    return ServedVersion.of(resolve(str(folder), ""))


@pytest.fixture(scope="module")
def image(version) -> PreparedImage:
    return ObjectDetector.from_pretrained(version.model.folder).prepare(png(60, 90))


def ask(version: ServedVersion, image: PreparedImage, replicas: Replicas, images: int = 1) -> list[Result]:
    service = Service(version, replicas, preparer(), 2, lambda: True)
    return asyncio.run(service.detect([image] * images, version))


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (BackPressureError(5, 5), 429),
        (DeploymentUnavailableError(DeploymentID("Detector", "raydetr")), 503),
        (Result(OUT_OF_MEMORY, 1.0), 503),
    ],
)
def test_serve_errors_become_responses_with_retry_after(version, image, outcome, status):
    with pytest.raises(Unavailable) as error:
        ask(version, image, Replicas(outcome))
    assert (error.value.status, error.value.retry_after_s) == (status, 1.0)


def test_an_image_of_a_dead_replica_is_retried_a_few_times(version, image):
    replicas = Replicas(ActorDiedError(), ActorDiedError(), RESULT)
    assert ask(version, image, replicas) == [RESULT]
    with pytest.raises(Unavailable, match="No model replica") as error:
        ask(version, image, Replicas(*[ActorDiedError()] * 3))
    assert error.value.status == 503


def test_the_images_of_a_request_are_sent_concurrently(version, image):
    async def meet() -> Result:
        while len(replicas.made) < 3:
            await asyncio.sleep(0)
        return RESULT

    replicas = Replicas(meet, meet, meet)
    assert ask(version, image, replicas, images=3) == [RESULT] * 3


def test_costly_images_leave_places_at_the_replicas_for_others(version, image):
    costly = CostlyImage(image.pixels, image.size, image.original_size)

    async def run() -> None:
        replicas = Replicas(*[None] * MAX_COSTLY, RESULT, RESULT)
        service = Service(version, replicas, preparer(), 2, lambda: True)
        waiting = asyncio.create_task(service.detect([costly] * (MAX_COSTLY + 2), version))
        while len(replicas.made) < MAX_COSTLY:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert len(replicas.made) == MAX_COSTLY
        assert await service.detect([image], version) == [RESULT]
        shadow = await service.detect([costly], version, in_background=True)
        assert shadow == [RESULT]  # of an image that has been answered
        waiting.cancel()

    asyncio.run(run())


def test_if_one_image_fails_the_calls_of_the_others_are_cancelled(version, image):
    replicas = Replicas(None, BackPressureError(5, 5), None)
    with pytest.raises(Unavailable):
        ask(version, image, replicas, images=3)
    assert [call.cancelled for call in replicas.made] == [True, False, True]


def test_requests_release_their_place_even_if_they_fail(version):
    service = Service(version, Replicas(), preparer(), 2, lambda: True)
    with service.request("a") as first, service.request("b"):
        assert first is version
        with pytest.raises(Unavailable) as error, service.request("c"):
            pass
        assert error.value.status == 429
    with pytest.raises(KeyError), service.request("a"):
        raise KeyError
    with service.request("a"), service.request("a"):
        pass


def test_one_client_cannot_use_all_places(version):
    service = Service(version, Replicas(), preparer(), 8, lambda: True)
    with contextlib.ExitStack() as held:
        for _ in range(6):
            held.enter_context(service.request("a"))
        with pytest.raises(Unavailable), service.request("a"):
            pass
        with pytest.raises(Unavailable), service.body("a"):
            pass
        with service.body("b"), service.request("b"):
            pass


def test_the_bytes_of_all_bodies_are_bounded_and_one_client_cannot_use_them_all(version):
    service = Service(version, Replicas(), preparer(Limits(100, max_bytes_in_flight=1000)), 8, lambda: True)
    with contextlib.ExitStack() as held:
        for _ in range(8):
            held.enter_context(service.body("a"))(90)  # bodies do not use the places of requests
        reserve = held.enter_context(service.body("a"))
        reserve(40)
        with pytest.raises(Unavailable) as error:
            reserve(60)
        assert error.value.status == 429
        held.enter_context(service.body("b"))(90)
    assert service._bytes.used == service._bodies.used == 0


def test_a_body_of_maximum_size_fits_an_idle_endpoint_regardless_of_max_bytes_in_flight(version):
    service = Service(version, Replicas(), preparer(Limits(100, max_bytes_in_flight=10)), 8, lambda: True)
    with service.body("a") as reserve:
        for _ in range(100):
            reserve(1)


def test_a_version_without_a_mask_head_rejects_segmentation(version, image):
    service = Service(version, Replicas(), preparer(), 2, lambda: True)
    with pytest.raises(RequestError, match="has no mask head") as error:
        asyncio.run(service.segment(image, version, None))
    assert error.value.status == 409
