"""The worker that hangs names itself; those that wait for it do not. On a real board, each rank a thread."""

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

LIMIT_S = 2.0


@pytest.fixture
def board(ray_local: None) -> Any:
    actor = ray.remote(HeartbeatBoard).options(num_cpus=0).remote()
    ray.get(actor.read.remote())  # it runs
    return actor


@contextmanager
def ranks(
    workers: int, board: Any, limit_s: float = LIMIT_S
) -> Iterator[tuple[list[Watchdog], list[threading.Event]]]:
    """Watchdogs of as many ranks, and for each the event that it would have ended its process."""
    ended = [threading.Event() for _ in range(workers)]
    dogs = [Watchdog(rank, limit_s, board, workers, ended[rank].set) for rank in range(workers)]
    with dogs[0].running():
        if workers == 1:
            yield dogs, ended
            return
        with dogs[1].running():
            yield dogs, ended


def test_the_rank_that_is_behind_names_itself_and_its_phase(
    board: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with ranks(2, board) as (dogs, ended):
        for dog in dogs:
            dog.enter("waiting for data", 7)
        dogs[0].enter("in the forward pass")
        for phase in ("in the forward pass", "in the backward pass or waiting for the others"):
            dogs[1].enter(phase)
        assert ended[0].wait(60)
        assert not ended[1].is_set(), "rank 1 only waits for rank 0"
        dogs[1].enter("waiting for data", 8)
    told = capfd.readouterr().err
    assert f"rank 0 (process {os.getpid()}) hangs in step 7, in the forward pass" in told
    assert "rank 1" not in told
    assert "most recent call first" in told, "where it is"


@pytest.mark.slow
def test_a_rank_in_an_earlier_step_is_behind_however_many_phases_it_went_through(board: Any) -> None:
    with ranks(2, board) as (dogs, ended):
        for _ in range(30):  # as when it looks for what is not finite
            dogs[0].enter("in the forward pass", 3)
        dogs[1].enter("waiting for data", 4)
        assert ended[0].wait(60)
        assert not ended[1].is_set()


@pytest.mark.slow
def test_all_name_themselves_when_all_wait_for_data(board: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with ranks(2, board) as (dogs, ended):
        for dog in dogs:
            dog.enter("waiting for data", 5)
        assert all(event.wait(60) for event in ended)
    assert capfd.readouterr().err.count("hangs in step 5, waiting for data") == 2


@pytest.mark.slow
def test_a_rank_that_is_not_heard_of_is_named_by_the_one_that_waits(
    board: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    ray.get(board.write.remote(1, (9, 2)))  # and no more: its process is stopped
    ray.get(board.write.remote(2, (3, 2)))  # of an attempt with more workers
    silent = Watchdog(0, LIMIT_S, board, 2, ended := threading.Event().set)
    with silent.running():
        silent.enter("in the backward pass or waiting for the others", 9)
        until = time.monotonic() + 60
        told = ""
        while "rank 1" not in told and time.monotonic() < until:
            told += capfd.readouterr().err
            time.sleep(0.05)
    assert "nothing was heard of rank 1 for" in told
    assert "rank 2" not in told
    assert callable(ended)


def test_a_rank_that_waits_too_long_ends_too(board: Any) -> None:
    """Such as for one whose process nobody ends."""
    with ranks(2, board, 0.5) as (dogs, ended):
        dogs[0].enter("validating", 1, limited=False)
        dogs[1].enter("waiting for the others", 2)
        assert ended[1].wait(60)
        assert not ended[0].is_set()


def test_without_a_board_each_speaks_for_itself(capfd: pytest.CaptureFixture[str]) -> None:
    with ranks(1, None, 0.2) as (dogs, ended):
        dogs[0].enter("loading the checkpoint", 11)
        assert ended[0].wait(60)
    assert "rank 0" in (told := capfd.readouterr().err)
    assert "hangs in step 11, loading the checkpoint" in told


def test_a_phase_without_a_limit_may_take_as_long_as_it_likes() -> None:
    with ranks(1, None, 0.1) as (dogs, ended):
        dogs[0].enter("validating", 1, limited=False)
        assert not ended[0].wait(1)


def test_phases_that_follow_each_other_are_no_hang() -> None:
    with ranks(1, None, 1.0) as (dogs, ended):
        for step in range(40):
            dogs[0].enter("waiting for data", step)
            time.sleep(0.05)
        assert not ended[0].is_set()


def test_a_modules_forward_pass_is_a_phase_and_what_comes_after_another() -> None:
    dog, module = Watchdog(0, 60.0), nn.Linear(1, 1)
    dog.follow(module)
    seen = []
    module.register_forward_pre_hook(lambda *_: seen.append(dog._phase))
    dog.enter("waiting for the others", 4)
    module(zeros(1, 1))
    assert seen == ["in the forward pass"]
    assert (dog._phase, dog._place) == ("in the backward pass or waiting for the others", (4, 2))


def test_the_process_of_a_rank_that_hangs_ends_with_a_status_of_its_own() -> None:
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
