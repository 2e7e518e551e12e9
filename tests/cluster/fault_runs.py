"""Start training runs as separate processes for fault injection, and read their records afterwards."""

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
    """A run: its folder, its log and the process of its driver."""

    output: Path
    driver: subprocess.Popen[bytes]
    log: Path

    @property
    def records(self) -> Path:
        """Folder in which workers record what their models receive."""
        return self.output / "records"

    def wait(self, status: int = 0, seconds: float = 600) -> str:
        """Wait for the driver to exit with `status`, and return its log."""
        actual = self.driver.wait(seconds)
        log = self.log.read_text()
        assert actual == status, f"exit status {actual}: {log[-6000:]}"
        return log

    def until(self, holds: Callable[[], bool], what: str, seconds: float = 900) -> None:
        """Wait for a condition while the driver runs."""
        end = time.monotonic() + seconds
        while not holds():
            assert self.driver.poll() is None, f"exited before {what}: {self.log.read_text()[-6000:]}"
            assert time.monotonic() < end, f"timeout waiting for {what}: {self.log.read_text()[-6000:]}"
            time.sleep(0.02)

    def alive(self) -> dict[int, tuple[int, int]]:
        """Return process id → (rank, step) of the live workers that have started a step."""
        workers = {}
        for file in self.records.glob("*.jsonl") if self.records.is_dir() else ():
            if Path(f"/proc/{file.stem}").exists() and (rows := training_record.read(file)):
                workers[int(file.stem)] = rows[-1]["rank"], rows[-1]["step"]
        return workers

    def step(self) -> int:
        """Return the step of the slowest live worker; -1 without workers."""
        return min((step for _, step in self.alive().values()), default=-1)

    def reach(self, step: int, workers: int = 2) -> None:
        """Wait until all workers have reached a step."""
        self.until(lambda: len(self.alive()) == workers and self.step() >= step, f"step {step}")


def environment(output: Path) -> dict[str, str]:
    """Return the environment variables for a driver, and for the Ray that it uses."""
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
        "RECORDS": str(output / "records"),
        "RAY_DEDUP_LOGS": "0",
    }


def driver_lines(log: str) -> str:
    """Return the lines of a log that the driver printed, without those of Ray and its workers."""
    return "\n".join(line for line in log.splitlines() if not line.startswith(("\x1b[36m(", "(")))


@contextlib.contextmanager
def start(
    train_data: str, output: Path, *flags: str, env: Mapping[str, str] | None = None, log: Path | None = None
) -> Iterator[Run]:
    """Run a driver; kill it, and the Ray it started, at the end of the block.

    Args:
        train_data: shards to train on.
        output: folder of the run and its records.
        flags: further flags; the last of repeated flags wins.
        env: variables to add to the environment.
        log: file to append the output to; None: a file next to `output`.
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
        while run.alive() and time.monotonic() < end:  # workers exit when their Ray is gone
            time.sleep(0.1)
        for process in run.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@dataclass
class Attempt:
    """The steps of one group of workers, from one start of Ray Train to the next.

    steps: step → (image id, checksum of boxes, checksum of pixels) of its images, unordered.
    started: time.time() of its first forward pass.
    processes: rank → process id.
    """

    steps: dict[int, Images]
    started: float
    processes: dict[int, int]

    @property
    def first(self) -> int:
        """The step from which it continued."""
        return min(self.steps)


def attempts(records: Path) -> list[Attempt]:
    """List the attempts in order of time. A worker process belongs to one attempt only."""
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
    """Return step → its images, sorted, in the last attempt; and how many steps each new attempt repeated.

    A repeated step must have received the same images, or a part of them if the earlier attempt was killed within it.
    """
    final: dict[int, Images] = {}
    lost = []
    for attempt in attempts(records):
        repeated = [step for step in attempt.steps if step in final]
        lost.append(len(repeated))
        for step in repeated:
            assert set(final[step]) <= set(attempt.steps[step]), (
                f"step {step} received other records or pixels"
            )
        final |= {step: sorted(images) for step, images in attempt.steps.items()}
    return final, lost[1:]


def run_id(output: Path) -> str:
    return str(json.loads((output / "run.json").read_text())["run_id"])


def losses(output: Path, uri: str = "") -> dict[int, float]:
    """Return step → loss from MLflow, which must have a single run with one value per step."""
    uri = uri or f"sqlite:///{output}/mlflow.db"
    client = tracking.client(uri)
    experiment = client.get_experiment_by_name("training")
    assert len(client.search_runs([experiment.experiment_id])) == 1
    history = client.get_metric_history(run_id(output), "loss")
    values = {metric.step: metric.value for metric in history}
    assert len(history) == len(values), "a step has two values"
    return values


def training_state(output: Path) -> dict[str, bytes]:
    """Return the files of weights and optimizer state of the last checkpoint, by name."""
    folder = Path(checkpoint.uri(str(output), checkpoint.last_committed_step(str(output))))
    return {name: (folder / name).read_bytes() for name in ("training.pt", "model/model.safetensors")}
