"""The registry on a real MLflow server instead of SQLite."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from detr.inference.detector import ObjectDetector
from detr.model.detection import DetrForObjectDetection
from raydetr.errors import RegistryError
from raydetr.promotion.ledger import Ledger
from raydetr.registry.evaluations import evaluations, put_evaluation
from raydetr.registry.models import folder_digest, register, resolve
from raydetr.registry.tracking import (
    end_run,
    log_artifacts,
    log_metrics,
    metric_history,
    resolve_uri,
    start_run,
)
from raydetr.results.record import EvaluationRecord
from tests.mlflow_server import mlflow_server
from tests.raydetr.promotion.unchecked_move import move_alias_unchecked
from tests.tiny_detr import png, save_tiny_detr


@pytest.fixture
def server(tmp_path: Path, unused_port: int) -> Iterator[str]:
    with mlflow_server(unused_port, tmp_path):
        yield f"http://127.0.0.1:{unused_port}"


@pytest.mark.slow
def test_a_server_stores_runs_and_versions_like_sqlite(server, tmp_path, monkeypatch):
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

    put_evaluation(model, "d1", EvaluationRecord({"AP": 0.5}))
    assert move_alias_unchecked(uri, "models:/raydetr@challenger", "champion").version == 1
    downloaded = Path(model.folder, "model.safetensors").stat().st_mtime_ns
    again = resolve("models:/raydetr@champion", uri)
    assert again.folder == model.folder
    assert Path(again.folder, "model.safetensors").stat().st_mtime_ns == downloaded


@pytest.mark.slow
@pytest.mark.parametrize("proxied", [True, False], ids=["through the server", "direct"])
def test_a_version_with_files_in_s3_loads_in_raydetr_mlflow_and_transformers(
    s3, tmp_path, unused_port, monkeypatch, proxied
):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", s3.endpoint)
    folder = save_tiny_detr(tmp_path / "tiny", ["disc", "square"], edge=64)
    with mlflow_server(unused_port, tmp_path, s3.uri("artifacts"), proxied):
        uri = resolve_uri(f"http://127.0.0.1:{unused_port}")
        run_id = start_run(uri, "training", "run", {}, {})
        register(uri, run_id, str(folder))
        assert list(filter(lambda key: key.endswith("artifacts/model/model.safetensors"), s3.keys()))
        assert not list(filter(lambda key: key.endswith((".pkl", ".pickle", ".pt", ".bin")), s3.keys()))

        model = resolve("models:/raydetr@challenger", uri)
        assert folder_digest(model.folder) == folder_digest(str(folder))
        weights = Path(model.folder, "model.safetensors")
        weights.write_bytes(bytes(len(weights.read_bytes())))
        assert resolve("models:/raydetr/1", uri) == model, "a cached copy that is damaged is downloaded again"
        (key,) = filter(lambda key: key.endswith("artifacts/model/model.safetensors"), s3.keys())
        s3.client.put_object(Bucket=s3.bucket, Key=key, Body=bytes(len(weights.read_bytes())))
        assert resolve("models:/raydetr/1", uri) == model, "the verified cached copy is used"
        original = weights.read_bytes()
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(
            RegistryError, match=r"models:/raydetr/1: the files in .* are not those of this model"
        ):
            resolve("models:/raydetr/1", uri)
        s3.client.put_object(Bucket=s3.bucket, Key=key, Body=original)
        assert resolve("models:/raydetr/1", uri) == model
        (tmp_path / "report.html").write_text("<p>metrics</p>")
        put_evaluation(model, "d1", EvaluationRecord({"AP": 0.5}, report=str(tmp_path / "report.html")))
        assert list(filter(lambda key: key.endswith("reports/d1.html"), s3.keys()))

        import mlflow

        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        answer = mlflow.pyfunc.load_model("models:/raydetr/1").predict([png(64, 96)])[0]
    detector = ObjectDetector.from_pretrained(folder)
    expected = detector.detect([detector.prepare(png(64, 96))])[0]
    assert [each["score"] for each in answer] == expected.scores.tolist()
    ours = DetrForObjectDetection.from_pretrained(model.folder).eval()
    theirs = transformers.DetrForObjectDetection.from_pretrained(model.folder).eval()
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels).logits, theirs(pixels).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_nothing_is_lost_while_the_server_is_temporarily_unavailable(tmp_path, unused_port, monkeypatch):
    """Registration, evaluation storage and promotion start while the server is down, and succeed after it returns."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = str(save_tiny_detr(tmp_path / "tiny", ["disc"], edge=64))
    uri = f"http://127.0.0.1:{unused_port}"
    with mlflow_server(unused_port, tmp_path):
        run_id = start_run(uri, "training", "run", {}, {})
        register(uri, run_id, folder)
        other = start_run(uri, "training", "another run", {}, {})
        model = resolve("models:/raydetr/1", uri)
        put_evaluation(model, "d0", EvaluationRecord({"AP": 0.25}))
    actions = [
        lambda: register(uri, other, folder, alias="second"),
        lambda: put_evaluation(model, "d1", EvaluationRecord({"AP": 0.5})),
        lambda: move_alias_unchecked(uri, "models:/raydetr/1", "champion"),
    ]
    errors: list[Exception] = []

    def run_and_collect_error(action):
        try:
            action()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run_and_collect_error, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    time.sleep(10)
    assert all(thread.is_alive() for thread in threads), errors
    with mlflow_server(unused_port, tmp_path):
        for thread in threads:
            thread.join(240)
        assert not any(thread.is_alive() for thread in threads)
        assert not errors
        assert resolve("models:/raydetr@second", uri).version == 2
        assert set(evaluations(model)) == {"d0", "d1"}
        assert resolve("models:/raydetr@champion", uri).version == 1
        assert len(Ledger(uri, "raydetr", "champion").entries()) == 1
