"""A second version on live traffic."""

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
from tests.raydetr.serving.test_swap import ADDRESS, SHAPES, Endpoint, metric
from tests.tiny_detr import png, save_tiny_detr

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture(scope="module")
def champion(tmp_path_factory) -> ServedVersion:
    folder = save_tiny_detr(tmp_path_factory.mktemp("model") / "tiny", ["ant"], edge=64)
    return ServedVersion.of(resolve(str(folder), ""))


def answered(
    champion: ServedVersion, outcome: Any, canary: float = 1.0, task: str = "detect", **changes: Any
) -> tuple[Any, int]:
    """What a challenger answers, and how often it fell back; an exception as outcome is raised, None never comes."""
    fallen: list[None] = []
    other = dataclasses.replace(champion.model, address="models:/raydetr/2")
    current = dataclasses.replace(champion, **{"model": other, **changes})
    trial = ChallengerConfig(Alias(ADDRESS, ""), canary)
    challenger = Challenger(trial, current, None, lambda: fallen.append(None))  # type: ignore[arg-type]

    async def run(used: ServedVersion) -> Any:
        assert used is current
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            await asyncio.Event().wait()
        return outcome

    return asyncio.run(challenger.answer(task, champion, run, 0.2)), len(fallen)


def test_a_canary_answers_its_share(champion):
    assert answered(champion, "answer") == ("answer", 0)
    assert answered(champion, "answer", canary=0.0) == (None, 0)
    draws = [answered(champion, "answer", canary=0.3)[0] for _ in range(600)]
    assert 100 < draws.count("answer") < 260


@pytest.mark.parametrize("error", [ServingError("its weights are gone"), RuntimeError("no"), no_replica()])
def test_what_a_canary_fails_at_is_the_champions_to_answer(champion, error, caplog):
    assert answered(champion, error) == (None, 1)
    assert "the champion answers" in caplog.text


def test_a_canary_that_takes_too_long_leaves_time_for_the_champion(champion):
    assert answered(champion, None) == (None, 1)


def test_a_request_that_only_the_champion_understands_is_no_failure(champion):
    assert answered(champion, RequestError(422, "classes: the model has no label 'ant'")) == (None, 0)
    assert answered(champion, "answer", task="segment") == (None, 0)


def test_a_canary_under_overload_refuses_as_the_champion_does(champion):
    with pytest.raises(type(too_many())) as error:
        answered(champion, too_many())
    assert error.value.status == 429


def test_a_challenger_that_became_champion_is_not_tried(champion):
    assert answered(champion, "answer", model=champion.model) == (None, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"canary": 0.1}, "give a challenger"),
        ({"challenger": "models:/raydetr@next"}, "at least one share"),
        ({"challenger": "models:/raydetr@next", "canary": 1.5}, "--canary is 1.5"),
        ({"challenger": "models:/raydetr@next", "shadow": -0.1}, "--shadow is -0.1"),
    ],
)
def test_shares_without_a_challenger_and_the_like_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        ServeConfig(**flags)


@pytest.fixture(scope="module")
def tried(ray_local, tmp_path_factory) -> Iterator[Endpoint]:
    """Version 1 answers, the challenger is followed, half of the requests are its, and all are compared."""
    tried = Endpoint(tmp_path_factory.mktemp("tried"))
    run = start_run(tried.uri, "training", "again", {}, {})
    register(tried.uri, run, str(tried.folders[1]))
    tried.detectors[4] = tried.detectors[1]
    challenge(tried, 2)
    trial = ChallengerConfig(
        Alias("models:/raydetr@challenger", tried.uri, every_s=0.5), canary=0.5, shadow=1.0
    )
    app = application(resolve(ADDRESS, tried.uri), batching=Batching(max_size=4, wait_s=0.01), trial=trial)
    with endpoint(app, "127.0.0.1", unused_port()) as tried.url:
        yield tried


def challenge(tried: Endpoint, version: int) -> None:
    client(tried.uri).set_registered_model_alias("raydetr", "challenger", str(version))


def challengers(tried: Endpoint) -> list[int]:
    return [
        model["version"] for model in httpx.get(f"{tried.url}/v1/models", timeout=60).json()["models"][1:]
    ]


def ask(tried: Endpoint, count: int) -> Counter[int]:
    """Checks answers; how many each version gave."""
    versions: Counter[int] = Counter()
    for seed in range(count):
        data = png(*SHAPES[seed % 3], seed=seed)
        response = httpx.post(f"{tried.url}/v1/detect?threshold=0", content=data, timeout=60)
        answer = response.json()
        assert response.status_code == 200, answer
        assert_is_answer(answer, tried.detectors[answer["model"]["version"]], data)
        versions[answer["model"]["version"]] += 1
    return versions


@pytest.mark.nightly
def test_both_versions_answer_and_are_compared_and_a_broken_challenger_costs_nothing(tried):
    tried.wait_for(lambda: challengers(tried) == [2])
    answered = ask(tried, 24)
    assert set(answered) == {1, 2}
    # What is counted is exported some time later.
    tried.wait_for(lambda: metric("raydetr_shadow_images_total", outcome="compared") == answered[1])
    assert metric("raydetr_shadow_detections_total", outcome="agreed") == 0, "their labels differ"

    challenge(tried, 4)  # the champion's weights under another number
    tried.wait_for(lambda: challengers(tried) == [4])
    before = {each: outcomes(each) for each in ("relabelled", "only_champion", "only_challenger")}
    answered += ask(tried, 24)
    assert set(answered) == {1, 2, 4}
    tried.wait_for(lambda: metric("raydetr_shadow_images_total", outcome="compared") == answered[1])
    assert outcomes("agreed") > 3
    assert {each: outcomes(each) for each in before} == before

    assert metric("raydetr_shadow_images_total", outcome="compared", model="raydetr-4") > 0
    challenge(tried, 3)  # answers NaN
    tried.wait_for(lambda: metric("raydetr_challengers_total", outcome="refused") == 1)
    assert set(ask(tried, 24)) == {1, 4}
    assert challengers(tried) == [4]
    assert metric("raydetr_shadow_images_total", outcome="failed") == 0
    assert metric("raydetr_canary_fallbacks_total") == 0


def outcomes(name: str) -> float:
    return metric("raydetr_shadow_detections_total", outcome=name)
