import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from detr.inference.detector import ObjectDetector
from pipelines.predict import main as predict
from raydetr import config
from raydetr.config import EvaluateConfig, PredictConfig, ServeConfig
from raydetr.errors import ConfigError
from raydetr.registry.models import register
from raydetr.registry.tracking import start_run
from raydetr.serving.app import from_config
from tests.empty_registry import empty_registry
from tests.run_pipeline import environment
from tests.tiny_detr import png, save_tiny_detr

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def server(tmp_path: Path, unused_port: int) -> Iterator[subprocess.Popen[str]]:
    """Start the pipeline with the challenger of the registry in its folder; wait until it is ready."""
    uri = empty_registry(tmp_path / "runs")
    model = save_tiny_detr(tmp_path / "tiny", ["ant", "bee"], edge=64)
    register(uri, start_run(uri, "training", "run", {}, {}), str(model))
    command = [sys.executable, str(ROOT / "pipelines/serve.py"), "--port", str(unused_port)]
    command += ["--model", "models:/raydetr@challenger", "--json", "serve.json"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (tmp_path / "serve.json").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.2)
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.mark.slow
def test_the_endpoint_answers_until_sigterm(server, tmp_path, unused_port):
    url = json.loads((tmp_path / "serve.json").read_text())["endpoint"]
    assert url == f"http://127.0.0.1:{unused_port}"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "photo.png").write_bytes(png(60, 90))
    answer = httpx.post(f"{url}/v1/detect?threshold=0", content=png(60, 90), timeout=30).json()
    assert answer["model"] == {"name": "raydetr", "version": 1}
    detector = ObjectDetector.from_pretrained(tmp_path / "tiny")
    expected = detector.detect([detector.prepare(png(60, 90))])[0]
    assert [d["score"] for d in answer["detections"]] == pytest.approx(expected.scores.tolist(), abs=1e-5)

    output = tmp_path / "predicted"
    summary = predict(PredictConfig(images=str(tmp_path / "photos"), endpoint=url, output=str(output)))
    assert summary["images"] == 1
    results = json.loads((output / "results.json").read_text())
    assert [r["score"] for r in results] == pytest.approx(expected.scores.tolist(), abs=1e-5)

    server.send_signal(signal.SIGTERM)
    log, _ = server.communicate(timeout=60)
    assert server.returncode == 0, log
    assert f"curl --data-binary @photo.jpg '{url}/v1/detect?threshold=0.5'" in log
    assert "stopping" in log
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@pytest.mark.slow
def test_missing_gpus_are_an_error_and_never_fall_back_to_cpus(tmp_path, unused_port):
    model = save_tiny_detr(tmp_path / "tiny", ["ant", "bee"], edge=64)
    command = [sys.executable, str(ROOT / "pipelines/serve.py"), "--port", str(unused_port)]
    command += ["--model", str(model), "--device", "gpu", "--replicas", "2"]
    without_gpus = environment({"CUDA_VISIBLE_DEVICES": ""})
    done = subprocess.run(
        command, cwd=tmp_path, env=without_gpus, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert "--device gpu needs 2 GPUs for 2 replicas and the cluster has 0" in done.stderr


def test_a_host_that_other_machines_can_reach_requires_tokens(tmp_path):
    model = save_tiny_detr(tmp_path / "tiny", ["ant", "bee"], edge=64)
    with pytest.raises(ConfigError, match="pass a file of token hashes with --tokens"):
        from_config(ServeConfig(model=str(model), host="0.0.0.0"))


def test_an_engine_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    for kind in (ServeConfig, EvaluateConfig, PredictConfig):
        given = {"images": "photos", "output": "found"} if kind is PredictConfig else {}
        with pytest.raises(ConfigError, match=r"raydetr\[openvino\]"):
            kind(engine="openvino", **given)


def test_invalid_flags_are_refused():
    for flags, message in (
        ({"port": 0}, "--port is 0"),
        ({"replicas": 0}, "--replicas is 0"),
        ({"max_queued_images": 0}, "--max-queued-images is 0"),
        ({"batch_wait_s": -1.0}, "--batch-wait-s is -1.0"),
        ({"deadline_s": 0.0}, "--deadline-s is 0.0"),
        ({"num_gpus": 1.0}, "--num-gpus is 1.0 and --device is cpu"),
        ({"device": "gpu", "engine": "openvino"}, "--engine openvino runs on CPUs only"),
        ({"min_replicas": 0}, "--min-replicas is 0 without --max-replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "--max-replicas is 2, less than"),
    ):
        with pytest.raises(ConfigError, match=message):
            ServeConfig(**flags)
