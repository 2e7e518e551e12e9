"""Call the same thing several times at the same moment."""

import threading
from collections.abc import Callable
from typing import TypeVar

from raydetr.errors import RaydetrError

Result = TypeVar("Result")


def at_once(call: Callable[[], Result], count: int) -> tuple[list[Result], list[RaydetrError]]:
    """What calls that begin together return, and the errors of those that end with one."""
    done: list[Result] = []
    refused: list[RaydetrError] = []
    together = threading.Barrier(count)

    def run() -> None:
        together.wait()
        try:
            done.append(call())
        except RaydetrError as error:
            refused.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done, refused
