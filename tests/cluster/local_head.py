"""Start a head on loopback with the command of cluster.yaml, and submit jobs to it."""

import contextlib
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
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
PARTS = ["detr", "platform", "pipelines", "pyproject.toml", "cluster.yaml", "runtime_env.yaml"]


def copy_project(target: Path) -> Path:
    """Copy the project's code to another folder."""
    target.mkdir()
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    return target


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def start_head(project: Path, more: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Run a head with the start command of cluster.yaml in a project's folder; yield the environment to submit jobs in.

    more: further environment variables. If HOME is one of them, the token is written there too.
    """
    (command,) = [
        line
        for line in yaml.safe_load((ROOT / "cluster.yaml").read_text())["head_start_ray_commands"]
        if "ray start" in line
    ]
    port, dashboard = free_port(), free_port()
    # Replace only what is specific to the cloud machine: folder, ports, autoscaler.
    command = command.replace("~/raydetr", f"'{project}'").replace("--port=6379", f"--port={port}")
    command = command.replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")
    command += f" --node-ip-address=127.0.0.1 --dashboard-port={dashboard} --dashboard-agent-listen-port={free_port()} --num-cpus=8 --temp-dir={_short_folder()}"
    env = {
        **os.environ,
        "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "MLFLOW_TRACKING_URI": f"sqlite:///{project}/runs/mlflow.db",
        **more,
    }
    if "HOME" in more:
        token = Path(more["HOME"], ".ray/auth_token")
        token.parent.mkdir(parents=True)
        token.write_text(env["RAY_AUTH_TOKEN"])
    head = subprocess.Popen(["bash", "-c", f"{command} --block"], env=env, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(f"{address}/api/version")
        yield {**env, "RAY_API_SERVER_ADDRESS": address}
    finally:
        head.terminate()  # with --block, it stops the processes it started
        head.wait(60)


def wait_for(url: str, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except urllib.error.HTTPError:
            return  # it answers, but requires a token
        except OSError:
            assert time.monotonic() < until, f"{url} does not answer"
            time.sleep(0.5)


def _short_folder() -> str:
    """Create a folder with a short path for Ray's sockets, whose paths have a limited length."""
    return tempfile.mkdtemp(prefix="ray-", dir="/tmp")


def submit(head: dict[str, str], folder: Path, *arguments: str, succeeds: bool = True) -> str:
    """Submit a job, wait until it finishes, and return its stdout and stderr."""
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
        # The head answers requests some seconds before it can run jobs.
        if "No available agent" not in done.stderr + done.stdout or time.monotonic() > until:
            break
        time.sleep(2)
    assert (done.returncode == 0) == succeeds, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout + done.stderr
