"""What a run tells: a line on the console now and then, and metrics to MLflow when their checkpoint is committed."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from raydetr.config import TrainConfig
from raydetr.data.micro_batch import TrainingBatch
from raydetr.registry import tracking

LINE_EVERY_S = 5.0


class Progress:
    """Metrics of the steps since the last checkpoint, and the speed.

    Metrics are sent when the checkpoint of their steps is complete, so that a step which is done again after a
    failure appears once. Until then they are also kept in the checkpoint: a run that ends between the two sends
    them when it goes on.

    rank: of this worker; only rank 0 prints and sends.
    waited: seconds spent waiting for data since the last line.
    """

    def __init__(self, config: TrainConfig, run_id: str, rank: int) -> None:
        self.config, self.run_id, self.rank = config, run_id, rank
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.waited = 0.0
        self._line_at = time.perf_counter()
        self._line_step = -1
        self._line_images = 0.0

    def add(self, metrics: dict[str, float], batches: Sequence[TrainingBatch]) -> None:
        """Take in the metrics of a step; print the line when it is time."""
        step = batches[0].step
        self.rows.append((step, metrics))
        for reason in [reason for batch in batches for reason in batch.skipped]:
            _say(f"step {step}: image {reason}; it has no weight in this step")
        self._line_images += metrics["images"]
        if self._line_step < 0:  # the first step pays for starting up
            self._restart_line(step)
        elif self.rank == 0 and time.perf_counter() - self._line_at >= LINE_EVERY_S:
            self._print_line(step, metrics)

    def restore(self, metadata: dict[str, Any]) -> None:
        """Send what the checkpoint that is gone on from had not sent."""
        rows = [(int(step), values) for step, values in metadata["metrics"]]
        if self.rank == 0 and self.run_id and rows:
            uri = tracking.resolve_uri(self.config.tracking_uri)
            sent = {step for step, _ in tracking.metric_history(uri, self.run_id, "loss")}
            tracking.log_metrics(uri, self.run_id, [row for row in rows if row[0] not in sent])

    def uncommitted(self) -> dict[str, Any]:
        """The metrics that the next checkpoint stands for, as its metadata."""
        return {"metrics": [[step, values] for step, values in self.rows]}

    def send(self) -> None:
        """Send the metrics of a checkpoint that is complete."""
        if self.run_id:
            tracking.log_metrics(tracking.resolve_uri(self.config.tracking_uri), self.run_id, self.rows)
        self.rows = []

    def _print_line(self, step: int, metrics: dict[str, float]) -> None:
        elapsed = time.perf_counter() - self._line_at
        left = (self.config.steps - step - 1) * elapsed / max(step - self._line_step, 1)
        metrics["images_per_second"] = self._line_images / elapsed
        metrics["data_wait_share"] = self.waited / elapsed
        _say(
            f"step {step + 1}/{self.config.steps}  loss {metrics['loss']:.3f}  "
            f"{metrics['images_per_second']:.1f} images/s  data wait {metrics['data_wait_share']:.0%}  "
            f"{int(left) // 60}:{int(left) % 60:02d} left"
        )
        self._restart_line(step)

    def _restart_line(self, step: int) -> None:
        self._line_at, self._line_step, self._line_images, self.waited = time.perf_counter(), step, 0.0, 0.0


def _say(line: str) -> None:
    # Not `print`: Ray Train replaces it with one that shows every line twice on a local cluster.
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
