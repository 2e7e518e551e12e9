"""The database of the cluster's MLflow server outlives the head."""

import importlib.util
import sqlite3
import subprocess
import threading
from pathlib import Path
from types import ModuleType

import pytest

from raydetr import storage
from raydetr.errors import StorageError

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


def test_a_new_head_goes_on_with_the_copy_and_a_restarted_one_with_its_own(
    script: ModuleType, tmp_path: Path
) -> None:
    first, second, copy = tmp_path / "a" / "m.db", tmp_path / "b" / "m.db", str(tmp_path / "shared" / "m.db")
    script.restore(first, copy)
    assert not first.exists()
    write(first, range(3))
    storage.write_bytes(copy, script.snapshot(first))
    script.restore(second, copy)
    assert read(second) == [0, 1, 2]
    write(second, range(3, 5))
    script.restore(second, copy)
    assert read(second) == [0, 1, 2, 3, 4]


def test_what_is_written_is_copied_and_an_ended_server_is_an_error(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "BACKUP_SECONDS", 0.05)
    database, copy = tmp_path / "a" / "m.db", str(tmp_path / "shared" / "m.db")
    write(database, range(1))
    writes: list[tuple[str, int]] = []
    away = [StorageError("the storage is away")]

    def write_bytes(address: str, data: bytes) -> None:
        if away:
            raise away.pop()
        writes.append((address, len(data)))

    monkeypatch.setattr(script.storage, "write_bytes", write_bytes)
    server = subprocess.Popen(["sleep", "1"])
    more = threading.Timer(0.5, write, (database, range(1, 100)))
    more.start()
    with pytest.raises(SystemExit, match="ended with status 0"):
        script.back_up_forever(server, database, copy)
    more.join()
    assert [address for address, _ in writes] == [copy, copy], (
        "once for each time something was written, though not at first"
    )
