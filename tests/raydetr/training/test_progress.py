"""Metrics reach MLflow exactly once despite restarts and outages of MLflow; on a real SQLite store."""

import contextlib
import dataclasses
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from raydetr.data.stream.micro_batch import TrainingBatch
from raydetr.flat_keys import override
from raydetr.registry import tracking
from raydetr.training.checkpoint import History
from raydetr.training.config import TrainConfig
from raydetr.training.progress import LINE_EVERY_S, Progress
from tests.cluster.recorded_training import config as make_config
from tests.empty_registry import empty_registry
from tests.raydetr.training.test_distributed import batch

Run = tuple[TrainConfig, str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = make_config("", str(tmp_path))
    config = override(config, tracking_uri=empty_registry(tmp_path))
    return config, tracking.start_run(config.tracking.tracking_uri, "training", "run", {}, {})


def metrics(step: int) -> dict[str, float]:
    return {"loss": 10.0 - step, "grad_norm": 1.0, "images": 4.0}


def add(progress: Progress, *steps: int) -> None:
    for step in steps:
        one: TrainingBatch = dataclasses.replace(batch([1]), step=step)
        progress.add(metrics(step), [one])


def values(run: Run, name: str = "loss") -> list[tuple[int, float]]:
    """Return all values of a metric in MLflow, including duplicates."""
    config, run_id = run
    history = tracking.client(config.tracking.tracking_uri).get_metric_history(run_id, name)
    return sorted((metric.step, metric.value) for metric in history)


@contextlib.contextmanager
def unavailable(run: Run) -> Iterator[None]:
    """Make all writes to the store fail."""
    file = run[0].tracking.tracking_uri.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("ALTER TABLE metrics RENAME TO hidden")
        database.commit()
        try:
            yield
        finally:
            database.execute("ALTER TABLE hidden RENAME TO metrics")
            database.commit()


def test_metrics_are_sent_when_their_checkpoint_is_committed_and_not_before(run: Run) -> None:
    progress = Progress(*run, rank=0)
    add(progress, 0, 1, 2)
    assert values(run) == []
    assert [row[0] for row in progress.history().metrics] == [0, 1, 2]
    progress.send()
    assert values(run) == [(0, 10.0), (1, 9.0), (2, 8.0)]
    assert progress.rows == []


def test_metrics_are_stored_while_mlflow_is_unavailable_and_sent_once_afterwards(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(*run, rank=0)
    add(progress, 0, 1)
    with unavailable(run):
        progress.send()
        assert "The metrics of 2 steps are stored in the checkpoint" in capfd.readouterr().out
        add(progress, 2)
        assert [row[0] for row in progress.history().metrics] == [0, 1, 2]
        progress.send()
    add(progress, 3)
    progress.send()
    assert values(run) == [(step, 10.0 - step) for step in range(4)]


def test_sending_the_same_rows_twice_leaves_one_value_per_step(run: Run) -> None:
    """A run that was killed after sending resumes from the checkpoint before, and sends again."""
    progress = Progress(*run, rank=0)
    add(progress, 0, 1, 2)
    checkpoint = progress.history()
    progress.send()
    resumed = Progress(*run, rank=0)
    resumed.restore(checkpoint)
    assert values(run) == [(0, 10.0), (1, 9.0), (2, 8.0)]
    assert resumed.rows == []


def test_metrics_that_a_killed_run_did_not_send_are_sent_on_resume(run: Run) -> None:
    progress = Progress(*run, rank=0)
    add(progress, 0, 1)
    checkpoint = progress.history()  # then the run is killed
    resumed = Progress(*run, rank=0)
    resumed.restore(checkpoint)
    add(resumed, 2)
    resumed.send()
    assert values(run) == [(0, 10.0), (1, 9.0), (2, 8.0)]


def test_metrics_that_the_server_lost_are_sent_again_on_resume(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server of a new head restores a backup of the database that is a minute old."""
    progress = Progress(*run, rank=0)
    add(progress, 0)
    progress.send()
    file = run[0].tracking.tracking_uri.removeprefix("sqlite:///")
    backup = Path(file).read_bytes()
    add(progress, 1, 2)
    checkpoint = progress.history()
    progress.send()
    later = progress.history()
    Path(file).write_bytes(backup)
    assert values(run) == [(0, 10.0)]
    Progress(*run, rank=0).restore(later)
    assert values(run) == [(0, 10.0), (1, 9.0), (2, 8.0)]
    assert later.metrics == checkpoint.metrics
    monkeypatch.setattr("raydetr.training.progress.RESEND_S", -1.0)
    assert not progress.history().metrics, "old metrics are not stored again"


def test_seconds_include_earlier_attempts(run: Run) -> None:
    progress = Progress(*run, rank=0)
    progress.restore(History(seconds=1000.0))
    assert 1000 < progress.history().seconds < 1100


def test_other_ranks_send_nothing(run: Run) -> None:
    other = Progress(*run, rank=1)
    other.restore(History([(0, 1, {"loss": 1.0})]))
    assert values(run) == []


def test_an_unreachable_server_is_detected_immediately(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """MLflow's own client would retry for minutes while all workers wait."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # without listening
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        progress = Progress(override(run[0], tracking_uri=uri), run[1], rank=0)
        add(progress, 0)
        progress.send()
    assert "No MLflow server answers" in capfd.readouterr().out
    assert len(progress.history().metrics) == 1


def test_a_line_shows_step_loss_speed_and_time_left(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("raydetr.training.progress.time.perf_counter", lambda: now)
    progress = Progress(*run, rank=0)
    add(progress, 0)
    assert capfd.readouterr().out == "", "the first step includes one-time setup"
    now = LINE_EVERY_S
    add(progress, 1)
    line = capfd.readouterr().out
    assert line.startswith(f"step 2/{run[0].optimizer.steps}  loss 9.000  ")
    assert " left" in line


def test_a_long_run_prints_one_line_per_minute(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("raydetr.training.progress.time.perf_counter", lambda: now)
    progress, printed = Progress(*run, rank=0), []
    for step in range(1200):  # of one second each
        add(progress, step)
        now += 1.0
        if capfd.readouterr().out:
            printed.append(step)
    assert printed[0] <= 10
    assert len(printed) < 50
    assert {later - earlier for earlier, later in zip(printed[-5:], printed[-4:], strict=False)} == {60}
