"""A real MLflow server is killed while a run reports to it, and restarted."""

import contextlib
import socket
from pathlib import Path

import pytest

from raydetr.training import checkpoint
from tests.awkward import write_awkward
from tests.cluster.fault_runs import losses, received, start
from tests.mlflow_server import kill, mlflow_server

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]


def test_a_server_that_is_killed_and_restarted_has_every_step_once(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    uri, output = f"http://127.0.0.1:{port}", tmp_path / "run"
    manifest = write_awkward(tmp_path / "data")
    flags = ["--steps", "40", "--checkpoint-every", "4", "--tracking-uri", uri]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(mlflow_server(port, tmp_path))
        run = stack.enter_context(start(manifest.root, output, *flags, env={"PACE_S": "0.5"}))
        run.reach(5)
        kill(server)
        killed_at = checkpoint.last_committed_step(str(output))
        run.until(
            lambda: checkpoint.last_committed_step(str(output)) >= killed_at + 8, "two more checkpoints"
        )
        stack.enter_context(mlflow_server(port, tmp_path))
        log = run.wait()
        assert "are stored in the checkpoint until it does" in log
        steps, lost = received(run.records)
        assert sorted(steps) == sorted(losses(output, uri)) == list(range(40))
        assert lost == []
        print(f"server down from step {killed_at}: steps lost {lost}")
