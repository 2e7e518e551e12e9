import shutil
import socket
from pathlib import Path

import pytest

from raydetr.registry.tracking import client, resolve_uri


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes 2 s to make one; tests get copies."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    client(resolve_uri(f"sqlite:///{file}"))
    return file


@pytest.fixture
def tracking_uri(empty_database: Path, tmp_path: Path) -> str:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return resolve_uri(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
