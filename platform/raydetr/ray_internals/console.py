"""Filter Ray's output on the driver's console.

Ray forwards each line that a worker prints to the driver's console. In a healthy run, some of these lines read like
errors. They are dropped here, and only here; Ray's log files in /tmp/ray/session_latest/logs still contain them.
"""

import functools
import os
import re
from typing import Any

from ray._private import worker

from raydetr.command import interrupted

_BACKEND_LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"

HARMLESS = re.compile(
    "|".join(
        (
            # Printed for every actor of Ray Data and Ray Train; raydetr recovers from lost actors by its checkpoints.
            r"has constructor arguments in the object store and max_restarts > 0",
            # `serve.shutdown` kills the controller right after requesting its shutdown.
            r"ServeController\.graceful_shutdown failed\. There are infinite retries",
            r"Progress bars (for operators )?disabled\. To enable",
            r"Dataset \S+ execution finished in",
            r"Setting up process group for: env://",
        )
    )
)
_SIGTERM = re.compile(r"\*\*\* SIGTERM received at time=")
"""Abseil's failure handler prints this and a stack trace in each worker that Ray stops normally."""
_STACK = re.compile(r"(^|logging\.cc:\d+: )\s*(PC: )?@\s+0x[0-9a-f]+|^\s+\.\.\. and at least \d+ more frames")


class HarmlessLines:
    """Drops harmless lines of the workers' output.

    The stack trace after a SIGTERM is dropped too, that of any other signal is not. So the filter has a state for each
    process.
    """

    def __init__(self) -> None:
        self._in_sigterm_stack: set[tuple[Any, Any]] = set()

    def without(self, ip: Any, pid: Any, lines: list[str]) -> list[str]:
        """Return the lines of one process without the harmless ones, in order."""
        return [line for line in lines if not self._drops((ip, pid), line)]

    def _drops(self, process: tuple[Any, Any], line: str) -> bool:
        if _SIGTERM.search(line):
            self._in_sigterm_stack.add(process)
            return True
        if process in self._in_sigterm_stack:
            if _STACK.search(line):
                return True
            self._in_sigterm_stack.discard(process)
        return bool(HARMLESS.search(line))


@functools.cache
def quiet_driver() -> None:
    """Install the filter; call it before `ray.init`. A second call does nothing."""
    harmless = HarmlessLines()
    print_lines, connect = worker.print_to_stdstream, worker.connect

    def print_filtered(data: dict[str, Any], ignore_prefix: bool) -> None:
        if interrupted.is_set():  # tracebacks of workers that Ray stops in the middle of their work
            return
        if lines := harmless.without(data.get("ip"), data.get("pid"), data["lines"]):
            print_lines({**data, "lines": lines}, ignore_prefix)

    @functools.wraps(connect)
    def connect_quietly(*args: Any, **kwargs: Any) -> Any:
        # For each actor of Ray Data, the driver's C++ code writes the first line of `HARMLESS` directly to the
        # terminal, past this filter. It reads its log level in this call; a local Ray's processes already have theirs.
        level_before = os.environ.get(_BACKEND_LOG_LEVEL)
        os.environ.setdefault(_BACKEND_LOG_LEVEL, "fatal")
        try:
            return connect(*args, **kwargs)
        finally:
            if level_before is None:
                del os.environ[_BACKEND_LOG_LEVEL]

    worker.print_to_stdstream = print_filtered
    worker.connect = connect_quietly


def is_local() -> bool:
    """Return whether this driver started the Ray instance it is connected to, which then stops with it."""
    return worker._global_node is not None and bool(worker._global_node.head)
