"""The shipped schedules of evaluations, run as cron and KubeRay would, with injected failures."""

import contextlib
import json
import re
import shlex
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml

from raydetr import lease
from raydetr.registry.models import register
from raydetr.registry.tracking import client, resolve_uri, start_run
from tests.awkward import write_awkward
from tests.cluster.local_head import ROOT, copy_project, free_port, start_head, submit
from tests.mlflow_server import mlflow_server
from tests.tiny_detr import save_tiny_detr

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def cron_line() -> str:
    """Return the command of the cron line in cluster.yaml, as cron passes it to a shell."""
    commands = yaml.safe_load((ROOT / "cluster.yaml").read_text())["head_start_ray_commands"]
    (installation,) = [command for command in commands if "crontab" in command]
    (line,) = re.findall(r"echo '([^']*)'", installation)
    minute, *rest = line.split(None, 5)
    assert minute.isdigit()
    assert rest[:4] == ["*"] * 4
    assert "%" not in rest[4], "cron turns % into a newline"
    return rest[4]


def kuberay_entrypoint() -> list[str]:
    manifest = yaml.safe_load((ROOT / "platform/deploy/evaluate_cron.yaml").read_text())
    return shlex.split(manifest["spec"]["jobTemplate"]["entrypoint"])


def test_a_kuberay_job_is_not_retried_and_stops_before_the_next_one_starts() -> None:
    spec = yaml.safe_load((ROOT / "platform/deploy/evaluate_cron.yaml").read_text())["spec"]
    job = spec["jobTemplate"]
    assert job["backoffLimit"] == 0
    minute, *rest = spec["schedule"].split()
    assert minute.isdigit()
    assert rest == ["*"] * 4, "every hour"
    assert lease.WAIT_S < job["activeDeadlineSeconds"] < 3600


def drivers() -> list[psutil.Process]:
    """List the driver processes of evaluations."""
    processes = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if line[1:2] == ["pipelines/evaluate.py"]:
            processes.append(process)
    return processes


def wait_for_lease(output: Path, other_than: str = "", seconds: float = 300) -> str:
    """Wait until an evaluation holds the lease of a folder, and return its owner."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, ValueError):
            owner = str(json.loads((output / "lease.json").read_text())["owner"])
            if owner != other_than:
                return owner
        assert time.monotonic() < end, "no evaluation holds the lease"
        time.sleep(0.05)


def test_the_shipped_schedules_evaluate_once_despite_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, storage, server = tmp_path / "home", tmp_path / "storage", tmp_path / "server"
    for folder in (home, server):
        folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    project = copy_project(home / "raydetr")
    manifest = write_awkward(storage / "data/val")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with mlflow_server(port, server):
        uri = resolve_uri(url)
        model = save_tiny_detr(tmp_path / "tiny", ["ant", "bee", "cat"], edge=64)
        register(uri, start_run(uri, "training", "run", {}, {}), str(model))
    output = storage / f"runs/evaluations/raydetr-1-{manifest.digest[:12]}"
    more = {"HOME": str(home), "RAYDETR_STORAGE": str(storage), "MLFLOW_TRACKING_URI": url}
    with start_head(project, more) as environment:
        # Cron sets only these variables. The dashboard has another port here.
        line = cron_line().replace("http://127.0.0.1:8265", environment["RAY_API_SERVER_ADDRESS"])
        cron = {"HOME": str(home), "PATH": environment["PATH"], "LANG": "C.UTF-8"}

        def tick() -> "subprocess.Popen[bytes]":
            return subprocess.Popen(["sh", "-c", line], env=cron, cwd="/")

        with mlflow_server(port, server):
            submit(environment, tmp_path, "--", "python", "-c", "print('jobs are accepted')")
            first = tick()
            dead = wait_for_lease(output)
            assert tick().wait(60) != 0, "no second one is submitted while one runs"
            (driver,) = drivers()
            driver.kill()
            first.wait(120)
            assert not (output / "metrics.json").exists()
        with mlflow_server(port, server):
            second = tick()
            wait_for_lease(output, other_than=dead)
        time.sleep(5)  # MLflow is down while the second one predicts
        with mlflow_server(port, server):
            entrypoint = kuberay_entrypoint()  # KubeRay does not use the lock of cron
            other = submit(environment, tmp_path, "--", *entrypoint, succeeds=False)
            second.wait(600)
            tick().wait(300)
            log = (home / "evaluate.log").read_text()
            assert "is below 0.2" in log, log[-4000:]
            assert "is already scored on this data" in log, "logged by the third"
            assert "is below 0.2" in other, other[-4000:]

            experiment = client(url).get_experiment_by_name("evaluation")
            (run,) = client(url).search_runs([experiment.experiment_id])
            assert run.info.status == "FINISHED"
            assert len(client(url).get_metric_history(run.info.run_id, "AP")) == 1
            assert "is below 0.2" in run.data.tags["below"]
            tags = client(url).get_model_version("raydetr", "1").tags
            record = json.loads(tags[f"evaluation.{manifest.digest}"])
    assert record["images"] == manifest.num_images
    assert record["run_id"] == run.info.run_id
    assert record == json.loads((output / "metrics.json").read_text())
