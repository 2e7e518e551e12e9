"""One driver per folder: a lease on it, renewed while the driver lives."""

import os
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


@contextmanager
def lease(output: str, duration_s: float = DURATION_S, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lease of a folder while the block runs.

    The lease of a driver that died runs out: a new one waits for that, at most `duration_s`.

    Args:
        output: the folder.
        duration_s: how long a lease is valid without being renewed.
        wait_s: how long to wait for another driver that is alive.

    Raises:
        LeaseError: another driver holds it and is alive.
    """
    address = storage.join(output, FILE)
    owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    _take(address, owner, duration_s, wait_s)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(duration_s / 4):
            with suppress(StorageError):  # full or away for a while: the next one may be written
                _write(address, owner, duration_s)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with suppress(StorageError):  # it runs out by itself
            storage.delete_file(address)


def _take(address: str, owner: str, duration_s: float, wait_s: float) -> None:
    until = time.monotonic() + wait_s
    while True:
        alive = _wait_for(address, duration_s, until)
        if alive is None:
            _write(address, owner, duration_s)
            time.sleep(_SETTLE_S)
            held = _read(address)
            if held is not None and held["owner"] == owner:
                return
        elif time.monotonic() > until:
            raise LeaseError(
                f"{address}: the run is held by another driver ({alive}). Wait for it to end, or give another --output."
            )


def _wait_for(address: str, duration_s: float, until: float) -> str | None:
    """Wait until nobody holds the lease, which gives None, or its holder is known to be alive."""
    first = held = _read(address)
    give_up = time.time() + duration_s
    while held and float(held["expires"]) > time.time():
        renewed = first is not None and held["expires"] != first["expires"]
        if (renewed or time.time() > give_up) and time.monotonic() > until:
            return str(held["owner"])
        time.sleep(0.2)
        held = _read(address)
    return None


def _write(address: str, owner: str, duration_s: float) -> None:
    storage.write_json(address, {"owner": owner, "expires": time.time() + duration_s})


def _read(address: str) -> dict[str, Any] | None:
    try:
        held: dict[str, Any] = storage.read_json(address)
    except StorageError:
        return None  # none, or given back between the look and the read
    return held
