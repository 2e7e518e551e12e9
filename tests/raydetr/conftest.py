"""What the tests of the platform share: the real data where it is there, an S3 server."""

from pathlib import Path

import pytest

from tests.exact_reference import exact_reference
from tests.raydetr.s3 import s3, s3_server

__all__ = ["exact_reference", "s3", "s3_server"]

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real COCO data sets that lies beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no real data: there is no folder ../shared/data beside the repository")
    return SHARED_DATA
