"""Workers killed with SIGKILL at random moments: the run recovers, and no record is lost, repeated or changed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raydetr.data import stream
from raydetr.data.shards import Manifest
from raydetr.registry import tracking
from raydetr.training import checkpoint
from raydetr.training.trainer import plan_spec
from tests import training_record
from tests.awkward import write_awkward
from tests.cluster.recorded_training import STEPS, config

ROOT = Path(__file__).parents[2]
KILLS = 3
SEED = random.SystemRandom().randrange(10**6)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

Images = list[tuple[int, str, str]]


def attempts(records: Path) -> list[dict[int, Images]]:
    """What the workers of each attempt received by step, attempts in order of time."""
    files = sorted(records.glob("*.jsonl"), key=lambda file: file.stat().st_ctime_ns)
    ranks: dict[int, int] = {}
    result: list[dict[int, Images]] = []
    for file in sorted(files, key=lambda file: int(file.stem)):  # process ids rise with time
        rows = training_record.read(file)
        if not rows:
            continue
        rank = rows[0]["rank"]
        number = ranks[rank] = ranks.get(rank, -1) + 1
        while len(result) <= number:
            result.append({})
        for row in rows:
            images = result[number].setdefault(row["step"], [])
            images += [(i["image_id"], i["boxes"], i["pixels"]) for i in row["images"]]
    return result


def test_training_survives_three_kills_exactly(tmp_path: Path) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    manifest = write_awkward(tmp_path / "data")
    output = tmp_path / "run"
    log = tmp_path / "log"
    with log.open("w") as out:
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.recorded_training", manifest.root, str(output)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    killed = []
    try:
        for number in range(KILLS):
            # A moment somewhere in each third of the run.
            wanted = rng.uniform(number, number + 0.9) * STEPS / KILLS
            while driver.poll() is None:
                alive = running(output / "records")
                if len(alive) == 2 and min(alive.values()) >= wanted:
                    break
                time.sleep(0.01)
            assert driver.poll() is None, "the run ended before all kills: " + log.read_text()[-3000:]
            time.sleep(rng.uniform(0, 0.2))
            victim = rng.choice(sorted(alive))
            os.kill(victim, signal.SIGKILL)
            killed.append((victim, alive[victim]))
            print(f"killed worker {victim} in step {alive[victim]}")
        assert driver.wait(600) == 0, log.read_text()[-3000:]
    finally:
        driver.kill()
        driver.wait()
    assert len({victim for victim, _ in killed}) == KILLS

    runs = [run for run in attempts(output / "records") if run]
    assert len(runs) == KILLS + 1
    final: dict[int, Images] = {}
    redone = 0
    for run in runs:
        for step, images in run.items():
            before = final.get(step)
            if before is not None:
                redone += 1
                # The earlier attempt may have been killed within the step: what it saw is part of the same.
                assert set(before) <= set(images), (
                    f"step {step} saw other records or pixels when it was redone"
                )
            final[step] = images
    print(f"{redone} steps were done again")
    assert sorted(final) == list(range(STEPS))
    settings = config(manifest.root, str(output))
    plan = stream.build_plan(Manifest.load(manifest.root), plan_spec(settings))
    for epoch in range(STEPS // plan.steps_per_epoch):
        first = epoch * plan.steps_per_epoch
        ids = [i for step in range(first, first + plan.steps_per_epoch) for i, _, _ in final[step]]
        assert len(ids) == len(set(ids)) == manifest.num_images - 2, "two images have no pixels"
    assert checkpoint.last_committed_step(str(output)) == STEPS
    run_id = tracking.start_run(settings.tracking_uri, "training", "run", {}, {}, run_id_of(output))
    history = tracking.metric_history(settings.tracking_uri, run_id, "loss")
    assert [step for step, _ in history] == list(range(STEPS)), "MLflow holds one loss a step"


def running(records: Path) -> dict[int, int]:
    """Process id → step, of the workers that are alive."""
    alive = {}
    for file in records.glob("*.jsonl") if records.is_dir() else ():
        if Path(f"/proc/{file.stem}").exists() and (rows := training_record.read(file)):
            alive[int(file.stem)] = rows[-1]["step"]
    return alive


def run_id_of(output: Path) -> str:
    return str(json.loads((output / "run.json").read_text())["run_id"])
