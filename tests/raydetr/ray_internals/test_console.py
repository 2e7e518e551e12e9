"""Lines of a healthy run that read like errors are not printed; all others are."""

import inspect
import os
import threading
from typing import Any

import pytest
from ray._private import worker

from raydetr.ray_internals.console import HarmlessLines, is_local, quiet_driver

STACK = [
    "PC: @     0x7f0c1a2b3c4d  (unknown)  epoll_wait",
    "    @     0x7f0c1a1f0000  (unknown)  (unknown)",
    "[2026-01-01 00:00:00,000 E 7 7] logging.cc:474:     @     0x7f0c1a1f0000  (unknown)  (unknown)",
]
HARMLESS = [
    "[2026-01-01 00:00:00,000 E 7 8] core_worker.cc:2465: Actor with class name: 'PreemptionWatcher' and ID: '2d' has "
    "constructor arguments in the object store and max_restarts > 0. If the arguments in the object store go out of scope "
    "or are lost, the actor restart will fail.",
    "Task ServeController.graceful_shutdown failed. There are infinite retries remaining, so the task will be retried.",
    "Progress bars disabled. To enable, set `ray.data.DataContext.get_current().enable_progress_bars = True`.",
    "✔️  Dataset dataset_0356H5vKnYy646ermizanh_0 execution finished in 11.57 seconds",
    "Setting up process group for: env:// [rank=0, world_size=2]",
]
TELLING = [
    "step 11/40  loss 25.391  15.6 images/s",
    "Traceback (most recent call last):",
    "    @property",
    "ValueError: bad",
    "Task train failed. There are 2 retries remaining, so the task will be retried.",
    "*** SIGSEGV received at time=1 on cpu 0 ***",
    *STACK,
]


def test_harmless_lines_are_dropped_and_all_others_kept_in_order() -> None:
    mixed = [line for pair in zip(HARMLESS, TELLING[: len(HARMLESS)], strict=True) for line in pair]
    assert HarmlessLines().without("1.2.3.4", 7, mixed) == TELLING[: len(HARMLESS)]
    assert HarmlessLines().without("1.2.3.4", 7, TELLING) == TELLING


def test_the_stack_of_a_sigterm_is_dropped_with_it_and_that_of_another_process_is_kept() -> None:
    harmless = HarmlessLines()
    assert harmless.without("a", 1, ["*** SIGTERM received at time=1 on cpu 0 ***", STACK[0]]) == []
    assert harmless.without("a", 2, STACK) == STACK
    assert harmless.without("a", 1, [*STACK[1:], "next", *STACK]) == ["next", *STACK]


def test_ray_prints_what_is_left_and_logs_of_a_local_ray_keep_their_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed: list[dict[str, Any]] = []
    levels: list[str | None] = []
    monkeypatch.setattr(worker, "print_to_stdstream", lambda data, ignore_prefix: printed.append(data))
    monkeypatch.setattr(worker, "connect", lambda: levels.append(os.environ.get("RAY_BACKEND_LOG_LEVEL")))
    monkeypatch.delenv("RAY_BACKEND_LOG_LEVEL", raising=False)
    quiet_driver.__wrapped__()
    data = {"ip": "a", "pid": 1, "is_err": True, "job": "01"}
    worker.print_to_stdstream({**data, "lines": [HARMLESS[0], TELLING[0]]}, ignore_prefix=False)
    worker.print_to_stdstream({**data, "lines": HARMLESS}, ignore_prefix=False)
    assert printed == [{**data, "lines": TELLING[:1]}]
    monkeypatch.setattr("raydetr.ray_internals.console.interrupted", stopped := threading.Event())
    stopped.set()
    worker.print_to_stdstream({**data, "lines": TELLING}, ignore_prefix=False)
    assert len(printed) == 1, "workers that are ended after Ctrl-C print tracebacks"
    worker.connect()
    assert "RAY_BACKEND_LOG_LEVEL" not in os.environ
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "debug")
    worker.connect()
    assert levels == ["fatal", "debug"]


def test_ray_prints_through_the_function_that_is_filtered() -> None:
    for function in (worker.connect, worker.listen_error_messages):
        assert "print_to_stdstream" in inspect.unwrap(function).__code__.co_names


@pytest.mark.usefixtures("ray_local")
def test_a_ray_that_this_process_started_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_local()
    monkeypatch.setattr(worker._global_node, "head", False)
    assert not is_local()
