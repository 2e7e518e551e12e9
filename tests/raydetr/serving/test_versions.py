"""Following an alias, on a real registry and without Serve."""

from pathlib import Path

import pytest

from raydetr.registry.models import register, resolve
from raydetr.registry.tracking import client, start_run
from raydetr.serving.versions import Alias, Follower
from tests.empty_registry import empty_registry
from tests.tiny_detr import save_tiny_detr

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
ADDRESS = "models:/raydetr@champion"


class Registry:
    """Three versions, `champion` the first."""

    def __init__(self, folder: Path) -> None:
        self.uri = empty_registry(folder / "runs")
        run = start_run(self.uri, "training", "run", {}, {})
        for seed in range(3):
            model = save_tiny_detr(folder / f"tiny-{seed}", ["ant", "bee"], seed=seed, edge=64)
            register(self.uri, run, str(model))
        self.point_at(1)

    def point_at(self, version: int) -> None:
        client(self.uri).set_registered_model_alias("raydetr", "champion", str(version))


class Taker:
    """Serves what it is given, or refuses it."""

    def __init__(self) -> None:
        self.taken: list[int | None] = []
        self.reason: str | None = None

    def __call__(self, model) -> str | None:
        self.taken.append(model.version)
        return self.reason


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Registry:
    return Registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture
def taker() -> Taker:
    return Taker()


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def follower(registry, taker, now) -> Follower:
    registry.point_at(1)
    served = resolve(ADDRESS, registry.uri).address
    return Follower(Alias(ADDRESS, registry.uri), served, taker, clock=lambda: now[0])


def test_a_version_is_taken_once_when_the_alias_moves_and_when_it_moves_back(registry, follower, taker):
    follower.look()
    assert taker.taken == []
    registry.point_at(2)
    follower.look()
    follower.look()
    assert taker.taken == [2]
    registry.point_at(1)
    follower.look()
    assert taker.taken == [2, 1]
    assert follower.served == "models:/raydetr/1"


def test_a_refused_version_is_logged_and_tried_again_after_longer_and_longer(
    registry, follower, taker, now, caplog
):
    registry.point_at(2)
    taker.reason = "its outputs are not finite"
    for now[0] in (0.0, 10.0, 29.0, 31.0, 80.0, 92.0):
        follower.look()
    assert taker.taken == [2, 2, 2], "at 0 s, after 30 s and 60 s more"
    assert follower.served == "models:/raydetr/1"
    assert "models:/raydetr/2 does not answer" in caplog.text
    assert "its outputs are not finite" in caplog.text


def test_another_version_after_a_refused_one_is_taken_at_once(registry, follower, taker):
    registry.point_at(2)
    taker.reason = "no"
    follower.look()
    registry.point_at(3)
    taker.reason = None
    follower.look()
    assert taker.taken == [2, 3]
    assert follower.served == "models:/raydetr/3"


def test_what_is_served_by_nobody_yet_is_looked_for_until_it_is_there_and_logged_once(
    registry, taker, caplog
):
    follower = Follower(Alias("models:/raydetr@next", registry.uri), "", taker)
    follower.look()
    follower.look()
    assert caplog.text.count("has no alias 'next'") == 1
    client(registry.uri).set_registered_model_alias("raydetr", "next", "2")
    follower.look()
    client(registry.uri).delete_registered_model_alias("raydetr", "next")
    assert (taker.taken, follower.served) == ([2], "models:/raydetr/2")


def test_a_folder_is_taken_once(taker, tmp_path):
    folder = str(save_tiny_detr(tmp_path / "tiny", ["ant"], edge=64))
    follower = Follower(Alias(folder, "", every_s=0), "", taker)
    follower.look()
    follower.look()
    assert (taker.taken, follower.served) == ([None], folder)


def test_a_registry_that_is_away_leaves_the_version_in_place(registry, taker, tmp_path, caplog):
    model = resolve(ADDRESS, registry.uri)
    follower = Follower(Alias("models:/gone@champion", registry.uri), model.address, taker)
    follower.look()
    assert taker.taken == []
    assert follower.served == model.address
    assert "no registered model 'gone'" in caplog.text


def test_a_process_that_starts_later_begins_with_the_version_that_the_alias_has_by_then(registry, taker):
    registry.point_at(2)
    follower = Follower(Alias(ADDRESS, registry.uri, every_s=0), "models:/raydetr/1", taker)
    follower.start(within_s=60)
    assert taker.taken == [2]
    assert follower.served == "models:/raydetr/2"
