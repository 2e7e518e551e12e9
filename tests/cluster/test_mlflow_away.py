"""A real MLflow server is killed before an evaluation or a promotion is recorded, and restarted later."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.promote import main
from raydetr.config import EvaluateConfig, PromoteConfig
from raydetr.data.shards import Manifest
from raydetr.errors import BelowMinimumError, RegistryError
from raydetr.evaluation import evaluate as evaluation
from raydetr.promotion import promote
from raydetr.promotion import records as moves
from raydetr.promotion.ledger import Ledger, experiment_name
from raydetr.registry.models import MODEL_ID_TAG, register
from raydetr.registry.tracking import client, start_run
from tests.awkward import write_awkward
from tests.cluster.local_head import free_port
from tests.mlflow_server import kill, mlflow_server
from tests.raydetr.promotion.judged import guesses, put_on_file
from tests.raydetr.registry.versions import bare_versions
from tests.tiny_detr import save_tiny_detr

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]

OUTAGE_S = 65.0
BLUR = 0.16
RECORDED_AT = {
    "the decision's run": (promote, "open_decision"),
    "the page": (moves, "log_artifacts"),
    "the entry of the ledger": (promote, "move"),
    "the versions' tags": (Ledger, "note"),
}
"""The part of a promotion that is written next when the server dies → the function that writes it."""


class Server:
    """MLflow servers, one after another, on one port and with one store."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.kills: list[float] = []
        self._stack = contextlib.ExitStack()
        self._restart: threading.Thread | None = None
        self.start()

    def start(self) -> None:
        self._process = self._stack.enter_context(mlflow_server(self.port, self.folder))

    def kill(self) -> None:
        kill(self._process)
        self.kills.append(time.monotonic())

    def kill_for(self, seconds: float) -> None:
        """Kill the server; a thread restarts it later."""
        self.kill()
        self._restart = threading.Timer(seconds, self.start)
        self._restart.start()

    def close(self) -> None:
        if self._restart is not None:
            self._restart.join()
        self._stack.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with contextlib.closing(Server(tmp_path / "server")) as running:
        yield running


def call_before(patch: pytest.MonkeyPatch, owner: Any, name: str, action: Callable[[], None]) -> None:
    """Run an action before the first call of a function."""
    original = getattr(owner, name)

    def call(*arguments: Any, **rest: Any) -> Any:
        patch.setattr(owner, name, original)
        action()
        return original(*arguments, **rest)

    patch.setattr(owner, name, call)


def runs(uri: str, experiment: str) -> list[Any]:
    known = client(uri).get_experiment_by_name(experiment)
    return [] if known is None else list(client(uri).search_runs([known.experiment_id]))


def artifact(uri: str, run_id: str, name: str) -> bytes:
    return Path(client(uri).download_artifacts(run_id, name)).read_bytes()


@pytest.mark.usefixtures("ray_local")
def test_an_evaluation_waits_a_minute_for_the_server_and_is_recorded_completely_and_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = server.uri
    model = save_tiny_detr(tmp_path / "tiny", ["ant", "bee", "cat"], edge=64)
    register(uri, start_run(uri, "training", "run", {}, {}), str(model))
    manifest = write_awkward(tmp_path / "shards", shards=(17, 6))
    output = tmp_path / "out"
    config = EvaluateConfig(
        model="models:/raydetr/1", data=manifest.root, output=str(output), tracking_uri=uri, min_metric=0.99
    )
    call_before(monkeypatch, evaluation, "keep", lambda: server.kill_for(OUTAGE_S))
    with pytest.raises(BelowMinimumError) as error:
        evaluation.evaluate(config)
    waited = time.monotonic() - server.kills[0]
    assert OUTAGE_S < waited < 240

    summary = error.value.summary
    assert summary is not None
    (run,) = runs(uri, "evaluation")
    assert (run.info.run_id, run.info.status) == (summary["run_id"], "FINISHED")
    assert run.data.params["data.digest"] == manifest.digest
    assert "is below 0.99" in run.data.tags["below"]
    assert len(summary["figures"]) == 12
    expected = summary["figures"] | {"undecodable": 2}
    assert expected.items() <= run.data.metrics.items()
    assert {"AP/ant", "AP/bee", "AP/cat"} <= run.data.metrics.keys()
    for name in run.data.metrics:
        assert len(client(uri).get_metric_history(run.info.run_id, name)) == 1, name
    for name in ("report.html", "analysis.json"):
        assert artifact(uri, run.info.run_id, name) == (output / name).read_bytes()

    version = client(uri).get_model_version("raydetr", "1")
    record = json.loads(version.tags[f"evaluation.{manifest.digest}"])
    assert record == json.loads((output / "metrics.json").read_text())
    assert record["run_id"] == run.info.run_id
    assert version.tags[f"report.{manifest.digest[:12]}"] == summary["report"]
    assert "is below 0.99" in version.tags[f"below.{manifest.digest[:12]}"]
    (stored,) = client(uri).list_logged_model_artifacts(version.tags[MODEL_ID_TAG], "reports")
    assert stored.path == f"reports/{manifest.digest[:12]}.html"
    assert evaluation.evaluate(replace(config, min_metric=0.0)).already_scored
    print(f"server down for {OUTAGE_S:g} s: recorded after {waited:.0f} s")


