"""A worker that makes no progress names itself, says where it is, and ends, so that the workers start again.

All workers go through the same phases in the same order, and those that are further wait for the one that is behind. So
each counts the phases of its step on a board that all can read, and the one that is behind is the one that hangs. A
process that cannot even write to the board, since it is stopped, is named by the others and ended by Ray Train, which
is told the same time limit.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:  # the board is an actor of its own, whose process would load torch for nothing
    from torch import nn

EXIT_STATUS = 70
_ANSWER_S = 10.0

Place = tuple[int, int]
"""Step, and the number of the phase within it."""


class HeartbeatBoard:
    """How far each worker is; lives as a Ray actor with the driver."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[Place, float]] = {}

    def write(self, rank: int, place: Place) -> None:
        """Where a worker is now."""
        self._places[rank] = place, time.monotonic()

    def read(self) -> dict[int, tuple[Place, float]]:
        """Rank → where it was, and how many seconds ago that was."""
        now = time.monotonic()
        return {rank: (place, now - at) for rank, (place, at) in self._places.items()}


class Watchdog:
    """Watches one worker's loop from a thread of its own.

    rank: of the worker.
    limit_s: longest time for one phase.
    board: a `Board` actor that all workers share; None: this worker is alone.
    workers: how many there are; what the board has of higher ranks is of an earlier attempt.
    end: what to do with a worker that hangs, after it was reported.
    """

    def __init__(
        self,
        rank: int,
        limit_s: float,
        board: Any = None,
        workers: int = 1,
        end: Callable[[], None] | None = None,
    ) -> None:
        self.rank, self.limit_s = rank, limit_s
        self._board, self._workers = board, workers
        self._end = end or (lambda: os._exit(EXIT_STATUS))
        self._every = min(5.0, limit_s / 4)
        self._phase, self._place, self._since = "starting", (0, 0), time.monotonic()
        self._limited = True
        self._missed: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch while the block runs."""
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()

    def enter(self, phase: str, step: int | None = None, limited: bool = True) -> None:
        """A new phase begins.

        Args:
            phase: for the report.
            step: likewise; None: the same as before.
            limited: whether it must end within the limit.
        """
        now, number = self._place
        # The number begins again with the step: ranks that probe a step for what is not finite count differently.
        self._place = (now, number + 1) if step in (None, now) else (step, 0)
        self._phase, self._since, self._limited = phase, time.monotonic(), limited

    def follow(self, module: "nn.Module") -> None:
        """Make phases of a module's forward pass and of what comes after it."""
        module.register_forward_pre_hook(lambda *_: self.enter("in the forward pass"))
        module.register_forward_hook(lambda *_: self.enter("in the backward pass or waiting for the others"))

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            if self._board is not None:
                self._board.write.remote(self.rank, self._place)
            waited = time.monotonic() - self._since
            if self._limited and waited > self.limit_s and (self._is_behind() or waited > 4 * self.limit_s):
                self._report(waited)
                self._end()
                return

    def _is_behind(self) -> bool:
        if self._board is None:
            return True
        try:
            read = ray.get(self._board.read.remote(), timeout=_ANSWER_S)
        except ray.exceptions.RayError:
            return True  # without the board, each speaks for itself
        places = {rank: place for rank, (place, _) in read.items() if rank < self._workers}
        missed = [rank for rank in places if read[rank][1] > 3 * self._every and rank != self.rank]
        if missed and missed != self._missed:
            sys.stderr.write(
                f"watchdog: nothing was heard of rank {', '.join(map(str, missed))} for {3 * self._every:.0f} s: its "
                f"process is stopped or its node is gone. Rank {self.rank} waits for it in step {self._place[0]}, "
                f"{self._phase}. Ray Train ends it; the workers start again at the last checkpoint.\n"
            )
            sys.stderr.flush()
        self._missed = missed
        return not missed and self._place <= min(places.values(), default=self._place)

    def _report(self, waited: float) -> None:
        sys.stderr.write(
            f"watchdog: rank {self.rank} (process {os.getpid()}) hangs in step {self._place[0]}, {self._phase}, for "
            f"{waited:.0f} s, longer than --hang-timeout-s {self.limit_s:g}. It ends; the workers start again at the "
            "last checkpoint. Where it is:\n"
        )
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
