"""Following an alias of a real registry, without Serve."""

from pathlib import Path

import pytest

from raydetr.registry.models import register, resolve
from raydetr.registry.tracking import client, start_run
from raydetr.serving.versions import Alias, Follower
from tests.empty_registry import empty_registry
from tests.tiny_detr import save_tiny_detr

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
MODEL_URI = "models:/raydetr@champion"


class Registry:
    """A registry with three versions; `champion` is the first one."""

    def __init__(self, folder: Path) -> None:
        self.uri = empty_registry(folder / "runs")
        run = start_run(self.uri, "training", "run", {}, {})
        for seed in range(3):
            model = save_tiny_detr(folder / f"tiny-{seed}", ["ant", "bee"], seed=seed, edge=64)
            register(self.uri, run, str(model))
        self.point_at(1)

    def point_at(self, version: int) -> None:
        client(self.uri).set_registered_model_alias("raydetr", "champion", str(version))


class FakeServer:
    """Records the versions to serve, and refuses them if `reason` is set."""

    def __init__(self) -> None:
        self.versions: list[int | None] = []
        self.reason: str | None = None

    def __call__(self, model) -> str | None:
        self.versions.append(model.version)
        return self.reason


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Registry:
    return Registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def follower(registry, server, now) -> Follower:
    registry.point_at(1)
    served = resolve(MODEL_URI, registry.uri).model_uri
    return Follower(Alias(MODEL_URI, registry.uri), served, server, clock=lambda: now[0])


def test_a_version_is_served_once_when_the_alias_moves_and_when_it_moves_back(registry, follower, server):
    follower.poll()
    assert server.versions == []
    registry.point_at(2)
    follower.poll()
    follower.poll()
    assert server.versions == [2]
    registry.point_at(1)
    follower.poll()
    assert server.versions == [2, 1]
    assert follower.served == "models:/raydetr/1"


def test_a_refused_version_is_logged_and_retried_with_backoff(registry, follower, server, now, caplog):
    registry.point_at(2)
    server.reason = "its outputs are not finite"
    for now[0] in (0.0, 10.0, 29.0, 31.0, 80.0, 92.0):
        follower.poll()
    assert server.versions == [2, 2, 2], "at 0 s, after 30 s and 60 s more"
    assert follower.served == "models:/raydetr/1"
    assert "models:/raydetr/2 of models:/raydetr@champion cannot be served" in caplog.text
    assert "its outputs are not finite" in caplog.text


def test_another_version_after_a_refused_one_is_served_immediately(registry, follower, server):
    registry.point_at(2)
    server.reason = "no"
    follower.poll()
    registry.point_at(3)
    server.reason = None
    follower.poll()
    assert server.versions == [2, 3]
    assert follower.served == "models:/raydetr/3"


def test_a_missing_alias_is_polled_until_it_exists_and_logged_once(registry, server, caplog):
    follower = Follower(Alias("models:/raydetr@next", registry.uri), "", server)
    follower.poll()
    follower.poll()
    assert caplog.text.count("has no alias 'next'") == 1
    client(registry.uri).set_registered_model_alias("raydetr", "next", "2")
    follower.poll()
    client(registry.uri).delete_registered_model_alias("raydetr", "next")
    assert (server.versions, follower.served) == ([2], "models:/raydetr/2")


def test_a_folder_is_served_once(server, tmp_path):
    folder = str(save_tiny_detr(tmp_path / "tiny", ["ant"], edge=64))
    follower = Follower(Alias(folder, "", poll_s=0), "", server)
    follower.poll()
    follower.poll()
    assert (server.versions, follower.served) == ([None], folder)


def test_an_alias_that_cannot_be_resolved_leaves_the_version_in_place(registry, server, tmp_path, caplog):
    model = resolve(MODEL_URI, registry.uri)
    follower = Follower(Alias("models:/gone@champion", registry.uri), model.model_uri, server)
    follower.poll()
    assert server.versions == []
    assert follower.served == model.model_uri
    assert "no registered model 'gone'" in caplog.text


def test_a_process_that_starts_later_serves_the_current_version_of_the_alias(registry, server):
    registry.point_at(2)
    follower = Follower(Alias(MODEL_URI, registry.uri, poll_s=0), "models:/raydetr/1", server)
    follower.start(wait_s=60)
    assert server.versions == [2]
    assert follower.served == "models:/raydetr/2"
