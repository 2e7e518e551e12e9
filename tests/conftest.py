"""Options of the test session, its Ray, and the record of how far the model library is from its references."""

import ctypes
import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from raydetr import cluster
from tests.checklist import Outcome, write_table


@dataclass(frozen=True)
class Marks:
    """What the collected tests say they prove, those that were deselected included."""

    checklist: set[tuple[str, str]]
    known_issues: set[int]
    files: set[Path]


MARKS = pytest.StashKey[Marks]()
_DIFFERENCES = pytest.StashKey[list[float]]()
_OUTCOMES = pytest.StashKey[list[Outcome]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--checkpoint", help="folder of a trained DETR, for the numbers of the DETR page")
    parser.addoption("--checklist-table", help="Markdown file: behaviour, its tests, largest difference")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_OUTCOMES] = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[MARKS] = Marks(
        {(mark.args[0], mark.args[1]) for item in items for mark in item.iter_markers("checklist")},
        {mark.args[0] for item in items for mark in item.iter_markers("known_issue")},
        {item.path for item in items},
    )


@pytest.fixture
def difference(request: pytest.FixtureRequest) -> Callable[[float], None]:
    """``difference(x)`` notes how far a result is from its reference; the table shows the largest of a behaviour."""
    return request.node.stash.setdefault(_DIFFERENCES, []).append


@pytest.fixture(scope="session")
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """The folder given with --checkpoint."""
    folder = request.config.getoption("--checkpoint")
    if folder is None:
        pytest.skip("no trained checkpoint: give one with --checkpoint PATH")
    return Path(folder)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A Ray of this test session with ten logical CPUs (eight workers and their data tasks); tests leave it running."""
    if ray.is_initialized():
        ray.shutdown()
    ray.init(
        address="local",
        num_cpus=10,
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


@pytest.fixture(autouse=True, scope="module")
def _free_memory() -> Iterator[None]:
    """Two processes of tests and what they start share a machine; the C library keeps what torch gave back."""
    yield
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = (yield).get_result()
    if report.when == "call" or report.failed or report.skipped:
        rows = [mark.args for mark in item.iter_markers("checklist")]
        largest = max(item.stash.get(_DIFFERENCES, []), default=None)
        for section, row in rows:
            item.config.stash[_OUTCOMES].append(Outcome(section, row, item.nodeid, report.outcome, largest))


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--checklist-table")
    if file is not None:
        write_table(Path(file), session.config.stash[_OUTCOMES])
