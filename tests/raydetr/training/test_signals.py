"""What rank 0 has to say with a step, and that it reaches all workers with the step's sums."""

import time
from pathlib import Path

import pytest
import torch
from ray.train.v2.api.preemption import PreemptionInfo

from raydetr.training import signals
from raydetr.training.distributed import step_totals
from raydetr.training.signals import Signal, Signals
from tests.ranks import process_group, run_ranks
from tests.raydetr.training.test_distributed import batch


def test_the_time_is_up_from_the_deadline_on() -> None:
    assert Signals(0, None).of_step() == Signal.NOTHING
    assert Signals(0, time.time() + 3600).of_step() == Signal.NOTHING
    late = Signals(0, time.time() - 1)
    assert late.of_step() == late.of_step() == Signal.TIME_IS_UP


def test_other_ranks_say_nothing_so_that_all_act_in_the_same_step() -> None:
    other = Signals(1, time.time() - 1)
    other.no_progress = True
    assert other.of_step() == Signal.NOTHING


def test_signals_of_a_step_add_up() -> None:
    both = Signals(0, time.time() - 1)
    both.no_progress = True
    assert both.of_step() == Signal.TIME_IS_UP | Signal.NO_PROGRESS


def test_it_looks_for_a_preemption_now_and_then_not_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "LOOK_EVERY_S", 0.5)
    rank_0 = Signals(0, None)
    assert rank_0.of_step() == Signal.NOTHING
    time.sleep(0.6)
    assert rank_0.of_step() == Signal.LOOK
    assert rank_0.of_step() == Signal.NOTHING


def test_a_notice_is_answered_once_and_a_wider_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train repeats a notice for as long as the workers run."""
    notices = [
        None,
        PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]}),
        PreemptionInfo(deadline_ms=1, preempted_node_to_ranks={"a": [0]}),
        PreemptionInfo(deadline_ms=1, preempted_node_to_ranks={"a": [0], "b": [1]}),
        PreemptionInfo(deadline_ms=1, preempted_node_to_ranks={"a": [0], "b": [1]}),
    ]
    monkeypatch.setattr(signals.ray.train, "get_preemption_info", lambda: notices.pop(0))
    rank = Signals(1, None)
    assert [rank.preempted_nodes() for _ in range(5)] == [(), ("a",), (), ("a", "b"), ()]


def said(rank: int, file: str, results: str) -> None:
    with process_group(file, rank, 3):
        signal = Signals(rank, time.time() - 1).of_step()
        torch.save(step_totals([batch([1])], 5, 0.1, signal).signal, f"{results}/{rank}")


def test_all_workers_hear_in_the_same_step_what_rank_0_says(tmp_path: Path) -> None:
    run_ranks(3, said, str(tmp_path / "store"), str(tmp_path))
    assert [torch.load(tmp_path / str(rank)) for rank in range(3)] == [Signal.TIME_IS_UP] * 3
