"""Options of the test session, its Ray, and the record of how far the model library is from its references."""

import collections
import ctypes
import functools
import gc
import logging
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ray starts its workers with niceness 15: next to busy test processes they would starve.
os.environ.setdefault("RAY_worker_niceness", "0")
# Several processes of tests share the cores: threads of torch and OpenVINO that wait for each other would block them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What the user's shell says about clusters and registries is not for tests.
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("RAYDETR_STORAGE", None)

import hypothesis.configuration
import pytest
import ray
import torch
from xdist.scheduler import LoadScopeScheduling

from raydetr import cluster
from tests import resources
from tests.checklist import Outcome, write_table
from tests.run_pipeline import pipeline, pipeline_process

__all__ = ["pipeline", "pipeline_process"]


@dataclass(frozen=True)
class Marks:
    """What the collected tests say they prove, those that were deselected included."""

    checklist: set[tuple[str, str]]
    known_issues: set[int]
    files: set[Path]


ROOT = Path(__file__).parents[1]
MARKS = pytest.StashKey[Marks]()
_DIFFERENCES = pytest.StashKey[list[float]]()
_OUTCOMES = pytest.StashKey[list[Outcome]]()
_TREE = pytest.StashKey[set[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--checkpoint", help="folder of a trained DETR, for the numbers of the DETR page")
    parser.addoption("--checklist-table", help="Markdown file: behaviour, its tests, largest difference")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir(), "hypothesis"))
    gc.disable()  # until the tests are collected
    config.stash[_OUTCOMES] = []
    config.stash[_TREE] = _tree()


def _tree() -> set[str]:
    """What `git status` lists in this checkout: changed, new and ignored files, but for caches."""
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=all", "--ignored"]
    if shutil.which("git") is None:
        return set()
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    caches = ("__pycache__/", ".pytest_cache/", ".mypy_cache/", ".ruff_cache/")
    caches += (".egg-info/", ".venv/", ".test-output")
    return {line for line in listed if not any(cache in line for cache in caches)}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        resources.mark(item)
    config.stash[MARKS] = Marks(
        {(mark.args[0], mark.args[1]) for item in items for mark in item.iter_markers("checklist")},
        {mark.args[0] for item in items for mark in item.iter_markers("known_issue")},
        {item.path for item in items},
    )
    if hasattr(config, "workerinput"):
        _longest_first(items)


def pytest_collection_finish() -> None:
    """Spare the garbage collector the million objects of imported packages, which took it a quarter of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()


LANES = {
    "ray": ("ray_local",),
    "ranks": ("tests.ranks",),
    "clusters": (
        *("tests.cluster.local_head", "tests.cluster.fault_runs", "tests.cluster.launcher", "cluster_utils"),
        *("ray.init(", "pipelines/serve.py", "two_nodes import", "doctor.two_nodes"),
    ),
}
"""Lane → words in a test file that put it there; the files of a lane run one after the other in one process."""


@functools.cache
def _lane(file: str) -> str:
    """The lane of a file; its own name where it is free to run anywhere.

    One Ray serves all files that use `ray_local`, one server all that fork ranks from it. Of the clusters that tests
    start there is one at a time: three at once take more than 24 GB and starve each other.
    """
    text = (ROOT / file).read_text(encoding="utf-8")
    return next((lane for lane, words in LANES.items() if any(word in text for word in words)), file)


class LaneScheduling(LoadScopeScheduling):
    """Assign lanes to processes."""

    def _split_scope(self, nodeid: str) -> str:
        return _lane(nodeid.partition("::")[0])


def _longest_first(items: list[pytest.Item]) -> None:
    """Sort whole files: first those of the lanes, then by their number of tests."""
    files = [item.nodeid.partition("::")[0] for item in items]
    count = collections.Counter(files)
    lanes = list(LANES)
    order = {
        file: (lanes.index(_lane(file)) if _lane(file) in lanes else len(lanes), -count[file], file)
        for file in count
    }
    items.sort(key=lambda item: order[item.nodeid.partition("::")[0]])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LaneScheduling:
    config.option.loadscopereorder = False  # files start in the order of collection
    gc.enable()  # this process collects no tests
    return LaneScheduling(config, log)


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = ray.is_initialized()
    yield  # a failure of the test itself is the one that is reported
    assert ray.is_initialized() == before or item.get_closest_marker("ray"), (
        "this test starts or stops Ray without the fixture ray_local: it would cost seconds and disturb other tests"
    )


@pytest.fixture(autouse=True)
def _leaves_torch_as_it_was() -> Iterator[None]:
    """A test that changes torch for the process is the one that fails, not the next one."""
    before = _settings_of_torch()
    yield
    after = _settings_of_torch()
    if after != before:
        torch.set_default_dtype(before[0])
        torch.set_grad_enabled(before[1])
        torch.use_deterministic_algorithms(before[2])
        torch.set_num_threads(before[3])
    assert after == before, (
        "default dtype, gradients, deterministic algorithms, threads: put back what you change"
    )


def _settings_of_torch() -> tuple[Any, ...]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.get_default_dtype(), torch.is_grad_enabled(), deterministic, torch.get_num_threads()


@pytest.fixture(autouse=True)
def _in_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths, such as that of the embedded registry, lead to the test's own folder, not into the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="module")
def _lanes_first(request: pytest.FixtureRequest) -> None:
    """Yield the cores to the lanes: a lane is as long as the whole run, other files fill the gaps."""
    if hasattr(request.config, "workerinput") and _lane(request.node.nodeid) not in LANES:
        os.setpriority(os.PRIO_PROCESS, 0, 5)


@pytest.fixture(autouse=True, scope="module")
def _free_memory() -> Iterator[None]:
    """Several processes of tests share a machine; the C library keeps what torch gave back.

    What is left after a file is imported or cached, so the collector does not look at it again.
    """
    yield
    gc.collect()
    gc.freeze()
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


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    changed = _tree() - session.config.stash[_TREE]
    if changed and not hasattr(session.config, "workerinput"):
        print(
            "\nThe checkout changed while the tests ran; tests write to tmp_path only:",
            *sorted(changed),
            sep="\n",
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    file = session.config.getoption("--checklist-table")
    if file is not None:
        write_table(Path(file), session.config.stash[_OUTCOMES])
