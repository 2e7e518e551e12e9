"""Return freed memory of the process to the operating system."""

import contextlib
import ctypes


def trim_memory() -> None:
    """Return freed memory to the operating system, in a few milliseconds; glibc would retain it."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
