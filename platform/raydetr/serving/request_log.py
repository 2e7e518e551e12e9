"""The log lines of requests as the driver prints them: plain JSON, one a line, for a pipe."""

import sys
from collections.abc import Callable
from typing import Any

from raydetr.ray_internals.worker_logs import global_worker_stdstream_dispatcher

_RAY_PRINTS = "ray_print_logs"
"""Ray's name (2.60) of what prints the lines of workers."""
_START = '{"time": "'
"""Of a line of `middleware.RequestContext`."""


def print_request_lines_plainly() -> None:
    """Have this driver, which is connected, print the log lines of requests as they are; other lines are Ray's.

    Ray puts a colored prefix in front of each line of a worker, and prints lines that differ by numbers only once.
    """
    for name, ray_prints in list(global_worker_stdstream_dispatcher.handlers):
        if name == _RAY_PRINTS and ray_prints.__module__ != __name__:
            global_worker_stdstream_dispatcher.remove_handler(name)
            global_worker_stdstream_dispatcher.add_handler(name, _plainly(ray_prints))


def _plainly(ray_prints: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def print_batch(batch: dict[str, Any]) -> None:
        requests = [line for line in batch["lines"] if line.startswith(_START)]
        if requests:
            sys.stdout.write("".join(f"{line}\n" for line in requests))
            sys.stdout.flush()
        others = [line for line in batch["lines"] if not line.startswith(_START)]
        if others:
            ray_prints({**batch, "lines": others})

    return print_batch
