"""The registry through a real MLflow server instead of SQLite."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from raydetr.registry.models import folder_digest, register, resolve
from raydetr.registry.promote import promote, put_evaluation
from raydetr.registry.tracking import (
    end_run,
    log_artifacts,
    log_metrics,
    metric_history,
    resolve_uri,
    start_run,
)
from tests.mlflow_server import mlflow_server
from tests.tiny_detr import save_tiny_detr


@pytest.fixture
def server(tmp_path: Path, unused_port: int) -> Iterator[str]:
    with mlflow_server(unused_port, tmp_path):
        yield f"http://127.0.0.1:{unused_port}"


def test_a_server_keeps_runs_and_versions_as_sqlite_does(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = resolve_uri(server)
    run_id = start_run(uri, "training", "run", {"steps": 2}, {"data.digest": "abc"})
    log_metrics(uri, run_id, [(0, {"loss": 2.0}), (1, {"loss": 1.0})])
    log_artifacts(uri, run_id, str(save_tiny_detr(tmp_path / "tiny", ["disc"]) / "config.json"))
    version = register(uri, run_id, str(tmp_path / "tiny"))
    end_run(uri, run_id)
    assert start_run(uri, "training", "run", {"steps": 3}, {}, run_id=run_id) == run_id
    assert metric_history(uri, run_id, "loss") == [(0, 2.0), (1, 1.0)]

    model = resolve("models:/raydetr@challenger", uri)
    assert model.version == version == 1
    assert Path(model.folder).is_relative_to(tmp_path / "cache")
    assert folder_digest(model.folder) == folder_digest(str(tmp_path / "tiny")) == model.digest

    put_evaluation(model, "d1", {"figures": {"AP": 0.5}})
    assert promote(uri, "models:/raydetr@challenger", "champion").version == 1
    downloaded = Path(model.folder, "model.safetensors").stat().st_mtime_ns
    again = resolve("models:/raydetr@champion", uri)
    assert again.folder == model.folder
    assert Path(again.folder, "model.safetensors").stat().st_mtime_ns == downloaded
