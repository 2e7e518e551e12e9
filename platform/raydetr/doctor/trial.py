"""A few steps of the real training: how long one takes, what memory it needs, whether eight images can be learned."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch

from detr.image_processing.decode import ImageError
from detr.inference.detector import ObjectDetector
from raydetr.data.ingest.shard_writer import write_manifest, write_shard
from raydetr.data.pixels import decode_record
from raydetr.data.shards import Manifest, read_records, training_targets
from raydetr.data.stream.mask_targets import mask_targets
from raydetr.data.stream.micro_batch import TrainingBatch
from raydetr.doctor.config import DoctorConfig
from raydetr.doctor.findings import Finding
from raydetr.errors import ClusterError, DataError, TrainingError
from raydetr.evaluation.in_process import figures, predict_share
from raydetr.training.preview import stream_of, take_step, time_steps, walk
from raydetr.training.progress import usage
from raydetr.training.state import create_state
from raydetr.training.step import is_finite
from raydetr.training.validation import main_figure

IMAGES = 8
_SEARCHED = 500


@dataclass(frozen=True)
class TrialRun:
    """What came of it.

    step_seconds: of one worker's share of the first step.
    images: of that share.
    memory_gib: peak of the process; gpu_memory_gib: of the GPU, and how much it has.
    losses: of the overfit, step by step.
    ended: why it did.
    figures: on the images learned.
    """

    step_seconds: float
    images: int
    memory_gib: float
    gpu_memory_gib: tuple[float, float] | None
    losses: list[float]
    ended: str
    seconds: float
    figures: dict[str, float]


def run(config: DoctorConfig, manifest: Manifest, batches: Sequence[TrainingBatch]) -> TrialRun:
    """Make the trial in this process; where it has no GPU and the workers do, in a task that has one.

    Raises:
        ClusterError: no GPU is free.
    """
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        if not ray.is_initialized() or ray.available_resources().get("GPU", 0) < 1:
            raise ClusterError(
                "No GPU of the cluster is free for a trial: end what holds them, or wait for it."
            )
        task = ray.remote(num_cpus=1, num_gpus=1)(make)
        result: TrialRun = ray.get(task.remote(config, manifest, batches))
        return result
    return make(config, manifest, batches)


def make(config: DoctorConfig, manifest: Manifest, batches: Sequence[TrainingBatch]) -> TrialRun:
    """Time steps on the micro-batches of the run's first step, then overfit.

    Raises:
        TrainingError: the memory of the GPU does not suffice.
        DataError: there is no image to learn.
    """
    device = torch.device("cuda" if config.accelerator == "gpu" else "cpu")
    own = [batch for batch in batches[:: config.workers] if batch.weights.sum()]
    try:
        step_seconds = time_steps(config, create_state(config, manifest, device), own or list(batches))
        memory = usage()
        losses, ended, seconds, found = (
            overfit(config, manifest, device) if config.overfit_steps else ([], "", 0.0, {})
        )
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"The memory of the GPU does not suffice for a micro-batch of {config.micro_batch_size} images: lower "
            f"--micro-batch-size and raise --micro-batches, or give --activation-checkpointing or --precision "
            f"bf16 ({error})."
        ) from error
    gpu = memory.get("gpu_memory_gib")
    return TrialRun(
        step_seconds=step_seconds,
        images=int(sum(float(batch.weights.sum()) for batch in own)),
        memory_gib=memory["memory_gib"],
        gpu_memory_gib=(gpu, torch.cuda.get_device_properties(device).total_memory / 2**30)
        if gpu is not None and device.type == "cuda"
        else None,
        losses=losses,
        ended=ended,
        seconds=seconds,
        figures=found,
    )


def overfit(
    config: DoctorConfig, manifest: Manifest, device: torch.device
) -> tuple[list[float], str, float, dict[str, float]]:
    """Train on eight images, without augmentation, until the loss has fallen; then score the model on them.

    Returns:
        losses, why it ended, seconds, figures.
    """
    config = replace(
        config,
        workers=1,
        steps=config.overfit_steps,
        schedule="constant",
        warmup_steps=min(config.warmup_steps, config.overfit_steps // 10),
        repeat_threshold=0.0,
        flip=0.0,
        crop=False,
        shortest_edges=(config.test_edge,),
    )
    with tempfile.TemporaryDirectory() as folder:
        few = eight_images(config, manifest, folder)
        steps = _epoch(config, few)
        state = create_state(config, few, device)
        losses, ended, start = [], "steps", time.perf_counter()
        for number, batches in zip(range(config.overfit_steps), itertools.cycle(steps), strict=False):
            metrics = take_step(config, state, batches, number)
            losses.append(_loss_of_what_is_trained(config, metrics))
            if not is_finite(metrics):
                ended = "not finite"
            elif fallen_to(losses, len(steps)) <= config.loss_share:
                ended = "fallen"
            elif time.perf_counter() - start > 60 * config.overfit_minutes:
                ended = "time"
            if ended != "steps":
                break
        seconds = time.perf_counter() - start
        found = {}
        if ended != "not finite":
            dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
            detector = ObjectDetector(state.model, state.processor, device, dtype)
            found = figures(predict_share(detector, few, config.masks))
    return losses, ended, seconds, found


def _loss_of_what_is_trained(config: DoctorConfig, metrics: dict[str, float]) -> float:
    """The part of a frozen detector cannot fall."""
    if not config.freeze_detector:
        return metrics["loss"]
    return (
        config.mask_loss_coefficient * metrics["loss_mask"]
        + config.dice_loss_coefficient * metrics["loss_dice"]
    )


def eight_images(config: DoctorConfig, manifest: Manifest, folder: str) -> Manifest:
    """A data set of the first images that have something to learn.

    Raises:
        DataError: there is none among the first 500.
    """
    kept: list[dict[str, Any]] = []
    for record in itertools.islice(read_records(manifest), _SEARCHED):
        if len(kept) < IMAGES and _is_of_use(config, manifest, record):
            kept.append(record)
    summary = write_shard(folder, 0, kept)
    if summary is None:
        raise DataError(
            f"{manifest.root}: none of the first {_SEARCHED} images can be decoded and has objects."
        )
    return write_manifest(folder, [summary], manifest.categories)


def fallen_to(losses: Sequence[float], window: int) -> float:
    """The share of its start at which the loss is: the mean of the last steps over that of the first ones."""
    last = max(3, window)
    if len(losses) < window + last:
        return 1.0
    return statistics.fmean(losses[-last:]) / statistics.fmean(losses[:window])


def finding(config: DoctorConfig, trial: TrialRun, images: int = IMAGES) -> Iterator[Finding]:
    """Whether the model can learn what it is to learn."""
    losses = trial.losses
    if not losses:
        return
    name = main_figure(config)
    scores = ", ".join(
        f"{key} {trial.figures[key]:.2f}" for key in dict.fromkeys(["AP50", name]) if key in trial.figures
    )
    text = (
        f"{images} images, {len(losses)} steps, {trial.seconds:.0f} s: loss {losses[0]:.2f} → {losses[-1]:.2f}"
        f"{f', {scores} on them' if scores else ''}"
    )
    if trial.ended == "not finite":
        yield Finding(
            "overfit",
            "FAIL",
            f"{text}: loss or gradient are not finite.",
            "lower --learning-rate, give --max-grad-norm 0.1 or --precision float32.",
        )
    elif trial.ended == "fallen":
        yield Finding("overfit", "ok", f"{text}; it has fallen to {config.loss_share:g} of its start.")
    elif trial.ended == "time":
        yield Finding(
            "overfit",
            "warn",
            f"{text}: the time was up before it had fallen to {config.loss_share:g} of its start.",
            "give --overfit-minutes more, or run the doctor on a faster machine.",
        )
    else:
        yield Finding(
            "overfit",
            "FAIL",
            f"{text}: it has not fallen to {config.loss_share:g} of its start.",
            "look at batch.png whether boxes and names are right; try --learning-rate 1e-4 and "
            "--backbone-learning-rate 1e-5, --backbone-weights; or give --overfit-steps more.",
        )


def _epoch(config: DoctorConfig, few: Manifest) -> list[list[TrainingBatch]]:
    """The micro-batches of each step of an epoch, without the empty ones."""
    made = stream_of(config, few, 1)
    made = replace(made, last_step=made.plan.steps_per_epoch)
    batches = [batch for batch in walk(made, config.micro_batch_size) if batch.weights.sum()]
    return [list(step) for _, step in itertools.groupby(batches, key=lambda batch: batch.step)]


def _is_of_use(config: DoctorConfig, manifest: Manifest, record: dict[str, Any]) -> bool:
    try:
        decode_record(record)
    except ImageError:
        return False
    if config.masks == "none":
        return len(training_targets(record, manifest.labels)[1]) > 0
    return len(mask_targets(record, manifest.labels, config.masks)[1]) > 0
