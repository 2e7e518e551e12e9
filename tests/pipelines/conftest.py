"""A registry with its first version as champion, for tests of the gate."""

import shutil
from pathlib import Path

import pytest

from raydetr.config import PromoteConfig
from raydetr.registry.tracking import client, resolve_uri
from tests.empty_registry import empty_registry
from tests.raydetr.registry.versions import bare_versions


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a registry with three versions without an evaluation."""
    folder = tmp_path_factory.mktemp("mlflow")
    bare_versions(empty_registry(folder), 3, evaluated=False)
    return folder / "mlflow.db"


@pytest.fixture
def config(database: Path, tmp_path: Path) -> PromoteConfig:
    shutil.copy(database, tmp_path / "mlflow.db")
    uri = resolve_uri(f"sqlite:///{tmp_path}/mlflow.db")
    client(uri).set_registered_model_alias("raydetr", "champion", "1")
    return PromoteConfig(
        tracking_uri=uri, model="models:/raydetr/2", json=str(tmp_path / "summary.json"), min_class_objects=10
    )
