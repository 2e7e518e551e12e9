import socket
from pathlib import Path

import pytest

from tests.empty_registry import empty_registry


@pytest.fixture
def tracking_uri(tmp_path: Path) -> str:
    return empty_registry(tmp_path)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
