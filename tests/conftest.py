"""Options of the test session, its Ray instance, and the record of differences from the references."""

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

# Ray starts its workers with niceness 15: busy test processes would starve them.
os.environ.setdefault("RAY_worker_niceness", "0")
# Several test processes share the cores: threads of torch and OpenVINO that wait for each other would block them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests must not use the cluster and the registry of the user's shell.
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
    """Marks of all collected tests, including deselected ones."""

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
    parser.addoption("--checklist-table", help="Markdown file: behavior, its tests, largest difference")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir(), "hypothesis"))
    gc.disable()  # enabled again after collection
    config.stash[_OUTCOMES] = []
    config.stash[_TREE] = _tree()


def _tree() -> set[str]:
    """List the changed, new and ignored files of this checkout, except caches, as `git status` prints them."""
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
    """Exclude the million objects of imported packages from garbage collection: it took a quarter of the test time."""
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
"""Lane → strings in a test file that assign it to the lane; the files of a lane run sequentially in one process."""


@functools.cache
def _lane(file: str) -> str:
    """Return the lane of a file; its own name if it can run in any process.

    All files that use `ray_local` share one Ray instance, and all that fork ranks share one fork server. Tests that
    start clusters run one at a time: three concurrent clusters take more than 24 GB and starve each other.
    """
    text = (ROOT / file).read_text(encoding="utf-8")
    return next((lane for lane, words in LANES.items() if any(word in text for word in words)), file)


class LaneScheduling(LoadScopeScheduling):
    """Assign lanes to processes."""

    def _split_scope(self, nodeid: str) -> str:
        return _lane(nodeid.partition("::")[0])


def _longest_first(items: list[pytest.Item]) -> None:
    """Sort the tests by file: files of the lanes first, then files with many tests."""
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
    """Return ``difference(x)``, which records how far a result is from its reference.

    The checklist table shows the largest difference of each behavior.
    """
    return request.node.stash.setdefault(_DIFFERENCES, []).append


@pytest.fixture(scope="session")
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """Return the folder given with --checkpoint."""
    folder = request.config.getoption("--checkpoint")
    if folder is None:
        pytest.skip("no trained checkpoint: give one with --checkpoint PATH")
    return Path(folder)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """Start the session's Ray with ten logical CPUs (eight workers and their data tasks); tests must not stop it."""
    if ray.is_initialized():
        ray.shutdown()
    ray.init(
        address="local",
        num_cpus=10,
        runtime_env=cluster.quoted_interpreter(),
        # Without it, Ray Train can mistake its controller for dead and stop the workers.
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
    yield  # if the test itself fails, its failure is reported, not the one below
    assert ray.is_initialized() == before or item.get_closest_marker("ray"), (
        "this test starts or stops Ray: use the fixture ray_local instead, which saves seconds and isolates other tests"
    )


@pytest.fixture(autouse=True)
def _restore_torch_settings() -> Iterator[None]:
    """Fail a test that changes global settings of torch, and restore them for the next test."""
    before = _torch_settings()
    yield
    after = _torch_settings()
    if after != before:
        torch.set_default_dtype(before[0])
        torch.set_grad_enabled(before[1])
        torch.use_deterministic_algorithms(before[2])
        torch.set_num_threads(before[3])
    assert after == before, (
        "this test changed torch's default dtype, gradients, deterministic algorithms or threads: restore them"
    )


def _torch_settings() -> tuple[Any, ...]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.get_default_dtype(), torch.is_grad_enabled(), deterministic, torch.get_num_threads()


@pytest.fixture(autouse=True)
def _run_in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test in its temporary folder, so that relative paths do not lead into the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="module")
def _lower_priority(request: pytest.FixtureRequest) -> None:
    """Lower the priority of files outside the lanes: a lane takes as long as the whole run, other files fill gaps."""
    if hasattr(request.config, "workerinput") and _lane(request.node.nodeid) not in LANES:
        os.setpriority(os.PRIO_PROCESS, 0, 5)


@pytest.fixture(autouse=True, scope="module")
def _free_memory() -> Iterator[None]:
    """Return freed memory to the system after each file, since several test processes share a machine.

    Objects that remain after a file are imported or cached, so they are excluded from further garbage collection.
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
            "\nThe checkout changed during the tests; tests may write to tmp_path only:",
            *sorted(changed),
            sep="\n",
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    file = session.config.getoption("--checklist-table")
    if file is not None:
        write_table(Path(file), session.config.stash[_OUTCOMES])