def evaluated_versions(server: Server, tmp_path: Path, count: int) -> PromoteConfig:
    """Register evaluated versions, each better than the one before; the first is the champion."""
    uri = server.uri
    data: Manifest = write_awkward(tmp_path / "shards", shards=(50, 31))
    bare_versions(uri, count, evaluated=False)
    for version in range(1, count + 1):
        put_on_file(uri, version, data, guesses(data, BLUR / version), tmp_path / f"evaluation-{version}")
    client(uri).set_registered_model_alias("raydetr", "champion", "1")
    return PromoteConfig(tracking_uri=uri, model="models:/raydetr/2")


def check_promoted(uri: str, number: int, version: int) -> None:
    """Check that promotion `number` moved the alias to a version, and that its record is complete."""
    ledger = Ledger(uri, "raydetr", "champion")
    assert ledger.position() == version
    assert [entry.number for entry in ledger.entries()] == list(range(1, number + 1))
    entry = ledger.entries()[-1]
    assert (entry.previous, entry.version) == (version - 1, version)
    run = client(uri).get_run(entry.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["promoted"] == "True"
    assert b"Promoted" in artifact(uri, entry.run_id, "comparison.html")
    for each in (version - 1, version):
        tags = client(uri).get_model_version("raydetr", str(each)).tags
        decision = json.loads(tags[f"promotion.champion.{number:04d}"])
        assert (decision["promoted"], decision["old"], decision["new"]) == (True, version - 1, version)


@pytest.mark.parametrize("what", ["the decision's run", "the versions' tags"])
def test_a_promotion_waits_a_minute_for_the_server_and_is_recorded_completely_and_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    config = evaluated_versions(server, tmp_path, 2)
    call_before(monkeypatch, *RECORDED_AT[what], lambda: server.kill_for(OUTAGE_S))
    summary = main(config)
    waited = time.monotonic() - server.kills[0]
    assert OUTAGE_S < waited < 240
    assert summary["moved"]
    check_promoted(server.uri, number=1, version=2)
    (run,) = runs(server.uri, experiment_name("raydetr", "champion"))
    assert run.info.run_id == summary["run_id"]
    print(f"server down for {OUTAGE_S:g} s before {what}: recorded after {waited:.0f} s")


def test_a_promotion_that_gives_up_is_an_error_and_rerunning_the_command_finishes_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = evaluated_versions(server, tmp_path, len(RECORDED_AT) + 1)
    for number, (what, (owner, name)) in enumerate(RECORDED_AT.items(), 1):
        command = replace(config, model=f"models:/raydetr/{number + 1}")
        with monkeypatch.context() as patched:
            patched.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # otherwise it waits for four minutes
            call_before(patched, owner, name, server.kill)
            with pytest.raises(RegistryError, match=f"MLflow at {server.uri}: .*Max retries exceeded"):
                main(command)
        server.start()
        entries = Ledger(server.uri, "raydetr", "champion").entries()
        # If the entry was written, the next command finishes the promotion. Otherwise nothing has happened.
        assert len(entries) == (number if what == "the versions' tags" else number - 1)
        assert main(command)["promoted"]
        check_promoted(server.uri, number, version=number + 1)
        print(f"server lost before {what}: an error, then promoted")
