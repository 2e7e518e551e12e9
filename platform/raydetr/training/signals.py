"""Control signals that rank 0 broadcasts with the sums of a step, so that all workers act on them in the same step."""

import time
from enum import IntFlag

import ray.train

POLL_EVERY_S = 5.0
"""Seconds between checks for a preemption notice. Each check takes all workers some milliseconds."""


class PreemptedError(Exception):
    """Raised by every worker after a checkpoint of the step, so that Ray Train restarts them on other nodes."""


class Signal(IntFlag):
    """What all workers do after the step."""

    NONE = 0
    CHECK_PREEMPTION = 1
    """Ask Ray Train whether a node is about to be preempted. It is a collective call: all workers must make it."""
    TIME_LIMIT = 2
    """Write a checkpoint and stop: `--max-hours` is over."""
    NO_PROGRESS = 4
    """Write a checkpoint and stop early: `--patience`."""


class Signals:
    """Decides on rank 0 which control signal to broadcast with the next step.

    rank: rank of this worker; only rank 0 sends signals.
    deadline: time.time() of the time limit; None: no limit.
    """

    def __init__(self, rank: int, deadline: float | None) -> None:
        self.rank, self.deadline = rank, deadline
        self.no_progress = False
        self._checked_at = time.monotonic()
        self._handled: set[tuple[str, ...]] = set()

    def for_step(self) -> Signal:
        """Return the signal that this worker adds to the sums of the next step; NONE on all ranks but 0."""
        if self.rank:
            return Signal.NONE
        signal = Signal.NO_PROGRESS if self.no_progress else Signal.NONE
        if self.deadline is not None and time.time() >= self.deadline:
            signal |= Signal.TIME_LIMIT
        if time.monotonic() - self._checked_at >= POLL_EVERY_S:
            self._checked_at = time.monotonic()
            signal |= Signal.CHECK_PREEMPTION
        return signal

    def preempted_nodes(self) -> tuple[str, ...]:
        """Return the ids of nodes that are about to be preempted; empty if they are the same as in an earlier call.

        All workers must call this in the same step.
        """
        notice = ray.train.get_preemption_info()
        if notice is None:
            return ()
        nodes = tuple(notice.preempted_node_ids)
        if nodes in self._handled:
            return ()
        self._handled.add(nodes)
        return nodes
