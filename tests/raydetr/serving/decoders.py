"""Processes that decode images, shared by the tests of a test process: one takes seconds to start."""

import atexit
import functools

from raydetr.serving.decoding import WorkerProgram
from raydetr.serving.images import Limits
from raydetr.serving.preparer import Preparer


@functools.cache
def program() -> WorkerProgram:
    """The process that forks the workers of all tests."""
    started = WorkerProgram()
    atexit.register(started.close)
    return started


@functools.cache
def preparer(limits: Limits = Limits()) -> Preparer:  # noqa: B008  # frozen
    """Preparers with one worker of either kind; one for each limits, since its workers stay."""
    return Preparer(limits, workers=1, program=program())
