"""Detect a worker that hangs: it reports itself with its stack and exits, so that the workers restart.

All workers go through the same phases in the same order, and those ahead wait for the one behind. Each worker writes
its position (step and phase number) to a shared heartbeat board. The worker with the lowest position is the one that
hangs. A process that is stopped and cannot write to the board is reported by the others and killed by Ray Train, which
has the same timeout.
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

if TYPE_CHECKING:  # the board is a Ray actor, whose process would load torch needlessly
    from torch import nn

EXIT_STATUS = 70
_ANSWER_S = 10.0

Position = tuple[int, int]
"""Step, and the number of the phase within the step."""


class HeartbeatBoard:
    """The position of each worker. Runs as a Ray actor on the driver's node."""

    def __init__(self) -> None:
        self._positions: dict[int, tuple[Position, float]] = {}

    def write(self, rank: int, position: Position) -> None:
        """Store the current position of a worker."""
        self._positions[rank] = position, time.monotonic()

    def read(self) -> dict[int, tuple[Position, float]]:
        """Return for each rank its last position, and its age in seconds."""
        now = time.monotonic()
        return {rank: (position, now - at) for rank, (position, at) in self._positions.items()}


class Watchdog:
    """Watches the loop of one worker from a separate thread.

    rank: rank of the worker.
    timeout_s: maximum time for one phase.
    board: `HeartbeatBoard` actor that all workers share; None: a single worker.
    workers: number of workers; positions of higher ranks are from an earlier attempt.
    on_hang: called after a hang was reported; exits the process by default.
    """

    def __init__(
        self,
        rank: int,
        timeout_s: float,
        board: Any = None,
        workers: int = 1,
        on_hang: Callable[[], None] | None = None,
    ) -> None:
        self.rank, self.timeout_s = rank, timeout_s
        self._board, self._workers = board, workers
        self._on_hang = on_hang or (lambda: os._exit(EXIT_STATUS))
        self._every = min(5.0, timeout_s / 4)
        self._phase, self._position, self._since = "starting", (0, 0), time.monotonic()
        self._has_limit = True
        self._silent: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch the worker while the block runs."""
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()

    def enter(self, phase: str, step: int | None = None, limited: bool = True) -> None:
        """Enter a new phase.

        Args:
            phase: name of the phase, for the report.
            step: step of the phase; None: the current step.
            limited: whether the timeout applies to the phase.
        """
        current, number = self._position
        # Phase numbers restart with each step: ranks that search a step for non-finite values count more phases.
        self._position = (current, number + 1) if step in (None, current) else (step, 0)
        self._phase, self._since, self._has_limit = phase, time.monotonic(), limited

    def watch_module(self, module: "nn.Module") -> None:
        """Enter a phase at the start of a module's forward pass, and another at its end."""
        module.register_forward_pre_hook(lambda *_: self.enter("in the forward pass"))
        module.register_forward_hook(lambda *_: self.enter("in the backward pass or waiting for other ranks"))

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            if self._board is not None:
                self._board.write.remote(self.rank, self._position)
            waited = time.monotonic() - self._since
            if (
                self._has_limit
                and waited > self.timeout_s
                and (self._is_behind() or waited > 4 * self.timeout_s)
            ):
                self._report(waited)
                self._on_hang()
                return

    def _is_behind(self) -> bool:
        if self._board is None:
            return True
        try:
            read = ray.get(self._board.read.remote(), timeout=_ANSWER_S)
        except ray.exceptions.RayError:
            return True  # without the board, each worker reports itself
        positions = {rank: position for rank, (position, _) in read.items() if rank < self._workers}
        silent = [rank for rank in positions if read[rank][1] > 3 * self._every and rank != self.rank]
        if silent and silent != self._silent:
            sys.stderr.write(
                f"watchdog: no heartbeat from rank {', '.join(map(str, silent))} for {3 * self._every:.0f} s: its "
                f"process is stopped or its node is gone. Rank {self.rank} waits for it in step {self._position[0]}, "
                f"{self._phase}. Ray Train will kill it and restart the workers from the last checkpoint.\n"
            )
            sys.stderr.flush()
        self._silent = silent
        return not silent and self._position <= min(positions.values(), default=self._position)

    def _report(self, waited: float) -> None:
        sys.stderr.write(
            f"watchdog: rank {self.rank} (process {os.getpid()}) hangs in step {self._position[0]}, {self._phase}, for "
            f"{waited:.0f} s, longer than --hang-timeout-s {self.timeout_s:g}. It exits, and the workers restart from "
            "the last checkpoint. Its stack:\n"
        )
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
