"""An interrupted training run reports it, is not left RUNNING in MLflow, and resumes with the command it prints."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raydetr import storage
from raydetr.registry import tracking
from raydetr.training import checkpoint
from tests.awkward import write_awkward
from tests.run_pipeline import environment, script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

TINY = """
--backbone test_resnet --backbone-out-indices 1 2 3 4 --backbone-weights '' --d-model 32 --encoder-layers 1
--decoder-layers 1 --attention-heads 4 --ffn-dim 32 --num-queries 8 --test-edge 64 --shortest-edges 48 64
--longest-edge 96 --micro-batch-size 2 --checkpoint-every 5
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_marked_killed_in_mlflow_and_resumes_by_the_printed_command(
    number: signal.Signals, tmp_path: Path
) -> None:
    data, output = write_awkward(tmp_path / "my data").root, tmp_path / "my run"
    command = [
        sys.executable,
        script("train"),
        "--train-data",
        data,
        "--output",
        str(output),
        *shlex.split(TINY),
    ]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    command += ["--steps", "100000", "--tracking-uri", uri, "--name", ""]
    log = tmp_path / "log"
    with log.open("w") as out:
        driver = subprocess.Popen(
            command, env=environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until = time.monotonic() + 600
        while not checkpoint.last_committed_step(str(output)):
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        os.killpg(driver.pid, number)  # as a terminal does
        while f"{number.name}: stopping" not in log.read_text():
            assert driver.poll() is None, log.read_text()
            time.sleep(0.02)
        assert driver.wait(120) == 128 + number
    finally:
        driver.kill()
        driver.wait()
    text = log.read_text()
    assert "Traceback" not in text
    assert "Stack trace" not in text
    run_id = storage.read_json(str(output / "run.json"))["run_id"]
    assert tracking.client(uri).get_run(run_id).info.status == "KILLED"
    assert not (output / "lease.json").exists()
    printed = shlex.split(text.partition("Rerun the command to resume:\n")[2].splitlines()[0])
    assert printed == command
    step = checkpoint.last_committed_step(str(output))
    resumed = subprocess.run(
        [*printed, "--max-hours", "0.0001"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert resumed.returncode == 75, resumed.stderr
    assert checkpoint.last_committed_step(str(output)) > step
