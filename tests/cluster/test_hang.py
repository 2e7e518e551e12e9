"""A worker that hangs is reported, and the run finishes."""

import os
import signal
from pathlib import Path

import pytest

from tests import training_record
from tests.awkward import write_awkward
from tests.cluster.fault_runs import Run, attempts, losses, received, start

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1200)]

STEPS = 16
FLAGS = f"--steps {STEPS} --checkpoint-every 4 --hang-timeout-s 30".split()


def finished(run: Run, fault: str) -> str:
    """Wait for the run to finish and return its log. Every step counts once; some were repeated."""
    log = run.wait()
    steps, lost = received(run.records)
    assert sorted(steps) == sorted(losses(run.output)) == list(range(STEPS))
    first, second = attempts(run.records)
    print(
        f"{fault}: steps lost {lost}, {second.started - max_time(run, first.processes):.0f} s to the next step"
    )
    assert max(lost) <= 4
    return log


def max_time(run: Run, processes: dict[int, int]) -> float:
    """Return the start time of the last forward pass of some workers."""
    return max(
        row["time"]
        for process in processes.values()
        for row in training_record.read(run.records / f"{process}.jsonl")
    )


def test_a_rank_that_hangs_in_its_forward_pass_is_reported_and_the_run_finishes(tmp_path: Path) -> None:
    manifest = write_awkward(tmp_path / "data")
    with start(manifest.root, tmp_path / "run", *FLAGS) as run:
        run.reach(5)
        (run.records / "hang-1").touch()
        log = finished(run, "a rank hangs in its forward pass")
    assert "watchdog: rank 1 (process " in log
    assert ", in the forward pass, for " in log
    assert "watchdog: rank 0 (process " not in log, "it only waited"
    assert "time.sleep(3600)" in log or "in call" in log, "the log shows where rank 1 was"


def test_a_stopped_process_is_reported_and_the_run_finishes(tmp_path: Path) -> None:
    manifest = write_awkward(tmp_path / "data")
    with start(manifest.root, tmp_path / "run", *FLAGS) as run:
        run.reach(5)
        (stopped,) = (process for process, (rank, _) in run.alive().items() if rank == 1)
        os.kill(stopped, signal.SIGSTOP)
        log = finished(run, "a process is stopped")
        assert not Path(f"/proc/{stopped}").exists(), "it was killed, and its memory freed"
    assert "watchdog: no heartbeat from rank 1 for " in log
    assert "watchdog: rank 0 (process " not in log, "it only waited"
