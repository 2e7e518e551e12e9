"""Validate checkpoints during training; choose the best one, decide on early stopping, prune the others.

Validation runs in the background, as a Ray task with its own resources that Ray Train starts for a reported checkpoint.
If the cluster has no free resources, it runs between two steps, and each worker scores its share of the images. Both
store the metrics in the run's folder. The best checkpoint and early stopping are computed from these files, so a
resumed run decides as an uninterrupted one. A validation that was lost with its worker or driver is repeated before the
run resumes, and before it finishes.
"""

import contextlib
import os
import tempfile
from typing import Any

import ray
import ray.exceptions
import torch
import torch.distributed as dist

from detr.inference.detector import ObjectDetector
from raydetr import storage
from raydetr.data.shards import Manifest
from raydetr.errors import RegistryError, StorageError
from raydetr.evaluation.in_process import Share, join, predict_share, score_share
from raydetr.flat_keys import override
from raydetr.registry import tracking
from raydetr.reports import run_pictures
from raydetr.training import checkpoint
from raydetr.training.config import TrainConfig
from raydetr.training.distributed import world_size
from raydetr.training.progress import log_line, require_mlflow

SAMPLES = 12
"""Number of images in the contact sheet of predictions."""


def main_metric(config: TrainConfig) -> str:
    """Return the name of the metric that selects the best checkpoint."""
    return {"instance": "mask_AP", "panoptic": "PQ"}.get(config.run.task, "AP")


def validate_checkpoint(config: TrainConfig, run_id: str, step: int) -> dict[str, float]:
    """Score the model of a checkpoint and store its metrics; on failure, log it and store none."""
    device = "cuda" if config.cluster.validation_gpus and torch.cuda.is_available() else "cpu"
    try:
        return _record_metrics(config, run_id, step, _predict(config, step, device))
    except Exception as error:  # training continues after any error
        return _record_failure(config, step, repr(error))


def validate_together(config: TrainConfig, run_id: str, step: int, rank: int, device: torch.device) -> None:
    """Validate a checkpoint between two steps: each worker scores a share of the images, rank 0 stores the metrics."""
    share: Share | str
    try:
        share = _predict(config, step, str(device), rank, world_size())
    except Exception as error:  # gathered as a string: the other ranks wait for this share
        share = f"rank {rank}: {error!r}"
    gathered: list[Any] = [share]
    if world_size() > 1:
        gathered = [None] * world_size()
        dist.all_gather_object(gathered, share)
    if rank:
        return
    failures = [each for each in gathered if isinstance(each, str)]
    try:
        if failures:
            _record_failure(config, step, "; ".join(failures))
        else:
            _record_metrics(config, run_id, step, join(gathered))
    except Exception as error:
        _record_failure(config, step, repr(error))


def _record_failure(config: TrainConfig, step: int, reason: str) -> dict[str, float]:
    """Log a failed validation and store empty metrics, so that it is no longer pending."""
    log_line(f"step {step}: the validation failed: {reason}")
    with contextlib.suppress(StorageError):
        checkpoint.write_validation(config.run.output, step, {})
    return {}


def best_checkpoint(config: TrainConfig) -> int | None:
    """Return the step of the checkpoint with the best main metric, the earliest one of equals; None without metrics.

    A metric of -1 is ignored: it is COCO's value for data without ground truth.
    """
    scores = {}
    for step in checkpoint.committed_steps(config.run.output):
        metrics = checkpoint.read_validation(config.run.output, step)
        if metrics and metrics[main_metric(config)] >= 0:
            scores[step] = metrics[main_metric(config)]
    return max(scores, key=lambda step: (scores[step], -step)) if scores else None


def pending_checkpoints(config: TrainConfig) -> set[int]:
    """Return the steps of checkpoints whose validation is pending.

    A validation counts as lost with its worker, not as pending, once two later ones have finished.
    """
    done = checkpoint.validated_steps(config.run.output)
    return {step for step in unvalidated_checkpoints(config) if sum(other > step for other in done) < 2}


