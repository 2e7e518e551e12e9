"""Run the cluster's MLflow server on the head: python platform/deploy/mlflow_server.py

Runs and models are in SQLite on the head's disk, artifacts in RAYDETR_STORAGE/mlflow/artifacts. The database is backed
up to RAYDETR_STORAGE/mlflow/mlflow.db every minute if it has changed. A new head restores this backup.

SIGTERM and SIGINT stop the server, then back up once more. Exit status: 0 after such a stop, or if another instance of
this script already runs; 1 if the server exited by itself, the last backup failed, or the port belongs to a server
whose database is not backed up.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from raydetr import storage
from raydetr.command import Interrupted, interruptible
from raydetr.errors import StorageError

PORT = 5000
BACKUP_SECONDS = 60.0
STOP_SECONDS = 10.0
"""Time for the server to answer its last requests; Kubernetes kills a pod after 30 s by default."""

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve and back up until a signal arrives."""
    database = Path.home() / "mlflow" / "mlflow.db"
    shared = storage.join(storage.absolute(os.environ["RAYDETR_STORAGE"]), "mlflow")
    backup = storage.join(shared, "mlflow.db")
    try:
        with (
            interruptible("stopping the MLflow server, then a last backup of its database"),
            supervise(database),
        ):
            if is_answering(STOP_SECONDS):
                sys.exit(
                    f"error: port {PORT} has a server that this script did not start, so its database is not backed up. "
                    f"Find it with `ss -ltnp sport = :{PORT}`, stop it, and start this script again."
                )
            restore(database, backup)
            back_up_forever(start(database, storage.join(shared, "artifacts")), database, backup)
    except Interrupted as stop:
        print(f"stopped by {stop}; {backup} is up to date", flush=True)


def is_answering(duration_s: float) -> bool:
    """Return whether a server answers at the port for `duration_s`.

    The server of an instance that was just killed still answers, but stops within this time.
    """
    deadline = time.monotonic() + duration_s
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5):
                time.sleep(0.5)
        except OSError:
            return False
    return True


@contextlib.contextmanager
def supervise(database: Path) -> Iterator[None]:
    """Hold the lock of a database in the block; exit with status 0 if another process serves and backs it up already.

    This happens when `ray up` runs the start commands again. If the other instance is stopping, wait for it.
    """
    database.parent.mkdir(parents=True, exist_ok=True)
    # The kernel releases the lock however the process exits.
    with database.with_name("supervisor.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            if holder := lock.read():
                print(f"process {holder} serves {database} and backs it up already", flush=True)
                sys.exit(0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)


def restore(database: Path, backup: str) -> None:
    """Restore the backup of a previous head if this one has no database."""
    database.parent.mkdir(parents=True, exist_ok=True)
    if not database.exists() and storage.exists(backup):
        print(f"starting from {backup}", flush=True)
        partial = database.with_name("restoring.db")
        partial.write_bytes(storage.read_bytes(backup))
        partial.replace(database)


def start(database: Path, artifacts: str) -> "subprocess.Popen[bytes]":
    """Start the server in its own process group; the kernel stops it when this process exits for any reason."""

    def end_with_parent() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # the server forwards it to its workers

    return subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server"]
        # All interfaces: workers use the host's address, tunnels use loopback. The security group blocks the rest.
        + ["--host", "0.0.0.0", "--port", str(PORT), "--workers", "2"]
        + ["--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", artifacts],
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        start_new_session=True,  # Ctrl-C in a terminal reaches only this process, which then stops the server
        preexec_fn=end_with_parent,
    )


def stop(server: "subprocess.Popen[bytes]") -> None:
    """Send SIGTERM, and after `STOP_SECONDS` SIGKILL to the rest of the process group."""
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def back_up_forever(server: "subprocess.Popen[bytes]", database: Path, backup: str) -> None:
    """Back up the database whenever it has changed until the server exits or a signal arrives, then a last time."""
    saved = None
    try:
        while server.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(BACKUP_SECONDS)
            try:
                saved = back_up(database, backup, saved)
            except StorageError as error:
                # The storage is temporarily unavailable: the server continues, and the next backup contains everything.
                print(f"no backup of the database: {error}", flush=True)
    finally:
        stop(server)  # nothing is written after the last backup
        try:
            back_up(database, backup, saved)
        except StorageError as error:
            sys.exit(f"error: the last backup failed: {error} The database is {database} on this machine.")
    sys.exit(f"error: the MLflow server exited with status {server.returncode}")


State = list[tuple[int, int]]
"""Modification time in ns and size in bytes of each file of a database."""


def back_up(database: Path, backup: str, saved: State | None) -> State | None:
    """Back up the database if it has changed since `saved`; return the state that is now saved."""
    files = [database, database.with_name(database.name + "-wal")]
    state = [(file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists()]
    if state and state != saved:
        storage.write_bytes(backup, snapshot(database))
    return state


def snapshot(database: Path) -> bytes:
    """Return a consistent copy of the database while other processes write to it."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "copy.db"
        with (
            contextlib.closing(sqlite3.connect(database)) as source,
            contextlib.closing(sqlite3.connect(target)) as to,
        ):
            source.backup(to)
        return target.read_bytes()


if __name__ == "__main__":
    main()
