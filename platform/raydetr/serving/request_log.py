"""Print the request log on the driver as plain JSON lines, ready for a pipe."""

import sys
from collections.abc import Callable
from typing import Any

from raydetr.ray_internals.worker_logs import global_worker_stdstream_dispatcher

_RAY_PRINTS = "ray_print_logs"
"""Name of the handler with which Ray (2.60) prints the lines of workers."""
_START = '{"time": "'
"""Start of a log line of `middleware.RequestContext`."""


def print_request_lines_plainly() -> None:
    """Print the log lines of requests unchanged; Ray still prints all other lines. The driver must be connected.

    Ray adds a colored prefix to each line of a worker, and prints lines that differ only in numbers once.
    """
    for name, ray_prints in list(global_worker_stdstream_dispatcher.handlers):
        if name == _RAY_PRINTS and ray_prints.__module__ != __name__:
            global_worker_stdstream_dispatcher.remove_handler(name)
            global_worker_stdstream_dispatcher.add_handler(name, _print_requests_plainly(ray_prints))


def _print_requests_plainly(ray_prints: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def print_batch(batch: dict[str, Any]) -> None:
        requests = [line for line in batch["lines"] if line.startswith(_START)]
        if requests:
            sys.stdout.write("".join(f"{line}\n" for line in requests))
            sys.stdout.flush()
        others = [line for line in batch["lines"] if not line.startswith(_START)]
        if others:
            ray_prints({**batch, "lines": others})

    return print_batch
