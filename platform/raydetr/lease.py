"""One driver per folder: a lease on it, renewed while the driver lives."""

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from raydetr import storage
from raydetr.errors import LeaseError, StorageError

DURATION_S = 20.0
FILE = "lease.json"
_SETTLE_S = 0.3
"""Two that write at once see after so long whose file it is: the last writer's."""
_CLOCKS_DIFFER_S = 300.0
"""A lease that ran out longer ago was its holder's by no clock."""


@contextmanager
def lease(output: str, duration_s: float = DURATION_S, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lease of a folder while the block runs.

    The lease of a driver that died runs out: a new one waits for that, at most `duration_s`. A driver that was stopped
    or cut off from the storage for longer, and whose lease another one has taken, ends.

    Args:
        output: the folder.
        duration_s: how long a lease is valid without being renewed.
        wait_s: how long to wait for another driver that is alive.

    Raises:
        LeaseError: another driver holds it and is alive, or has taken it.
    """
    address = storage.join(output, FILE)
    owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    _take(address, owner, duration_s, wait_s)
    stop, lost = threading.Event(), threading.Event()
    me, in_main_thread = threading.get_ident(), threading.current_thread() is threading.main_thread()
    if in_main_thread:  # not SIGINT: what a script starts in the background ignores that
        before = signal.signal(signal.SIGURG, signal.default_int_handler)

    def renew() -> None:
        while not stop.wait(duration_s / 4):
            with suppress(StorageError):  # full or away for a while: the next one may be written
                held = _read(address)
                if held is not None and held["owner"] != owner:
                    lost.set()
                    if in_main_thread:
                        signal.pthread_kill(me, signal.SIGURG)
                    return
                _write(address, owner, duration_s)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if not lost.is_set():
            raise
        raise LeaseError(
            f"{address}: another driver has taken the run while this one was stopped or cut off from the storage."
        ) from None
    finally:
        stop.set()
        thread.join()
        if in_main_thread:
            signal.signal(signal.SIGURG, before)
        with suppress(StorageError):  # it runs out by itself
            held = _read(address)
            if held is not None and held["owner"] == owner:
                storage.delete_file(address)


def _take(address: str, owner: str, duration_s: float, wait_s: float) -> None:
    until = time.monotonic() + wait_s
    while True:
        alive = _wait_for(address, duration_s, until)
        if alive is not None:
            raise LeaseError(
                f"{address}: the run is held by another driver ({alive}). Wait for it to end, or give another --output."
            )
        _write(address, owner, duration_s)
        time.sleep(_SETTLE_S)
        held = _read(address)
        if held is not None and held["owner"] == owner:
            return


def _wait_for(address: str, duration_s: float, until: float) -> str | None:
    """Wait until nobody holds the lease, which gives None, or its holder is known to be alive and it is `until`.

    Whether it is renewed is judged by this clock alone: another host's may be off.
    """
    held, since, is_alive = _read(address), time.monotonic(), False
    while held is not None:
        long_over = float(held["expires"]) + _CLOCKS_DIFFER_S < time.time()
        if long_over or time.monotonic() - since > duration_s:
            return None
        if is_alive and time.monotonic() > until:
            return str(held["owner"])
        time.sleep(0.2)
        before, held = held, _read(address)
        if held != before:
            since, is_alive = time.monotonic(), True
    return None


def _write(address: str, owner: str, duration_s: float) -> None:
    storage.write_json(address, {"owner": owner, "expires": time.time() + duration_s})


def _read(address: str) -> dict[str, Any] | None:
    """What the file says; None where there is none."""
    if not storage.exists(address):
        return None
    try:
        held: dict[str, Any] = storage.read_json(address)
    except StorageError:
        if storage.exists(address):
            raise
        return None  # given back between the look and the read
    return held
