"""Control signals of rank 0, and how they reach all workers with the sums of a step."""

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


def test_the_time_limit_is_signaled_after_the_deadline() -> None:
    assert Signals(0, None).for_step() == Signal.NONE
    assert Signals(0, time.time() + 3600).for_step() == Signal.NONE
    late = Signals(0, time.time() - 1)
    assert late.for_step() == late.for_step() == Signal.TIME_LIMIT


def test_other_ranks_send_no_signal() -> None:
    other = Signals(1, time.time() - 1)
    other.no_progress = True
    assert other.for_step() == Signal.NONE


def test_signals_of_a_step_are_combined() -> None:
    both = Signals(0, time.time() - 1)
    both.no_progress = True
    assert both.for_step() == Signal.TIME_LIMIT | Signal.NO_PROGRESS


def test_preemption_is_checked_periodically_not_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "POLL_EVERY_S", 0.5)
    rank_0 = Signals(0, None)
    assert rank_0.for_step() == Signal.NONE
    time.sleep(0.6)
    assert rank_0.for_step() == Signal.CHECK_PREEMPTION
    assert rank_0.for_step() == Signal.NONE


def test_a_preemption_notice_is_reported_once_and_again_if_it_covers_more_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray Train returns the same notice again as long as the workers run."""
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


def receive_signal(rank: int, file: str, results: str) -> None:
    with process_group(file, rank, 3):
        signal = Signals(rank, time.time() - 1).for_step()
        torch.save(step_totals([batch([1])], 5, 0.1, signal).signal, f"{results}/{rank}")


def test_all_workers_receive_the_signal_of_rank_0_in_the_same_step(tmp_path: Path) -> None:
    run_ranks(3, receive_signal, str(tmp_path / "store"), str(tmp_path))
    assert [torch.load(tmp_path / str(rank)) for rank in range(3)] == [Signal.TIME_LIMIT] * 3
