"""A challenger on live traffic."""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from raydetr.config import ServeConfig
from raydetr.errors import ConfigError, RequestError, ServingError
from raydetr.registry.models import register, resolve
from raydetr.registry.tracking import client, start_run
from raydetr.serving.app import application, endpoint
from raydetr.serving.challenger import Challenger, ChallengerConfig
from raydetr.serving.detector import Batching
from raydetr.serving.refusals import too_many
from raydetr.serving.served_version import ServedVersion
from raydetr.serving.service import no_replica
from raydetr.serving.versions import Alias
from tests.raydetr.serving.test_app import assert_is_answer, unused_port
from tests.raydetr.serving.test_swap import MODEL_URI, SHAPES, Endpoint, metric
from tests.tiny_detr import png, save_tiny_detr

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture(scope="module")
def champion(tmp_path_factory) -> ServedVersion:
    folder = save_tiny_detr(tmp_path_factory.mktemp("model") / "tiny", ["ant"], edge=64)
    return ServedVersion.of(resolve(str(folder), ""))


def canary_answer(
    champion: ServedVersion, outcome: Any, canary: float = 1.0, task: str = "detect", **changes: Any
) -> tuple[Any, int]:
    """Return the challenger's answer and the number of fallbacks. An exception is raised, None never finishes."""
    fallbacks: list[None] = []
    other = dataclasses.replace(champion.model, model_uri="models:/raydetr/2")
    version = dataclasses.replace(champion, **{"model": other, **changes})
    config = ChallengerConfig(Alias(MODEL_URI, ""), canary)
    challenger = Challenger(config, version, None, lambda: fallbacks.append(None))  # type: ignore[arg-type]

    async def run(used: ServedVersion) -> Any:
        assert used is version
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            await asyncio.Event().wait()
        return outcome

    return asyncio.run(challenger.answer(task, champion, run, 0.2)), len(fallbacks)


def test_a_canary_answers_its_share(champion):
    assert canary_answer(champion, "answer") == ("answer", 0)
    assert canary_answer(champion, "answer", canary=0.0) == (None, 0)
    draws = [canary_answer(champion, "answer", canary=0.3)[0] for _ in range(600)]
    assert 100 < draws.count("answer") < 260


@pytest.mark.parametrize("error", [ServingError("its weights are gone"), RuntimeError("no"), no_replica()])
def test_the_champion_answers_if_the_canary_fails(champion, error, caplog):
    assert canary_answer(champion, error) == (None, 1)
    assert "the champion answers" in caplog.text


def test_the_champion_answers_if_the_canary_takes_too_long(champion):
    assert canary_answer(champion, None) == (None, 1)


def test_a_request_that_only_the_champion_supports_is_not_a_failure(champion):
    assert canary_answer(champion, RequestError(422, "classes: the model has no label 'ant'")) == (None, 0)
    assert canary_answer(champion, "answer", task="segment") == (None, 0)


def test_a_canary_under_overload_rejects_like_the_champion(champion):
    with pytest.raises(type(too_many())) as error:
        canary_answer(champion, too_many())
    assert error.value.status == 429


def test_a_challenger_that_became_champion_is_not_used(champion):
    assert canary_answer(champion, "answer", model=champion.model) == (None, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"canary": 0.1}, "give a challenger"),
        ({"challenger": "models:/raydetr@next"}, "at least one of --canary"),
        ({"challenger": "models:/raydetr@next", "canary": 1.5}, "--canary is 1.5"),
        ({"challenger": "models:/raydetr@next", "shadow": -0.1}, "--shadow is -0.1"),
    ],
)
def test_invalid_challenger_flags_are_rejected(flags, message):
    with pytest.raises(ConfigError, match=message):
        ServeConfig(**flags)


@pytest.fixture(scope="module")
def served(ray_local, tmp_path_factory) -> Iterator[Endpoint]:
    """Version 1 is the champion. The challenger answers half of the requests, and all others are compared."""
    served = Endpoint(tmp_path_factory.mktemp("served"))
    run = start_run(served.uri, "training", "again", {}, {})
    register(served.uri, run, str(served.folders[1]))
    served.detectors[4] = served.detectors[1]
    set_challenger(served, 2)
    config = ChallengerConfig(
        Alias("models:/raydetr@challenger", served.uri, poll_s=0.5), canary=0.5, shadow=1.0
    )
    model = resolve(MODEL_URI, served.uri)
    app = application(model, batching=Batching(max_size=4, wait_s=0.01), challenger=config)
    with endpoint(app, "127.0.0.1", unused_port()) as served.url:
        yield served


def set_challenger(served: Endpoint, version: int) -> None:
    client(served.uri).set_registered_model_alias("raydetr", "challenger", str(version))


def challengers(served: Endpoint) -> list[int]:
    return [
        model["version"] for model in httpx.get(f"{served.url}/v1/models", timeout=60).json()["models"][1:]
    ]


def ask(served: Endpoint, count: int) -> Counter[int]:
    """Send requests and check their answers. Returns the number of answers of each version."""
    versions: Counter[int] = Counter()
    for seed in range(count):
        data = png(*SHAPES[seed % 3], seed=seed)
        response = httpx.post(f"{served.url}/v1/detect?threshold=0", content=data, timeout=60)
        answer = response.json()
        assert response.status_code == 200, answer
        assert_is_answer(answer, served.detectors[answer["model"]["version"]], data)
        versions[answer["model"]["version"]] += 1
    return versions


@pytest.mark.nightly
def test_both_versions_answer_and_are_compared_and_a_broken_challenger_is_not_used(served):
    served.wait_for(lambda: challengers(served) == [2])
    answered = ask(served, 24)
    assert set(answered) == {1, 2}
    # Metrics are exported with a delay.
    served.wait_for(lambda: metric("raydetr_shadow_images_total", outcome="compared") == answered[1])
    assert metric("raydetr_shadow_detections_total", outcome="agreed") == 0, "their labels differ"

    set_challenger(served, 4)  # the champion's weights as another version
    served.wait_for(lambda: challengers(served) == [4])
    before = {each: outcomes(each) for each in ("relabelled", "only_champion", "only_challenger")}
    answered += ask(served, 24)
    assert set(answered) == {1, 2, 4}
    served.wait_for(lambda: metric("raydetr_shadow_images_total", outcome="compared") == answered[1])
    assert outcomes("agreed") > 3
    assert {each: outcomes(each) for each in before} == before

    assert metric("raydetr_shadow_images_total", outcome="compared", model="raydetr-4") > 0
    set_challenger(served, 3)  # answers NaN
    served.wait_for(lambda: metric("raydetr_challengers_total", outcome="refused") == 1)
    assert set(ask(served, 24)) == {1, 4}
    assert challengers(served) == [4]
    assert metric("raydetr_shadow_images_total", outcome="failed") == 0
    assert metric("raydetr_canary_fallbacks_total") == 0


def outcomes(name: str) -> float:
    return metric("raydetr_shadow_detections_total", outcome=name)
