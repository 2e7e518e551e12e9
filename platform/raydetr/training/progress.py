"""Report progress: periodic console lines, and metrics sent to MLflow when their checkpoint is committed."""

import contextlib
import resource
import sys
import time
from collections.abc import Sequence

import torch

from raydetr.data.stream.micro_batch import TrainingBatch
from raydetr.errors import RegistryError
from raydetr.registry import tracking
from raydetr.training.checkpoint import History, Row
from raydetr.training.config import TrainConfig

LINE_EVERY_S = 5.0
_MAX_INTERVAL_S = 60.0
RESEND_S = 300.0
"""A resumed run resends the metrics of this many seconds, since an MLflow server restored from a backup lacks what came
after it. platform/deploy/mlflow_server.py backs its database up every minute."""

"""Step, Unix time in milliseconds, metrics."""


class Progress:
    """Collects the metrics since the last checkpoint, and measures speed.

    Metrics are sent once the checkpoint of their steps is complete, so a step that is repeated after a failure appears
    once. They are also stored in the checkpoint, together with those sent in the last minutes. A resumed run sends them
    again; MLflow stores values with equal step and time once. An MLflow server that does not answer does not block
    training: its metrics wait for the next checkpoint.

    rank: rank of this worker; only rank 0 prints and sends.
    rows: metrics that were not sent yet.
    waited: seconds spent waiting for data since the last line.
    """

    def __init__(self, config: TrainConfig, run_id: str, rank: int) -> None:
        self.config, self.run_id, self.rank = config, run_id, rank
        self.rows: list[Row] = []
        self._sent: list[Row] = []
        self.waited = 0.0
        self._started, self._earlier_seconds = time.perf_counter(), 0.0
        self._line_at = time.perf_counter()
        self._line_step = -1
        self._line_images = 0.0
        self._line_batches = self._line_remote = 0

    def add(self, metrics: dict[str, float], batches: Sequence[TrainingBatch], remote: int = 0) -> None:
        """Add the metrics of a step, and print a line if one is due.

        Args:
            metrics: metrics of the whole step.
            batches: micro-batches of this worker.
            remote: number of these batches that were decoded on another node.
        """
        step = batches[0].step
        self.rows.append((step, int(time.time() * 1000), metrics))
        for reason in [reason for batch in batches for reason in batch.skipped]:
            log_line(f"step {step}: image {reason}; it is skipped in this step")
        self._line_images += metrics["images"]
        self._line_batches += len(batches)
        self._line_remote += remote
        if self._line_step < 0:  # exclude the first step, which includes one-time setup
            self._restart_line(step)
        elif self.rank == 0 and time.perf_counter() - self._line_at >= self._line_interval():
            self._print_line(step, metrics)

    def restore(self, history: History) -> None:
        """Load the metrics of the checkpoint that the run resumes from, and send them."""
        self.rows = [*history.metrics]
        self._earlier_seconds = history.seconds
        if self.rank == 0 and self.rows:
            self.send()

    def history(self) -> History:
        """Return what the next checkpoint stores: metrics to send, and the seconds of training of all attempts."""
        since = (time.time() - RESEND_S) * 1000
        self._sent = [row for row in self._sent if row[1] >= since]
        seconds = self._earlier_seconds + time.perf_counter() - self._started
        return History((*self._sent, *self.rows), seconds)

    def send(self) -> None:
        """Send the metrics of a complete checkpoint; retain them if MLflow does not answer."""
        if self.run_id:
            try:
                send_rows(self.config.tracking.tracking_uri, self.run_id, self.rows)
            except RegistryError as error:
                log_line(
                    f"{error} The metrics of {len(self.rows)} steps are stored in the checkpoint until it does."
                )
                return
        self._sent += self.rows
        self.rows = []

    def _line_interval(self) -> float:
        """Return the seconds between two lines: a tenth of the elapsed time, between 5 s and a minute."""
        running = time.perf_counter() - self._started
        return max(LINE_EVERY_S, min(running / 10, _MAX_INTERVAL_S))

    def _print_line(self, step: int, metrics: dict[str, float]) -> None:
        elapsed = time.perf_counter() - self._line_at
        left = (self.config.optimizer.steps - step - 1) * elapsed / max(step - self._line_step, 1)
        metrics["images_per_second"] = self._line_images / elapsed
        metrics["data_wait_share"] = self.waited / elapsed
        metrics["remote_batches_share"] = self._line_remote / max(self._line_batches, 1)
        metrics |= resource_usage()
        log_line(
            f"step {step + 1}/{self.config.optimizer.steps}  loss {metrics['loss']:.3f}  "
            f"{metrics['images_per_second']:.1f} images/s  data wait {metrics['data_wait_share']:.0%}  "
            f"{metrics['memory_gib']:.1f} GiB  {int(left) // 60}:{int(left) % 60:02d} left"
        )
        self._restart_line(step)

    def _restart_line(self, step: int) -> None:
        self._line_at, self._line_step, self._line_images, self.waited = time.perf_counter(), step, 0.0, 0.0
        self._line_batches = self._line_remote = 0


def send_rows(uri: str, run_id: str, rows: Sequence[Row]) -> None:
    """Log rows to MLflow with their own timestamps.

    Raises:
        RegistryError: MLflow does not answer, or rejects the metrics.
    """
    if rows:
        require_mlflow(uri)
        tracking.log_metrics(
            uri, run_id, [(step, values) for step, _, values in rows], [at for _, at, _ in rows]
        )


def require_mlflow(uri: str) -> None:
    """Check that an MLflow server answers: MLflow's client would retry for minutes while all workers wait.

    Raises:
        RegistryError: the server does not answer.
    """
    if uri.startswith(("http://", "https://")):
        tracking.resolve_uri(uri)


def resource_usage() -> dict[str, float]:
    """Return the peak memory of this process and of its GPU, if any, in GiB, and the GPU utilization from 0 to 1."""
    usage = {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        usage["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        with contextlib.suppress(Exception):  # NVML raises different errors if the driver does not report it
            usage["gpu_utilization"] = torch.cuda.utilization() / 100
    return usage


def log_line(line: str) -> None:
    """Print a line to stdout.

    Does not use `print`: Ray Train replaces it with a version that prints every line twice on a local cluster.
    """
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
