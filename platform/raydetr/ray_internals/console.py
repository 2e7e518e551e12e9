"""A readable console: what of Ray's output a driver prints.

Ray forwards each line that a worker writes to the driver's console. A healthy run has lines there that read like errors:
they are dropped here, and only here. Ray's log files in /tmp/ray/session_latest/logs keep all of them.
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
            # Of every actor that Ray Data and Ray Train start; those that matter are restarted by raydetr's checkpoints.
            r"has constructor arguments in the object store and max_restarts > 0",
            # `serve.shutdown` kills the controller that it has just asked to shut down.
            r"ServeController\.graceful_shutdown failed\. There are infinite retries",
            r"Progress bars (for operators )?disabled\. To enable",
            r"Dataset \S+ execution finished in",
            r"Setting up process group for: env://",
        )
    )
)
_SIGTERM = re.compile(r"\*\*\* SIGTERM received at time=")
"""Abseil's failure handler, in each worker that Ray ends in the usual way; a stack follows."""
_STACK = re.compile(r"(^|logging\.cc:\d+: )\s*(PC: )?@\s+0x[0-9a-f]+|^\s+\.\.\. and at least \d+ more frames")


class HarmlessLines:
    """Which lines of the workers not to print.

    The stack after a SIGTERM is dropped with it; that of any other signal is not, hence a state for each process.
    """

    def __init__(self) -> None:
        self._in_sigterm_stack: set[tuple[Any, Any]] = set()

    def without(self, ip: Any, pid: Any, lines: list[str]) -> list[str]:
        """The lines of one process that are worth printing, in order."""
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
    """Filter what `ray.init` will print in this process; call it before. A second call does nothing."""
    harmless = HarmlessLines()
    print_lines, connect = worker.print_to_stdstream, worker.connect

    def print_telling_lines(data: dict[str, Any], ignore_prefix: bool) -> None:
        if interrupted.is_set():  # tracebacks and stacks of workers that Ray ends in the midst of their work
            return
        if lines := harmless.without(data.get("ip"), data.get("pid"), data["lines"]):
            print_lines({**data, "lines": lines}, ignore_prefix)

    @functools.wraps(connect)
    def connect_quietly(*args: Any, **kwargs: Any) -> Any:
        # The driver's own C++ code writes to the terminal, past any filter, for each actor of Ray Data the first line of
        # `HARMLESS`. It reads the level in this call, after the processes of a local Ray have started with theirs.
        given = os.environ.get(_BACKEND_LOG_LEVEL)
        os.environ.setdefault(_BACKEND_LOG_LEVEL, "fatal")
        try:
            return connect(*args, **kwargs)
        finally:
            if given is None:
                del os.environ[_BACKEND_LOG_LEVEL]

    worker.print_to_stdstream = print_telling_lines
    worker.connect = connect_quietly


def is_local() -> bool:
    """Whether this driver started the Ray that it is connected to, which ends with it."""
    return worker._global_node is not None and bool(worker._global_node.head)
