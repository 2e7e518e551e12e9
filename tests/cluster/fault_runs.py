"""Training runs as processes of their own, to be harmed while they run, and what is read of them afterwards."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from raydetr.registry import tracking
from raydetr.training import checkpoint
from tests import training_record

ROOT = Path(__file__).parents[2]
Images = list[tuple[int, str, str]]


@dataclass
class Run:
    """A run's folder, its log and the driver that works on it."""

    output: Path
    driver: subprocess.Popen[bytes]
    log: Path

    @property
    def records(self) -> Path:
        """Where its workers write what their models receive."""
        return self.output / "records"

    def wait(self, status: int = 0, seconds: float = 600) -> str:
        """The log of a driver that ended with `status`."""
        ended = self.driver.wait(seconds)
        log = self.log.read_text()
        assert ended == status, f"exit status {ended}: {log[-6000:]}"
        return log

    def until(self, holds: Callable[[], bool], what: str, seconds: float = 900) -> None:
        """Wait for something while the driver runs."""
        end = time.monotonic() + seconds
        while not holds():
            assert self.driver.poll() is None, f"ended before {what}: {self.log.read_text()[-6000:]}"
            assert time.monotonic() < end, f"never {what}: {self.log.read_text()[-6000:]}"
            time.sleep(0.02)

    def alive(self) -> dict[int, tuple[int, int]]:
        """Process id → (rank, step), of the workers that are alive and have begun a step."""
        found = {}
        for file in self.records.glob("*.jsonl") if self.records.is_dir() else ():
            if Path(f"/proc/{file.stem}").exists() and (rows := training_record.read(file)):
                found[int(file.stem)] = rows[-1]["rank"], rows[-1]["step"]
        return found

    def step(self) -> int:
        """The step that the slowest living worker is in; -1 before all of the run are there."""
        return min((step for _, step in self.alive().values()), default=-1)

    def reach(self, step: int, workers: int = 2) -> None:
        """Wait until all workers are at least in a step."""
        self.until(lambda: len(self.alive()) == workers and self.step() >= step, f"step {step}")


def environment(output: Path) -> dict[str, str]:
    """What a driver, and the Ray it works on, must be started with."""
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
        "RECORDS": str(output / "records"),
        "RAY_DEDUP_LOGS": "0",
    }


def of_driver(log: str) -> str:
    """A log without what the processes of the cluster print, Ray's own among them."""
    return "\n".join(line for line in log.splitlines() if not line.startswith(("\x1b[36m(", "(")))


@contextlib.contextmanager
def start(
    train_data: str, output: Path, *flags: str, env: Mapping[str, str] | None = None, log: Path | None = None
) -> Iterator[Run]:
    """A driver at work; it is killed, with the Ray it started, when the block ends.

    Args:
        train_data: shards.
        output: of the run, and of what it records.
        flags: further ones, the last of equals counts.
        env: to add to the environment.
        log: file to append to; None: beside `output`.
    """
    log = log or output.with_name(f"{output.name}.log")
    with log.open("ab") as out:
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.recorded_training", train_data, str(output), *flags],
            cwd=ROOT,
            env={**environment(output), **(env or {})},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    run = Run(output, driver, log)
    try:
        yield run
    finally:
        driver.kill()
        driver.wait()
        end = time.monotonic() + 60
        while run.alive() and time.monotonic() < end:  # they notice that their Ray is gone
            time.sleep(0.1)
        for process in run.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@dataclass
class Attempt:
    """What one group of workers received.

    steps: step → (image id, checksum of boxes, checksum of pixels) of its images, unordered.
    begun: when its first forward pass began, time.time().
    processes: rank → process id.
    """

    steps: dict[int, Images]
    begun: float
    processes: dict[int, int]

    @property
    def first(self) -> int:
        """The step it went on from."""
        return min(self.steps)


def attempts(records: Path) -> list[Attempt]:
    """Attempts in order of time. A worker's process is never used for a second one."""
    rows = [(row, int(file.stem)) for file in records.glob("*.jsonl") for row in training_record.read(file)]
    result: list[Attempt] = []
    for row, process in sorted(rows, key=lambda each: each[0]["time"]):
        rank, step = row["rank"], row["step"]
        known = result[-1].processes.get(rank) if result else None
        if known != process and (known is not None or not result or step > min(result[-1].steps)):
            result.append(Attempt({}, row["time"], {}))
        last = result[-1]
        last.processes[rank] = process
        last.steps.setdefault(step, []).extend(
            (image["image_id"], image["boxes"], image["pixels"]) for image in row["images"]
        )
    return result


def received(records: Path) -> tuple[dict[int, Images], list[int]]:
    """Step → its images, sorted, as they counted in the end; and how many steps each new attempt did again.

    A step that was done again must have got the same images: an attempt that was killed within it, a part of them.
    """
    final: dict[int, Images] = {}
    lost = []
    for attempt in attempts(records):
        again = [step for step in attempt.steps if step in final]
        lost.append(len(again))
        for step in again:
            assert set(final[step]) <= set(attempt.steps[step]), f"step {step} got other records or pixels"
        final |= {step: sorted(images) for step, images in attempt.steps.items()}
    return final, lost[1:]


def run_id(output: Path) -> str:
    return str(json.loads((output / "run.json").read_text())["run_id"])


def losses(output: Path, uri: str = "") -> dict[int, float]:
    """Step → loss in MLflow, which must hold one value a step of one run."""
    uri = uri or f"sqlite:///{output}/mlflow.db"
    client = tracking.client(uri)
    experiment = client.get_experiment_by_name("training")
    assert len(client.search_runs([experiment.experiment_id])) == 1
    history = client.get_metric_history(run_id(output), "loss")
    values = {metric.step: metric.value for metric in history}
    assert len(history) == len(values), "a step has two values"
    return values


def training_state(output: Path) -> dict[str, bytes]:
    """Files of the last checkpoint that hold numbers, by name."""
    folder = Path(checkpoint.address(str(output), checkpoint.last_committed_step(str(output))))
    return {name: (folder / name).read_bytes() for name in ("training.pt", "model/model.safetensors")}
