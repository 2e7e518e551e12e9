"""Processes are killed with SIGKILL at random moments: the run finishes, and no record is lost, repeated or changed."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from raydetr.data.shards import Manifest
from raydetr.data.stream import ray_stream
from raydetr.training import checkpoint
from raydetr.training.run import plan_spec
from tests.awkward import write_awkward
from tests.cluster.fault_runs import losses, received, start
from tests.cluster.recorded_training import config

SEED = random.SystemRandom().randrange(10**6)
STEPS_PER_KILL = 20
DRIVER_KILLS = 10

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def check_complete(manifest: Manifest, output: Path, steps: int) -> list[int]:
    """Check that the run is complete; return the number of steps that each new group of workers repeated."""
    final, lost = received(output / "records")
    assert sorted(final) == sorted(losses(output)) == list(range(steps))
    assert checkpoint.last_committed_step(str(output)) == steps
    plan = ray_stream.build_plan(manifest, plan_spec(config(manifest.root, str(output))))
    for epoch in range(steps // plan.steps_per_epoch):
        first = epoch * plan.steps_per_epoch
        ids = [i for step in range(first, first + plan.steps_per_epoch) for i, _, _ in final[step]]
        assert len(ids) == len(set(ids)) == manifest.num_images - 2, "two images have no pixels"
    return lost


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.nightly)])
def test_a_run_survives_killed_workers(kills: int, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    manifest, output, steps = write_awkward(tmp_path / "data"), tmp_path / "run", STEPS_PER_KILL * kills
    killed = []
    with start(manifest.root, output, "--steps", str(steps)) as run:
        for number in range(kills):
            run.reach(int(rng.uniform(number, number + 0.9) * steps / kills))
            time.sleep(rng.uniform(0, 0.2))
            victim = rng.choice(sorted(run.alive()))
            killed.append(run.alive()[victim])
            os.kill(victim, signal.SIGKILL)
            run.until(lambda gone=victim: gone not in run.alive(), "the worker to be gone")  # type: ignore[misc]
        run.wait()
    lost = check_complete(manifest, output, steps)
    assert len(lost) == kills
    print(f"workers (rank, step) killed: {killed}; steps lost {lost}, {sum(lost)} in total")


@pytest.mark.nightly
def test_a_run_survives_killed_drivers(tmp_path: Path) -> None:
    """Kill drivers at a random step or a random moment of the start; Ray is killed with them."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    manifest, output, steps = write_awkward(tmp_path / "data"), tmp_path / "run", 100
    moments = []
    for number in range(DRIVER_KILLS):
        with start(manifest.root, output, "--steps", str(steps)) as run:
            if rng.random() < 0.3:
                seconds = rng.uniform(0, 20)
                time.sleep(seconds)
                moments.append(f"after {seconds:.0f} s")
            else:
                done = checkpoint.last_committed_step(str(output)) if output.exists() else 0
                run.reach(done + rng.randrange(steps // DRIVER_KILLS))
                moments.append(f"in step {run.step()}")
            assert run.driver.poll() is None, f"it exited before kill {number}"
            run.driver.send_signal(signal.SIGKILL)
            run.driver.wait()
    with start(manifest.root, output, "--steps", str(steps)) as run:
        run.wait()
    print(f"drivers killed {', '.join(moments)}; steps lost {check_complete(manifest, output, steps)}")
