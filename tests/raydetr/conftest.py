"""What the tests of the platform share: one local Ray for all of them, and the real data where it is there."""

import gc
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from raydetr import cluster
from tests.raydetr.s3 import s3, s3_server

__all__ = ["s3", "s3_server"]

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray of this test session with eight logical CPUs (four workers and their data tasks); tests leave it running."""
    if ray.is_initialized():
        ray.shutdown()
    ray.init(
        address="local",
        num_cpus=8,
        runtime_env=cluster.quoted_interpreter(),
        # Without it Ray Train can take its controller for dead and stop the workers.
        include_dashboard=True,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # Ray does not wait for the processes it stops
        ray.shutdown()
        gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real COCO data sets that lies beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no real data: there is no folder ../shared/data beside the repository")
    return SHARED_DATA
