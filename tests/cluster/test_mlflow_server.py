"""The database of the cluster's MLflow server survives the loss of the head node."""

import contextlib
import importlib.util
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from raydetr import storage
from raydetr.errors import RegistryError, StorageError
from raydetr.registry import tracking
from tests.http_folder import serve
from tests.run_pipeline import environment

SCRIPT = Path(__file__).parents[2] / "platform" / "deploy" / "mlflow_server.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mlflow_server", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(file: Path, rows: range) -> None:
    file.parent.mkdir(exist_ok=True)
    connection = sqlite3.connect(file)
    with connection:
        connection.execute("CREATE TABLE IF NOT EXISTS runs (id INTEGER)")
        connection.executemany("INSERT INTO runs VALUES (?)", [(row,) for row in rows])
    connection.close()


def read(file: Path) -> list[int]:
    connection = sqlite3.connect(file)
    rows = [row for (row,) in connection.execute("SELECT id FROM runs ORDER BY id")]
    connection.close()
    return rows


def test_a_new_head_restores_the_backup_and_a_restarted_one_uses_its_own_database(
    script: ModuleType, tmp_path: Path
) -> None:
    first, second, backup = (
        tmp_path / "a" / "m.db",
        tmp_path / "b" / "m.db",
        str(tmp_path / "shared" / "m.db"),
    )
    script.restore(first, backup)
    assert not first.exists()
    write(first, range(3))
    storage.write_bytes(backup, script.snapshot(first))
    script.restore(second, backup)
    assert read(second) == [0, 1, 2]
    write(second, range(3, 5))
    script.restore(second, backup)
    assert read(second) == [0, 1, 2, 3, 4]


def test_changes_are_backed_up_and_a_server_that_exits_is_an_error(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "BACKUP_SECONDS", 0.05)
    database, backup = tmp_path / "a" / "m.db", str(tmp_path / "shared" / "m.db")
    write(database, range(1))
    writes: list[tuple[str, int]] = []
    errors = [StorageError("the storage is unavailable")]

    def write_bytes(address: str, data: bytes) -> None:
        if errors:
            raise errors.pop()
        writes.append((address, len(data)))

    monkeypatch.setattr(script.storage, "write_bytes", write_bytes)
    server = subprocess.Popen(["sleep", "1"])
    more = threading.Timer(0.5, write, (database, range(1, 100)))
    more.start()
    with pytest.raises(SystemExit, match="exited with status 0"):
        script.back_up_forever(server, database, backup)
    more.join()
    assert [address for address, _ in writes] == [backup, backup], (
        "one backup per change; the first attempt failed"
    )


def test_a_failed_last_backup_is_an_error_that_names_the_database(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("the storage is unavailable.")

    monkeypatch.setattr(script.storage, "write_bytes", refuse)
    write(tmp_path / "a" / "m.db", range(1))
    with pytest.raises(
        SystemExit, match=rf"last backup failed: .*unavailable\. The database is {tmp_path}/a/m\.db"
    ):
        script.back_up_forever(subprocess.Popen(["true"]), tmp_path / "a" / "m.db", str(tmp_path / "copy"))


def test_one_instance_supervises_a_database_and_the_next_waits_for_one_that_stops(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = tmp_path / "a" / "m.db"
    order: list[str] = []

    def follow() -> None:
        with script.supervise(database):
            order.append("second")

    with script.supervise(database):
        with pytest.raises(SystemExit) as second, script.supervise(database):
            pass
        assert second.value.code == 0
        assert f"process {os.getpid()} serves {database} and backs it up already" in capsys.readouterr().out
        (database.parent / "supervisor.lock").write_text("")  # as shortly before the first one exits
        waiting = threading.Thread(target=follow)
        waiting.start()
        time.sleep(0.1)
        order.append("first")
    waiting.join(5)
    assert order == ["first", "second"]


def test_an_unsupervised_server_is_an_error(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "health").write_text("OK")
    monkeypatch.setattr(script, "STOP_SECONDS", 0.3)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAYDETR_STORAGE", str(tmp_path))
    with serve(tmp_path) as url:
        monkeypatch.setattr(script, "PORT", int(url.rpartition(":")[2]))
        with pytest.raises(
            SystemExit, match="that this script did not start, so its database is not backed up"
        ) as error:
            script.main()
    assert error.value.code != 0


START = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("mlflow_server", {str(SCRIPT)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.PORT = int(sys.argv[1])
module.main()
"""


@contextlib.contextmanager
def head(folder: Path, port: int, *before: str) -> Iterator["subprocess.Popen[str]"]:
    """Run the script until its server answers; kill it at the end."""
    env = environment({"HOME": str(folder / "home"), "RAYDETR_STORAGE": str(folder / "shared")})
    command = [*before, sys.executable, "-c", START, str(port)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + 180
        while not answers(port):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.5)
        yield process
    finally:
        process.kill()
        process.communicate()


def answers(port: int) -> bool:
    try:
        tracking.resolve_uri(f"http://127.0.0.1:{port}")
    except RegistryError:
        return False
    return True


def experiments(database: Path) -> set[str]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM experiments")}


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server_and_backs_up_recent_changes(
    number: signal.Signals, tmp_path: Path, port: int
) -> None:
    with head(tmp_path, port) as process:
        tracking.client(f"http://127.0.0.1:{port}").create_experiment("just now")
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert "just now" in experiments(tmp_path / "shared" / "mlflow" / "mlflow.db")
    assert not answers(port)


@pytest.mark.slow
def test_a_killed_supervisor_leaves_no_server_behind(tmp_path: Path, port: int) -> None:
    with head(tmp_path, port) as process:
        process.kill()
        process.wait()
        until = time.monotonic() + 30
        while answers(port):
            assert time.monotonic() < until, "the server keeps running, and its database is not backed up"
            time.sleep(0.5)


@pytest.mark.slow
def test_as_process_1_of_a_container_it_stops_on_sigterm(tmp_path: Path, port: int) -> None:
    inside = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    with head(tmp_path, port, *inside) as outside:
        children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        out, _ = outside.communicate(timeout=60)
    assert outside.returncode == 0, out
    assert (tmp_path / "shared" / "mlflow" / "mlflow.db").exists()
