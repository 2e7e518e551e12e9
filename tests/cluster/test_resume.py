"""A run that was interrupted and resumed is bitwise identical to an uninterrupted one."""

import io
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from raydetr.training import checkpoint
from tests.awkward import write_awkward
from tests.cluster.fault_runs import attempts, driver_lines, losses, received, start, training_state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 24
FLAGS = f"--steps {STEPS} --precision float64 --dropout 0.1 --ema-decay 0.9 --warmup-steps 5".split()


@pytest.fixture(scope="module")
def train_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_awkward(tmp_path_factory.mktemp("data")).root


@pytest.fixture(
    scope="module",
    params=[
        (3, "--query-groups 2"),
        pytest.param((2, "--query-groups 2"), marks=pytest.mark.nightly),
        (2, "--multi-scale"),
    ],
    ids=str,
)
def case(request: pytest.FixtureRequest) -> tuple[int, list[str]]:
    """Return the number of workers and all flags."""
    workers, flags = request.param
    return workers, [*FLAGS, *flags.split(), "--workers", str(workers)]


@pytest.fixture(scope="module")
def uninterrupted(
    case: tuple[int, list[str]], train_data: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    with start(train_data, output, *case[1]) as run:
        run.wait()
    return output


def assert_equal(left: Path, right: Path) -> None:
    """Compare weights, moving average, optimizer, query groups and all losses of two finished runs bit by bit."""
    first, second = training_state(left), training_state(right)
    name = "model/model.safetensors"
    assert first[name] == second[name]
    assert_same(*(torch.load(io.BytesIO(each["training.pt"])) for each in (first, second)), "training.pt")
    assert losses(left) == losses(right)
    assert sorted(losses(left)) == list(range(STEPS))


def assert_same(left: Any, right: Any, where: str) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key, value in left.items():
            assert_same(value, right[key], f"{where}.{key}")
    elif isinstance(left, list):
        for number, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{where}.{number}")
    else:
        assert left == right, where


def test_a_run_that_was_killed_and_then_stopped_by_its_time_limit_is_bitwise_identical(
    case: tuple[int, list[str]], uninterrupted: Path, train_data: str, tmp_path: Path
) -> None:
    """The driver is killed, and Ray with it. The second start reaches its time limit immediately, the third finishes."""
    output, (workers, flags) = tmp_path / "run", case
    with start(train_data, output, *flags) as run:
        run.reach(10, workers)
        run.driver.send_signal(signal.SIGKILL)
        run.driver.wait()
    assert checkpoint.last_committed_step(str(output)) == 7
    with start(train_data, output, *flags, "--max-hours", "0.001") as run:
        log = run.wait(status=75)
    done = checkpoint.last_committed_step(str(output))
    assert 7 < done < STEPS
    assert f"step {done} of {STEPS} is committed. Rerun the command to resume." in log
    assert "Traceback" not in driver_lines(log)
    with start(train_data, output, *flags) as run:
        run.wait()
    assert_equal(output, uninterrupted)
    steps, lost = received(output / "records")
    assert steps == received(uninterrupted / "records")[0]
    assert [each.first for each in attempts(output / "records")] == [0, 7, done]
    print(
        f"{workers} workers, driver killed in step 10, time limit at step {done}: {sum(lost)} steps lost in total"
    )
