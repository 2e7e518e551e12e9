"""Memory that a process has freed and its C library keeps."""

import contextlib
import ctypes


def give_back_memory() -> None:
    """Return freed memory to the system, which takes a few milliseconds; glibc keeps it otherwise."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
