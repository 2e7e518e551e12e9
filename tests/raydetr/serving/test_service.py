"""What Serve's refusals become, with calls of a handle that fail as Serve's do."""

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from detr.detector import ObjectDetector, PreparedImage
from raydetr.errors import RequestError
from raydetr.registry.models import resolve
from raydetr.serving.detector import Result
from raydetr.serving.images import Limits
from raydetr.serving.loaded import OUT_OF_MEMORY
from raydetr.serving.refusals import Unavailable
from raydetr.serving.service import Current, Service
from tests.tiny_detr import png, save_tiny_detr

FINE = Result("found", 1.0)


class Call:
    """As `DeploymentResponse`: awaited, or cancelled."""

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
    """As the handle of model replicas: each call has the next outcome; None never comes."""

    def __init__(self, *outcomes: Any) -> None:
        self.calls = [Call(outcome) for outcome in outcomes]
        self.made: list[Call] = []
        self.detect = self

    def remote(self, *_: object) -> Call:
        self.made.append(self.calls[len(self.made)])
        return self.made[-1]


@pytest.fixture(scope="module")
def current(tmp_path_factory) -> Current:
    folder = save_tiny_detr(tmp_path_factory.mktemp("model") / "tiny", ["ant"], edge=64)
    return Current.of(resolve(str(folder), ""), Limits())


@pytest.fixture(scope="module")
def image(current) -> PreparedImage:
    return ObjectDetector.from_pretrained(current.model.folder).prepare(png(60, 90))


def ask(current: Current, image: PreparedImage, replicas: Replicas, images: int = 1) -> list[Result]:
    service = Service(current, replicas, Limits(), 2, lambda: True)
    return asyncio.run(service.detect([image] * images, current))


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (BackPressureError(5, 5), 429),
        (DeploymentUnavailableError(DeploymentID("Detector", "raydetr")), 503),
        (Result(OUT_OF_MEMORY, 1.0), 503),
    ],
)
def test_refusals_become_answers_that_say_when_to_try_again(current, image, outcome, status):
    with pytest.raises(Unavailable) as error:
        ask(current, image, Replicas(outcome))
    assert (error.value.status, error.value.retry_after_s) == (status, 1.0)


def test_an_image_of_a_dead_replica_goes_to_another_one_but_not_for_ever(current, image):
    replicas = Replicas(ActorDiedError(), ActorDiedError(), FINE)
    assert ask(current, image, replicas) == [FINE]
    with pytest.raises(Unavailable, match="No model replica") as error:
        ask(current, image, Replicas(*[ActorDiedError()] * 3))
    assert error.value.status == 503


def test_the_images_of_a_request_go_to_the_model_at_once(current, image):
    async def meet() -> Result:
        while len(replicas.made) < 3:
            await asyncio.sleep(0)
        return FINE

    replicas = Replicas(meet, meet, meet)
    assert ask(current, image, replicas, images=3) == [FINE] * 3


def test_where_one_image_fails_the_calls_of_the_others_are_cancelled(current, image):
    replicas = Replicas(None, BackPressureError(5, 5), None)
    with pytest.raises(Unavailable):
        ask(current, image, replicas, images=3)
    assert [call.cancelled for call in replicas.made] == [True, False, True]


def test_requests_are_counted_and_the_count_goes_down_however_they_end(current):
    service = Service(current, Replicas(), Limits(), 2, lambda: True)
    with service.request() as first, service.request():
        assert first is current
        with pytest.raises(Unavailable) as error, service.request():
            pass
        assert error.value.status == 429
    with pytest.raises(KeyError), service.request():
        raise KeyError
    with service.request(), service.request():
        pass


def test_a_version_without_a_mask_head_is_not_asked_for_segments(current, image):
    service = Service(current, Replicas(), Limits(), 2, lambda: True)
    with pytest.raises(RequestError, match="has no mask head") as error:
        asyncio.run(service.segment(image, current, None))
    assert error.value.status == 409
