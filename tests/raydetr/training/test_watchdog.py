"""The worker that hangs reports itself; those that wait for it do not. With a real board and a thread per rank."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray
from torch import nn, zeros

from raydetr.training.watchdog import EXIT_STATUS, HeartbeatBoard, Watchdog
from tests.run_pipeline import environment

TIMEOUT_S = 2.0


@pytest.fixture
def board(ray_local: None) -> Any:
    actor = ray.remote(HeartbeatBoard).options(num_cpus=0).remote()
    ray.get(actor.read.remote())  # wait until it runs
    return actor


@contextmanager
def ranks(
    workers: int, board: Any, timeout_s: float = TIMEOUT_S
) -> Iterator[tuple[list[Watchdog], list[threading.Event]]]:
    """Yield a watchdog per rank, and for each an event that is set instead of exiting the process."""
    exited = [threading.Event() for _ in range(workers)]
    dogs = [Watchdog(rank, timeout_s, board, workers, exited[rank].set) for rank in range(workers)]
    with dogs[0].running():
        if workers == 1:
            yield dogs, exited
            return
        with dogs[1].running():
            yield dogs, exited


def test_the_rank_that_is_behind_reports_itself_and_its_phase(
    board: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with ranks(2, board) as (dogs, exited):
        for dog in dogs:
            dog.enter("waiting for data", 7)
        dogs[0].enter("in the forward pass")
        for phase in ("in the forward pass", "in the backward pass or waiting for other ranks"):
            dogs[1].enter(phase)
        assert exited[0].wait(60)
        assert not exited[1].is_set(), "rank 1 only waits for rank 0"
        dogs[1].enter("waiting for data", 8)
    output = capfd.readouterr().err
    assert f"rank 0 (process {os.getpid()}) hangs in step 7, in the forward pass" in output
    assert "rank 1" not in output
    assert "most recent call first" in output, "its stack"


@pytest.mark.slow
def test_a_rank_in_an_earlier_step_is_behind_after_any_number_of_phases(board: Any) -> None:
    with ranks(2, board) as (dogs, exited):
        for _ in range(30):  # as when it searches for non-finite values
            dogs[0].enter("in the forward pass", 3)
        dogs[1].enter("waiting for data", 4)
        assert exited[0].wait(60)
        assert not exited[1].is_set()


@pytest.mark.slow
def test_all_ranks_report_themselves_when_all_wait_for_data(
    board: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with ranks(2, board) as (dogs, exited):
        for dog in dogs:
            dog.enter("waiting for data", 5)
        assert all(event.wait(60) for event in exited)
    assert capfd.readouterr().err.count("hangs in step 5, waiting for data") == 2


@pytest.mark.slow
def test_a_silent_rank_is_reported_by_the_rank_that_waits(
    board: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    ray.get(board.write.remote(1, (9, 2)))  # and never again: its process is stopped
    ray.get(board.write.remote(2, (3, 2)))  # from an attempt with more workers
    waiting = Watchdog(0, TIMEOUT_S, board, 2, exited := threading.Event().set)
    with waiting.running():
        waiting.enter("in the backward pass or waiting for other ranks", 9)
        until = time.monotonic() + 60
        output = ""
        while "rank 1" not in output and time.monotonic() < until:
            output += capfd.readouterr().err
            time.sleep(0.05)
    assert "no heartbeat from rank 1 for" in output
    assert "rank 2" not in output
    assert callable(exited)


def test_a_rank_that_waits_too_long_exits_too(board: Any) -> None:
    """For example if the process of the other rank is not stopped."""
    with ranks(2, board, 0.5) as (dogs, exited):
        dogs[0].enter("validating", 1, limited=False)
        dogs[1].enter("waiting for other ranks", 2)
        assert exited[1].wait(60)
        assert not exited[0].is_set()


def test_without_a_board_each_rank_reports_itself(capfd: pytest.CaptureFixture[str]) -> None:
    with ranks(1, None, 0.2) as (dogs, exited):
        dogs[0].enter("loading the checkpoint", 11)
        assert exited[0].wait(60)
    assert "rank 0" in (output := capfd.readouterr().err)
    assert "hangs in step 11, loading the checkpoint" in output


def test_a_phase_without_a_timeout_can_take_any_time() -> None:
    with ranks(1, None, 0.1) as (dogs, exited):
        dogs[0].enter("validating", 1, limited=False)
        assert not exited[0].wait(1)


def test_consecutive_phases_are_not_a_hang() -> None:
    with ranks(1, None, 1.0) as (dogs, exited):
        for step in range(40):
            dogs[0].enter("waiting for data", step)
            time.sleep(0.05)
        assert not exited[0].is_set()


def test_the_forward_pass_is_a_phase_and_the_time_after_it_another() -> None:
    dog, module = Watchdog(0, 60.0), nn.Linear(1, 1)
    dog.watch_module(module)
    seen = []
    module.register_forward_pre_hook(lambda *_: seen.append(dog._phase))
    dog.enter("waiting for other ranks", 4)
    module(zeros(1, 1))
    assert seen == ["in the forward pass"]
    assert (dog._phase, dog._position) == ("in the backward pass or waiting for other ranks", (4, 2))


def test_a_hung_process_exits_with_a_distinct_status() -> None:
    code = (
        "import time; from raydetr.training.watchdog import Watchdog\n"
        "with Watchdog(0, 0.2).running(): time.sleep(600)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment(),
    )
    assert done.returncode == EXIT_STATUS, signal.strsignal(-done.returncode)
    assert "hangs in step 0, starting" in done.stderr
    assert "time.sleep" in done.stderr or "<string>" in done.stderr
