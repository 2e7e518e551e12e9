"""Figures of a run's checkpoints on the validation set, while it trains.

In the background, as a Ray task of its own resources that Ray Train starts for a reported checkpoint; where the cluster
has none to spare, between two steps, each worker scoring its share of the images. Both leave the figures with the run,
and from these follow the best checkpoint and an early end: a run that is resumed knows them too. A validation that was
lost with its worker or driver is done before a run goes on, and before it ends.
"""

import contextlib
import dataclasses
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
from raydetr.evaluation.in_process import Share, figures, join, predict_share
from raydetr.registry import tracking
from raydetr.reports import run_pictures
from raydetr.training import checkpoint
from raydetr.training.config import TrainConfig
from raydetr.training.distributed import world_size
from raydetr.training.progress import log_line, require_answer

SAMPLES = 12
"""Images of the sheet of predictions."""


def main_figure(config: TrainConfig) -> str:
    """The figure that decides which checkpoint is the best."""
    return {"instance": "mask_AP", "panoptic": "PQ"}.get(config.task, "AP")


def validate_checkpoint(config: TrainConfig, run_id: str, step: int) -> dict[str, float]:
    """Score the model of a checkpoint and leave the figures with it; none where it fails, which is said."""
    device = "cuda" if config.validation_gpus and torch.cuda.is_available() else "cpu"
    try:
        return _conclude(config, run_id, step, _predict(config, step, device))
    except Exception as error:  # whatever it is, training goes on
        return _give_up(config, step, repr(error))


def validate_together(config: TrainConfig, run_id: str, step: int, rank: int, device: torch.device) -> None:
    """The same by all workers, each of which scores its share."""
    share: Share | str
    try:
        share = _predict(config, step, str(device), rank, world_size())
    except Exception as error:  # told to all, who wait for this one's share
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
            _give_up(config, step, "; ".join(failures))
        else:
            _conclude(config, run_id, step, join(gathered))
    except Exception as error:
        _give_up(config, step, repr(error))


def _give_up(config: TrainConfig, step: int, reason: str) -> dict[str, float]:
    """Training goes on without the figures of a step."""
    log_line(f"step {step}: the validation failed: {reason}")
    with contextlib.suppress(StorageError):
        checkpoint.write_validation(config.output, step, {})
    return {}


def best_checkpoint(config: TrainConfig) -> int | None:
    """Step of the checkpoint with the best figure so far, the earlier one of equals; None without a figure.

    Without a truth to score there is none: COCO's are -1 then.
    """
    known = {}
    for step in checkpoint.committed_steps(config.output):
        if (found := checkpoint.read_validation(config.output, step)) and found[main_figure(config)] >= 0:
            known[step] = found[main_figure(config)]
    return max(known, key=lambda step: (known[step], -step)) if known else None


def waiting_checkpoints(config: TrainConfig) -> set[int]:
    """Steps of checkpoints whose validation is under way: those with two later ones done were lost with a worker."""
    done = checkpoint.validated_steps(config.output)
    return {step for step in unvalidated_checkpoints(config) if sum(other > step for other in done) < 2}


def unvalidated_checkpoints(config: TrainConfig) -> list[int]:
    """Steps of checkpoints that are to be validated and were not, ascending."""
    return [
        step
        for step in checkpoint.committed_steps(config.output)
        if is_due(config, step) and checkpoint.read_validation(config.output, step) is None
    ]


def validate_what_was_lost(config: TrainConfig, run_id: str) -> None:
    """Validate what was to be and was not, while nothing else runs, with the resources of the run."""
    on_gpu = config.validation_gpus > 0 or config.accelerator == "gpu"
    chosen = (
        dataclasses.replace(config, validation_gpus=max(config.validation_gpus, 1.0)) if on_gpu else config
    )
    task = ray.remote(validate_checkpoint).options(
        num_cpus=config.validation_cpus, num_gpus=chosen.validation_gpus
    )
    for step in unvalidated_checkpoints(config):
        log_line(f"step {step}: its validation was lost, and is done now")
        try:
            ray.get(task.remote(chosen, run_id, step))
        except ray.exceptions.RayError as error:  # its process or its node died
            _give_up(config, step, repr(error))


def is_due(config: TrainConfig, step: int) -> bool:
    """Whether the checkpoint of a step is one to validate."""
    if not config.validate_every:
        return False
    return step % config.validate_every == 0 or step == config.steps


def has_stalled(config: TrainConfig, step: int) -> bool:
    """Whether the last `--patience` validations brought nothing better, as far as they are known at a step."""
    best = best_checkpoint(config)
    if not config.patience or best is None:
        return False
    waiting = min(waiting_checkpoints(config), default=step + 1)
    known_until = min(step, waiting - 1) // config.validate_every * config.validate_every
    return known_until - best >= config.patience * config.validate_every


def _predict(config: TrainConfig, step: int, device: str, number: int = 0, of: int = 1) -> Share:
    with tempfile.TemporaryDirectory() as folder:
        storage.download_folder(storage.join(checkpoint.address(config.output, step), "model"), folder)
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        detector = ObjectDetector.from_pretrained(folder, device, dtype, masks=config.segments)
    manifest = Manifest.load(config.val_data)
    return predict_share(detector, manifest, config.masks, number, of, config.validation_images)


def _conclude(config: TrainConfig, run_id: str, step: int, share: Share) -> dict[str, float]:
    manifest = Manifest.load(config.val_data)
    found = figures(share)
    checkpoint.write_validation(config.output, step, found)
    name = main_figure(config)
    log_line(
        f"step {step}: validation on {len(share.truth.images)} images: {name} {found[name]:.3f}, AP50 {found['AP50']:.3f}"
    )
    if run_id:
        try:
            require_answer(config.tracking_uri)
            tracking.log_metrics(
                config.tracking_uri, run_id, [(step, {f"val_{key}": value for key, value in found.items()})]
            )
            with tempfile.TemporaryDirectory() as folder:
                file = os.path.join(folder, f"step-{step:08d}.png")
                run_pictures.sheet(manifest, share.results(), file, SAMPLES)
                tracking.log_artifacts(config.tracking_uri, run_id, file, "samples")
        except RegistryError as error:
            log_line(f"{error} The figures of step {step} are kept and are sent at the end.")
    return found
