"""What rank 0 tells the other workers: it travels with the sums of a step, so that all act on it in the same step."""

import time
from enum import IntFlag

import ray.train

LOOK_EVERY_S = 5.0
"""Seconds between looks for a preemption notice, each of which costs all workers some milliseconds."""


class PreemptedError(Exception):
    """Raised by every worker once the step is committed: Ray Train starts them again, on other nodes."""


class Signal(IntFlag):
    """What to do after the step."""

    NOTHING = 0
    LOOK = 1
    """Ask Ray Train whether a node is about to be preempted: all workers have to ask together."""
    TIME_IS_UP = 2
    """Commit and end: `--max-hours`."""
    NO_PROGRESS = 4
    """Commit and end: `--patience`."""


class Signals:
    """The clock of rank 0.

    rank: of this worker; only rank 0 has something to say.
    deadline: time.time() at which the run's time is up; None: never.
    """

    def __init__(self, rank: int, deadline: float | None) -> None:
        self.rank, self.deadline = rank, deadline
        self.no_progress = False
        self._looked = time.monotonic()
        self._answered: set[tuple[str, ...]] = set()

    def of_step(self) -> Signal:
        """What this worker says with the step that begins."""
        if self.rank:
            return Signal.NOTHING
        signal = Signal.NO_PROGRESS if self.no_progress else Signal.NOTHING
        if self.deadline is not None and time.time() >= self.deadline:
            signal |= Signal.TIME_IS_UP
        if time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._looked = time.monotonic()
            signal |= Signal.LOOK
        return signal

    def preempted_nodes(self) -> tuple[str, ...]:
        """Ids of nodes that are about to be preempted, once each time there are others; called by all workers alike."""
        notice = ray.train.get_preemption_info()
        if notice is None:
            return ()
        nodes = tuple(notice.preempted_node_ids)
        if nodes in self._answered:
            return ()
        self._answered.add(nodes)
        return nodes
