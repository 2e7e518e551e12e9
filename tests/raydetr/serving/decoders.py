"""Decode workers shared by the tests of a process, because starting one takes seconds."""

import atexit
import functools

from raydetr.serving.decoding import WorkerProgram
from raydetr.serving.images import Limits
from raydetr.serving.preparer import Preparer


@functools.cache
def program() -> WorkerProgram:
    """Return the process that forks the workers of all tests."""
    started = WorkerProgram()
    atexit.register(started.close)
    return started


@functools.cache
def preparer(limits: Limits = Limits()) -> Preparer:  # noqa: B008  # frozen
    """Return a preparer with one worker of each kind. It is cached by its limits, because its workers keep running."""
    return Preparer(limits, workers=1, program=program())
