"""Fixtures of the platform's tests: the real data if available, a model, a registry, an S3 server."""

import socket
from pathlib import Path

import pytest

from raydetr.data.shards import Manifest
from raydetr.registry.models import ResolvedModel, resolve
from tests.awkward import write_awkward
from tests.empty_registry import empty_registry
from tests.exact_reference import exact_reference
from tests.raydetr.s3 import s3, s3_server
from tests.tiny_detr import save_tiny_detr

__all__ = ["exact_reference", "s3", "s3_server"]

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real COCO data sets next to the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no real data: there is no folder ../shared/data next to the repository")
    return SHARED_DATA


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Write 61 images of different sizes, one truncated, one missing."""
    return write_awkward(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    """Save a model with the data set's classes in another order, and one more class."""
    folder = save_tiny_detr(tmp_path_factory.mktemp("model") / "tiny", ["cat", "dog", "ant", "bee"], edge=64)
    return resolve(str(folder), "")


@pytest.fixture
def tracking_uri(tmp_path: Path) -> str:
    return empty_registry(tmp_path)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
