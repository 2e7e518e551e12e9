import pytest

from raydetr.data.shards import Manifest
from raydetr.registry.models import ResolvedModel, resolve
from tests.awkward import write_awkward
from tests.tiny_detr import save_tiny_detr


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """61 images of many sizes, one cut short, one missing."""
    return write_awkward(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    """Knows the data set's classes in another order, and one more."""
    folder = save_tiny_detr(tmp_path_factory.mktemp("model") / "tiny", ["cat", "dog", "ant", "bee"], edge=64)
    return resolve(str(folder), "")
