"""The cluster's MLflow server, on the head: python platform/deploy/mlflow_server.py

Runs and models are in SQLite on the head's disk, artifacts in RAYDETR_STORAGE/mlflow/artifacts. Each minute in which
something was written, a copy of the database goes to RAYDETR_STORAGE/mlflow/mlflow.db: a new head starts from it.
"""

import contextlib
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from raydetr import storage
from raydetr.errors import StorageError

PORT = 5000
BACKUP_SECONDS = 60.0


def main() -> None:
    """Serve until the process is ended."""
    if is_answering():
        print(f"an MLflow server answers on port {PORT} already")
        return
    shared = storage.join(storage.absolute(os.environ["RAYDETR_STORAGE"]), "mlflow")
    database = Path.home() / "mlflow" / "mlflow.db"
    restore(database, storage.join(shared, "mlflow.db"))
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server"]
        # All addresses of the host: workers use its own, tunnels loopback. The security group lets nobody else in.
        + ["--host", "0.0.0.0", "--port", str(PORT), "--workers", "2"]
        + ["--backend-store-uri", f"sqlite:///{database}"]
        + ["--artifacts-destination", storage.join(shared, "artifacts")],
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )
    try:
        back_up_forever(server, database, storage.join(shared, "mlflow.db"))
    finally:
        server.terminate()


def is_answering() -> bool:
    """Whether there is a server already: `ray up` runs the start commands again."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5):
            return True
    except OSError:
        return False


def restore(database: Path, copy: str) -> None:
    """Fetch the copy of a former head where this one has no database."""
    database.parent.mkdir(parents=True, exist_ok=True)
    if not database.exists() and storage.exists(copy):
        print(f"going on with {copy}", flush=True)
        database.write_bytes(storage.read_bytes(copy))


def back_up_forever(server: "subprocess.Popen[bytes]", database: Path, copy: str) -> None:
    """Copy the database whenever it has changed, until the server ends."""
    copied = None
    while server.poll() is None:
        time.sleep(BACKUP_SECONDS)
        if database.exists() and (state := _state(database)) != copied:
            try:
                storage.write_bytes(copy, snapshot(database))
            except StorageError as error:
                # Away for a while: the server goes on, and the next copy has it all.
                print(f"no copy of the database: {error}", flush=True)
                continue
            copied = state
    sys.exit(f"the MLflow server ended with status {server.returncode}")


def snapshot(database: Path) -> bytes:
    """The database as of one moment, whoever writes to it meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "copy.db"
        with (
            contextlib.closing(sqlite3.connect(database)) as source,
            contextlib.closing(sqlite3.connect(target)) as to,
        ):
            source.backup(to)
        return target.read_bytes()


def _state(database: Path) -> list[tuple[int, int]]:
    files = [database, database.with_name(database.name + "-wal")]
    return [(file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists()]


if __name__ == "__main__":
    main()
