"""Call a function concurrently."""

import threading
from collections.abc import Callable
from typing import TypeVar

from raydetr.errors import RaydetrError

Result = TypeVar("Result")


def call_concurrently(call: Callable[[], Result], count: int) -> tuple[list[Result], list[RaydetrError]]:
    """Start `count` calls at the same time; return the results, and the errors of the calls that raise one."""
    results: list[Result] = []
    errors: list[RaydetrError] = []
    barrier = threading.Barrier(count)

    def run() -> None:
        barrier.wait()
        try:
            results.append(call())
        except RaydetrError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, errors
