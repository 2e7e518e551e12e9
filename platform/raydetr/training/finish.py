"""Finish a run: write its model, send its last metrics, register the model version."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import tenacity

from detr import DetrForObjectDetection, DetrForSegmentation
from detr.checkpoint.load_save import save_model
from raydetr import storage
from raydetr.data.shards import Manifest
from raydetr.errors import RegistryError, TrainingError
from raydetr.registry import models, tracking
from raydetr.registry.tags import CHOSEN_ON_TAG, TRAINED_ON_TAG
from raydetr.results.summary import TrainingSummary
from raydetr.training import checkpoint, validation
from raydetr.training.config import TrainConfig
from raydetr.training.progress import log_line, send_rows

MODEL = "model"
MLFLOW_RETRY_S = 300.0
"""How long the end of a run retries while the MLflow server does not answer."""

Result = TypeVar("Result")


def finish(config: TrainConfig, manifest: Manifest, run_id: str, seconds: float) -> TrainingSummary:
    """Write the final model, register it, end the MLflow run, and return the summary.

    Raises:
        TrainingError: no image was trained on.
        RegistryError: MLflow has not answered for five minutes; rerun the command to repeat this part.
    """
    last = checkpoint.last_committed_step(config.run.output)
    best = validation.best_checkpoint(config) if config.checkpoints.validate_every else None
    chosen = best if config.checkpoints.keep_best and best is not None else last
    counts, history = checkpoint.read_state(config.run.output, last)
    if not counts.images:
        raise TrainingError(
            f"{config.run.output}: no image was trained on in {last} steps, so no model is registered: check "
            f"faults.parquet in {config.data.train_data}."
        )
    retry_mlflow(lambda: send_unsent_metrics(config, run_id, last))
    losses = tracking.metric_history(config.tracking.tracking_uri, run_id, "loss")
    metrics = checkpoint.read_validation(config.run.output, chosen) or {}
    summary = TrainingSummary(
        run_id=run_id,
        steps=last,
        model_step=chosen,
        images=counts.images,
        non_finite=counts.non_finite,
        skipped_images=counts.skipped,
        seconds=seconds,
        images_per_second=counts.images / (history.seconds or seconds),
        first_loss=_mean([value for _, value in losses[:20]]),
        last_loss=_mean([value for _, value in losses[-20:]]),
        data_digest=manifest.digest,
        model_folder=storage.join(config.run.output, MODEL),
        validation={f"val_{name}": value for name, value in metrics.items()},
    )
    tags = {TRAINED_ON_TAG: manifest.digest}
    if best is not None and (config.checkpoints.keep_best or config.checkpoints.patience):
        # Data that selected the checkpoint or stopped the run must not decide a promotion: the gate reads this tag.
        tags[CHOSEN_ON_TAG] = Manifest.load(config.validation.val_data).digest
    losses_of_card = {"first_loss": summary.first_loss, "last_loss": summary.last_loss}
    known: dict[str, float] = {"steps": last, "images": summary.images}
    known |= {name: value for name, value in losses_of_card.items() if value is not None}
    known |= summary.validation
    with tempfile.TemporaryDirectory() as folder:
        source = storage.join(checkpoint.uri(config.run.output, chosen), "model")
        storage.download_folder(source, folder)
        kind = DetrForSegmentation if config.run.segments else DetrForObjectDetection
        save_model(kind.from_pretrained(folder).float(), folder)
        storage.upload_folder(folder, summary.model_folder)
        if config.tracking.name:
            version = retry_mlflow(
                lambda: models.register(
                    config.tracking.tracking_uri,
                    run_id,
                    folder,
                    config.tracking.name,
                    alias="challenger",
                    tags=tags,
                    metrics=known,
                )
            )
            summary = replace(
                summary, model=f"models:/{config.tracking.name}/{version}", model_version=version
            )
    retry_mlflow(lambda: tracking.end_run(config.tracking.tracking_uri, run_id))
    return summary


def send_unsent_metrics(config: TrainConfig, run_id: str, last: int) -> None:
    """Send the metrics that MLflow has not received during training; they are stored with the run."""
    _, history = checkpoint.read_state(config.run.output, last)
    send_rows(config.tracking.tracking_uri, run_id, history.metrics)
    name = validation.main_metric(config)
    sent = {step for step, _ in tracking.metric_history(config.tracking.tracking_uri, run_id, f"val_{name}")}
    for step in checkpoint.validated_steps(config.run.output):
        metrics = checkpoint.read_validation(config.run.output, step)
        if metrics and step not in sent:
            values = {f"val_{key}": value for key, value in metrics.items()}
            tracking.log_metrics(config.tracking.tracking_uri, run_id, [(step, values)])


def retry_mlflow(action: Callable[[], Result]) -> Result:
    """Run an MLflow action; retry it for `MLFLOW_RETRY_S` while MLflow does not answer."""
    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(RegistryError),
        wait=tenacity.wait_fixed(5),
        stop=tenacity.stop_after_delay(MLFLOW_RETRY_S),
        before_sleep=lambda state: log_line(f"{state.outcome.exception()} Retrying in 5 s."),  # type: ignore[union-attr]
        reraise=True,
    )
    return attempts(action)


def _mean(values: list[float]) -> float | None:
    """Average the finite values (a skipped step has a non-finite loss); None if there are none."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else None
