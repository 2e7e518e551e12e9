"""What a run tells: a line on the console now and then, and metrics to MLflow when their checkpoint is committed."""

import contextlib
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from raydetr.data.stream.micro_batch import TrainingBatch
from raydetr.errors import RegistryError
from raydetr.registry import tracking
from raydetr.training.config import TrainConfig

LINE_EVERY_S = 5.0
_LONGEST_PAUSE_S = 60.0
RESEND_S = 300.0
"""A new MLflow server that goes on from a copy of the database lacks what came after it: so much is sent again when a
run goes on. The copies of platform/deploy/mlflow_server.py are a minute apart."""

Row = tuple[int, int, dict[str, float]]
"""Step, time in milliseconds since 1970, metrics."""


class Progress:
    """Metrics of the steps since the last checkpoint, and the speed.

    Metrics are sent when the checkpoint of their steps is complete, so that a step which is done again after a
    failure appears once. They are also kept in the checkpoint, with those sent in the last minutes: a run that goes
    on sends them, and what is sent twice with the same times is there once. A server that does not answer holds
    nothing up: its metrics wait for the next checkpoint.

    rank: of this worker; only rank 0 prints and sends.
    rows: metrics that were not sent.
    waited: seconds spent waiting for data since the last line.
    """

    def __init__(self, config: TrainConfig, run_id: str, rank: int) -> None:
        self.config, self.run_id, self.rank = config, run_id, rank
        self.rows: list[Row] = []
        self._sent: list[Row] = []
        self.waited = 0.0
        self._began, self._earlier = time.perf_counter(), 0.0
        self._line_at = time.perf_counter()
        self._line_step = -1
        self._line_images = 0.0
        self._line_batches = self._line_remote = 0

    def add(self, metrics: dict[str, float], batches: Sequence[TrainingBatch], remote: int = 0) -> None:
        """Take in the metrics of a step; print the line when it is time.

        Args:
            metrics: of the whole step.
            batches: of this worker.
            remote: how many of them were decoded on another node.
        """
        step = batches[0].step
        self.rows.append((step, int(time.time() * 1000), metrics))
        for reason in [reason for batch in batches for reason in batch.skipped]:
            log_line(f"step {step}: image {reason}; it has no weight in this step")
        self._line_images += metrics["images"]
        self._line_batches += len(batches)
        self._line_remote += remote
        if self._line_step < 0:  # the first step pays for starting up
            self._restart_line(step)
        elif self.rank == 0 and time.perf_counter() - self._line_at >= self._pause():
            self._print_line(step, metrics)

    def restore(self, metadata: dict[str, Any]) -> None:
        """Take over the metrics of the checkpoint that is gone on from, and send them."""
        self.rows = [(int(step), int(at), values) for step, at, values in metadata["metrics"]]
        self._earlier = float(metadata.get("seconds", 0.0))
        if self.rank == 0 and self.rows:
            self.send()

    def uncommitted(self) -> dict[str, Any]:
        """What whoever goes on from the next checkpoint needs: metrics to send, seconds of work of all attempts."""
        since = (time.time() - RESEND_S) * 1000
        self._sent = [row for row in self._sent if row[1] >= since]
        return {
            "metrics": [list(row) for row in (*self._sent, *self.rows)],
            "seconds": self._earlier + time.perf_counter() - self._began,
        }

    def send(self) -> None:
        """Send the metrics of a checkpoint that is complete; where MLflow does not answer, they are kept."""
        if self.run_id:
            try:
                send_rows(self.config.tracking_uri, self.run_id, self.rows)
            except RegistryError as error:
                log_line(
                    f"{error} The metrics of {len(self.rows)} steps are kept in the checkpoint until it does."
                )
                return
        self._sent += self.rows
        self.rows = []

    def _pause(self) -> float:
        """Seconds between two lines: a tenth of the time so far, so that a long run prints one a minute."""
        running = time.perf_counter() - self._began
        return max(LINE_EVERY_S, min(running / 10, _LONGEST_PAUSE_S))

    def _print_line(self, step: int, metrics: dict[str, float]) -> None:
        elapsed = time.perf_counter() - self._line_at
        left = (self.config.steps - step - 1) * elapsed / max(step - self._line_step, 1)
        metrics["images_per_second"] = self._line_images / elapsed
        metrics["data_wait_share"] = self.waited / elapsed
        metrics["remote_batches_share"] = self._line_remote / max(self._line_batches, 1)
        metrics |= usage()
        log_line(
            f"step {step + 1}/{self.config.steps}  loss {metrics['loss']:.3f}  "
            f"{metrics['images_per_second']:.1f} images/s  data wait {metrics['data_wait_share']:.0%}  "
            f"{metrics['memory_gib']:.1f} GiB  {int(left) // 60}:{int(left) % 60:02d} left"
        )
        self._restart_line(step)

    def _restart_line(self, step: int) -> None:
        self._line_at, self._line_step, self._line_images, self.waited = time.perf_counter(), step, 0.0, 0.0
        self._line_batches = self._line_remote = 0


def send_rows(uri: str, run_id: str, rows: Sequence[Row]) -> None:
    """Log rows with their own times.

    Raises:
        RegistryError: MLflow does not answer, or refuses.
    """
    if rows:
        require_answer(uri)
        tracking.log_metrics(
            uri, run_id, [(step, values) for step, _, values in rows], [at for _, at, _ in rows]
        )


def require_answer(uri: str) -> None:
    """Ask an MLflow server whether it is there: its client would try again for minutes, in which all workers wait.

    Raises:
        RegistryError: it does not answer.
    """
    if uri.startswith(("http://", "https://")):
        tracking.resolve_uri(uri)


def usage() -> dict[str, float]:
    """Peak memory of this process, and of its GPU where there is one, in GiB; the share of time the GPU is busy."""
    found = {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        found["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        with contextlib.suppress(Exception):  # whatever NVML raises where the driver does not tell
            found["gpu_utilization"] = torch.cuda.utilization() / 100
    return found


def log_line(line: str) -> None:
    """Print a line.

    Not by `print`: Ray Train replaces it with one that shows every line twice on a local cluster.
    """
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
