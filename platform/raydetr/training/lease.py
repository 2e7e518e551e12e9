"""One driver per run: a lease on the output folder, renewed while the driver lives."""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from raydetr import storage
from raydetr.errors import StorageError, TrainingError

DURATION_S = 20.0
FILE = "lease.json"


@contextmanager
def lease(output: str, duration_s: float = DURATION_S) -> Iterator[None]:
    """Hold the lease of a run's folder while the block runs.

    The lease of a driver that died runs out: a new one waits for that, at most `duration_s`.

    Args:
        output: the run's folder.
        duration_s: how long a lease is valid without being renewed.

    Raises:
        TrainingError: another driver holds it and is alive.
    """
    address = storage.join(output, FILE)
    owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    _wait_for(address, duration_s)
    _write(address, owner, duration_s)
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


def _write(address: str, owner: str, duration_s: float) -> None:
    storage.write_json(address, {"owner": owner, "expires": time.time() + duration_s})


def _read(address: str) -> dict[str, float | str] | None:
    try:
        held: dict[str, float | str] = storage.read_json(address)
    except StorageError:
        return None  # none, or given back between the look and the read
    return held


def _wait_for(address: str, duration_s: float) -> None:
    first = held = _read(address)
    give_up = time.time() + duration_s
    while held and float(held["expires"]) > time.time():
        if (first and held["expires"] != first["expires"]) or time.time() > give_up:
            raise TrainingError(
                f"{address}: the run is held by another driver ({held['owner']}). Wait for it to end, or give "
                "another --output."
            )
        time.sleep(0.2)
        held = _read(address)
