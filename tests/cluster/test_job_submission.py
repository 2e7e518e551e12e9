"""`ray job submit`, bare and with an uploaded copy, on a head started as cluster.yaml starts it."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
PARTS = ["detr", "platform", "pipelines", "pyproject.toml", "cluster.yaml", "runtime_env.yaml"]
TINY = ["--steps", "2", "--output", "runs/tiny", "--name", ""]

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

PROBE = """
import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
import ray.data
import raydetr, detr
from raydetr import cluster

def markers():
    import detr, raydetr
    return [getattr(detr, "MARKER", "installed"), getattr(raydetr, "MARKER", "installed")]

def in_task(row):
    return {"seen": " ".join(markers())}

def in_worker():
    print("worker", *markers(), flush=True)

if __name__ == "__main__":
    cluster.connect(4)
    print("driver", *markers(), flush=True)
    print("task", ray.data.range(1).map(in_task).take(1)[0]["seen"], flush=True)
    TorchTrainer(in_worker, scaling_config=ScalingConfig(num_workers=1)).fit()
"""


def copy_project(target: Path, marker: str) -> Path:
    """The project's code in another folder, its two packages marked."""
    target.mkdir()
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    for package in ("detr", "platform/raydetr"):
        with (target / package / "__init__.py").open("a") as file:
            file.write(f'\nMARKER = "{marker}"\n')
    (target / "pipelines" / "probe.py").write_text(PROBE)
    return target


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head on loopback from a copy of the project, by the start command of cluster.yaml; the job address."""
    project = copy_project(tmp_path_factory.mktemp("cluster") / "project", "cluster")
    (command,) = [
        line
        for line in yaml.safe_load((ROOT / "cluster.yaml").read_text())["head_start_ray_commands"]
        if "ray start" in line
    ]
    port, dashboard = free_port(), free_port()
    # Only what names the cloud machine is replaced: its folder, its ports, its autoscaler, its MLflow.
    command = command.replace("~/raydetr", f"'{project}'").replace("--port=6379", f"--port={port}")
    command = command.replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")
    command += f" --node-ip-address=127.0.0.1 --dashboard-port={dashboard} --dashboard-agent-listen-port={free_port()} --num-cpus=8 --temp-dir={_short()}"
    env = {
        **os.environ,
        "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "MLFLOW_TRACKING_URI": f"sqlite:///{project}/runs/mlflow.db",
    }
    head = subprocess.Popen(["bash", "-c", f"{command} --block"], env=env, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(f"{address}/api/version")
        yield {**env, "RAY_API_SERVER_ADDRESS": address}
    finally:
        head.terminate()  # with --block, it stops what it has started
        head.wait(60)


def wait_for(url: str, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except urllib.error.HTTPError:
            return  # it answers; it wants a token
        except OSError:
            assert time.monotonic() < until, f"{url} does not answer"
            time.sleep(0.5)


def _short() -> str:
    """A folder for Ray's sockets, whose names have a limited length."""
    return tempfile.mkdtemp(prefix="ray-", dir="/tmp")


def submit(head: dict[str, str], folder: Path, *arguments: str) -> str:
    env = {name: value for name, value in head.items() if name != "PYTHONPATH"}
    until = time.monotonic() + 120
    while True:
        done = subprocess.run(
            [RAY, "job", "submit", *arguments],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        # The head answers some seconds before it can run jobs.
        if "No available agent" not in done.stderr + done.stdout or time.monotonic() > until:
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def seen(output: str) -> dict[str, set[str]]:
    """Who saw which markers."""
    result: dict[str, set[str]] = {}
    for line in output.splitlines():
        for who in ("driver", "task", "worker"):
            if f"{who} " in line and line.split(f"{who} ", 1)[1].split()[:1] in (
                ["cluster"],
                ["upload"],
                ["installed"],
            ):
                result.setdefault(who, set()).update(line.split(f"{who} ", 1)[1].split()[:2])
    return result


def test_a_bare_submission_runs_the_clusters_copy_everywhere(head: dict[str, str], tmp_path: Path) -> None:
    output = submit(head, tmp_path, "--", "python", "pipelines/probe.py")
    assert seen(output) == {"driver": {"cluster"}, "task": {"cluster"}, "worker": {"cluster"}}


def test_an_upload_runs_whole_everywhere(head: dict[str, str], tmp_path: Path) -> None:
    project = copy_project(tmp_path / "upload", "upload")
    output = submit(head, project, "--working-dir", ".", "--", "python", "pipelines/probe.py")
    assert seen(output) == {"driver": {"upload"}, "task": {"upload"}, "worker": {"upload"}}


def test_training_runs_as_a_bare_job(head: dict[str, str], tmp_path: Path) -> None:
    output = submit(head, tmp_path, "--", "python", "pipelines/train.py", *TINY)
    assert "last_loss" in output
