"""A run that was cut off and resumed is, bit by bit, the run that was not."""

import io
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from raydetr.training import checkpoint
from tests.awkward import write_awkward
from tests.cluster.fault_runs import attempts, losses, of_driver, received, start, training_state

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
    """Number of workers, and all flags."""
    workers, flags = request.param
    return workers, [*FLAGS, *flags.split(), "--workers", str(workers)]


@pytest.fixture(scope="module")
def whole(case: tuple[int, list[str]], train_data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "run"
    with start(train_data, output, *case[1]) as run:
        run.wait()
    return output


def assert_equal(left: Path, right: Path) -> None:
    """Weights, moving average, optimiser, query groups and all losses of two finished runs, to the bit."""
    mine, theirs = training_state(left), training_state(right)
    name = "model/model.safetensors"
    assert mine[name] == theirs[name]
    assert_same(*(torch.load(io.BytesIO(each["training.pt"])) for each in (mine, theirs)), "training.pt")
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


def test_a_run_that_is_killed_and_then_has_no_time_left_computes_the_same_to_the_bit(
    case: tuple[int, list[str]], whole: Path, train_data: str, tmp_path: Path
) -> None:
    """Its driver, and with it Ray, is killed; started again, its time is up at once; a third start ends it."""
    output, undisturbed, (workers, flags) = tmp_path / "run", whole, case
    with start(train_data, output, *flags) as run:
        run.reach(10, workers)
        run.driver.send_signal(signal.SIGKILL)
        run.driver.wait()
    assert checkpoint.last_committed_step(str(output)) == 7
    with start(train_data, output, *flags, "--max-hours", "0.001") as run:
        log = run.wait(status=75)
    done = checkpoint.last_committed_step(str(output))
    assert 7 < done < STEPS
    assert f"step {done} of {STEPS} is committed. The same command goes on." in log
    assert "Traceback" not in of_driver(log)
    with start(train_data, output, *flags) as run:
        run.wait()
    assert_equal(output, undisturbed)
    steps, lost = received(output / "records")
    assert steps == received(undisturbed / "records")[0]
    assert [each.first for each in attempts(output / "records")] == [0, 7, done]
    print(
        f"{workers} workers, driver killed in step 10, time up at step {done}: {sum(lost)} steps lost in all"
    )