def unvalidated_checkpoints(config: TrainConfig) -> list[int]:
    """List the steps of checkpoints that are due for validation and have no result, ascending."""
    return [
        step
        for step in checkpoint.committed_steps(config.run.output)
        if is_due(config, step) and checkpoint.read_validation(config.run.output, step) is None
    ]


def prune_checkpoints(config: TrainConfig) -> None:
    """Delete checkpoints beyond the retention policy; log it if the storage refuses."""
    try:
        best, pending = best_checkpoint(config), pending_checkpoints(config)
        checkpoint.delete_surplus(config.run.output, config.checkpoints.keep_checkpoints, best, pending)
    except StorageError as failure:
        log_line(f"Earlier checkpoints cannot be deleted: {failure}")


def validate_missing_checkpoints(config: TrainConfig, run_id: str) -> None:
    """Run the validations that were lost, before or after training, with the resources of the run."""
    on_gpu = config.cluster.validation_gpus > 0 or config.cluster.on_gpu
    chosen = override(config, validation_gpus=max(config.cluster.validation_gpus, 1.0)) if on_gpu else config
    task = ray.remote(validate_checkpoint).options(
        num_cpus=config.cluster.validation_cpus, num_gpus=chosen.cluster.validation_gpus
    )
    for step in unvalidated_checkpoints(config):
        log_line(f"step {step}: its validation was lost and is repeated now")
        try:
            ray.get(task.remote(chosen, run_id, step))
        except ray.exceptions.RayError as error:  # the process or the node died
            _record_failure(config, step, repr(error))


def is_due(config: TrainConfig, step: int) -> bool:
    """Return whether the checkpoint of a step is due for validation."""
    if not config.checkpoints.validate_every:
        return False
    return step % config.checkpoints.validate_every == 0 or step == config.optimizer.steps


def has_stalled(config: TrainConfig, step: int) -> bool:
    """Return whether the last `--patience` validations known at a step brought no improvement."""
    best = best_checkpoint(config)
    if not config.checkpoints.patience or best is None:
        return False
    # Count only validations before the first pending one, since a pending one may still be better.
    first_pending = min(pending_checkpoints(config), default=step + 1)
    known_until = (
        min(step, first_pending - 1) // config.checkpoints.validate_every * config.checkpoints.validate_every
    )
    return known_until - best >= config.checkpoints.patience * config.checkpoints.validate_every


def _predict(config: TrainConfig, step: int, device: str, number: int = 0, of: int = 1) -> Share:
    with tempfile.TemporaryDirectory() as folder:
        storage.download_folder(storage.join(checkpoint.uri(config.run.output, step), "model"), folder)
        dtype = torch.bfloat16 if config.optimizer.precision == "bf16" else torch.float32
        detector = ObjectDetector.from_pretrained(folder, device, dtype, masks=config.run.segments)
    manifest = Manifest.load(config.validation.val_data)
    return predict_share(
        detector, manifest, config.run.masks, number, of, config.validation.validation_images
    )


def _record_metrics(config: TrainConfig, run_id: str, step: int, share: Share) -> dict[str, float]:
    manifest = Manifest.load(config.validation.val_data)
    metrics = score_share(share)
    checkpoint.write_validation(config.run.output, step, metrics)
    name = main_metric(config)
    log_line(
        f"step {step}: validation on {len(share.truth.images)} images: {name} {metrics[name]:.3f}, AP50 "
        f"{metrics['AP50']:.3f}"
    )
    if run_id:
        try:
            require_mlflow(config.tracking.tracking_uri)
            tracking.log_metrics(
                config.tracking.tracking_uri,
                run_id,
                [(step, {f"val_{key}": value for key, value in metrics.items()})],
            )
            with tempfile.TemporaryDirectory() as folder:
                file = os.path.join(folder, f"step-{step:08d}.png")
                run_pictures.contact_sheet(manifest, share.results(), file, SAMPLES)
                tracking.log_artifacts(config.tracking.tracking_uri, run_id, file, "samples")
        except RegistryError as error:
            log_line(
                f"{error} The validation metrics of step {step} are stored and will be sent at the end of the run."
            )
    return metrics
