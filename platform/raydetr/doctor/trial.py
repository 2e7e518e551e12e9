"""Trial run: time a few real training steps, measure their memory, and overfit eight images."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import ray
import torch

from detr.image_processing.decode import ImageError
from detr.inference.detector import ObjectDetector
from raydetr.data.ingest.shard_writer import write_manifest, write_shard
from raydetr.data.pixels import decode_record
from raydetr.data.schema import Record
from raydetr.data.shards import Manifest, read_records, training_targets
from raydetr.data.stream.mask_targets import mask_targets
from raydetr.data.stream.micro_batch import TrainingBatch
from raydetr.doctor.config import DoctorConfig
from raydetr.doctor.findings import Finding
from raydetr.errors import ClusterError, DataError, TrainingError
from raydetr.evaluation.in_process import predict_share, score_share
from raydetr.flat_keys import override
from raydetr.training.preview import build_stream, iterate_micro_batches, take_step, time_steps
from raydetr.training.progress import resource_usage
from raydetr.training.state import create_state
from raydetr.training.step import is_finite
from raydetr.training.validation import main_metric

IMAGES = 8
_MAX_SEARCHED = 500


@dataclass(frozen=True)
class TrialRun:
    """Result of a trial run.

    step_seconds: seconds for one worker's share of the first step.
    images: number of images in that share.
    memory_gib: peak memory of the process.
    gpu_memory_gib: peak memory of the GPU, and its total memory; None without a GPU.
    losses: losses of the overfit, one per step.
    stop_reason: why the overfit stopped: "fallen", "steps", "time" or "not finite"; empty without an overfit.
    seconds: duration of the overfit.
    metrics: metrics on the overfit images.
    """

    step_seconds: float
    images: int
    memory_gib: float
    gpu_memory_gib: tuple[float, float] | None
    losses: list[float]
    stop_reason: str
    seconds: float
    metrics: dict[str, float]


def run(config: DoctorConfig, manifest: Manifest, batches: Sequence[TrainingBatch]) -> TrialRun:
    """Run the trial in this process, or in a GPU task if the workers use GPUs and this process has none.

    Raises:
        ClusterError: no GPU is free.
    """
    if config.cluster.accelerator == "gpu" and not torch.cuda.is_available():
        if not ray.is_initialized() or ray.available_resources().get("GPU", 0) < 1:
            raise ClusterError(
                "No GPU of the cluster is free for a trial run: stop the jobs that use them, or wait."
            )
        task = ray.remote(num_cpus=1, num_gpus=1)(run_in_process)
        result: TrialRun = ray.get(task.remote(config, manifest, batches))
        return result
    return run_in_process(config, manifest, batches)


def run_in_process(config: DoctorConfig, manifest: Manifest, batches: Sequence[TrainingBatch]) -> TrialRun:
    """Time steps on the micro-batches of the run's first step, then overfit.

    Raises:
        TrainingError: the GPU is out of memory.
        DataError: no image has trainable objects.
    """
    device = torch.device("cuda" if config.cluster.accelerator == "gpu" else "cpu")
    own = [batch for batch in batches[:: config.cluster.workers] if batch.weights.sum()]
    try:
        step_seconds = time_steps(config, create_state(config, manifest, device), own or list(batches))
        memory = resource_usage()
        losses, stop_reason, seconds, metrics = (
            overfit(config, manifest, device) if config.checks.overfit_steps else ([], "", 0.0, {})
        )
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"The GPU is out of memory with a micro-batch of {config.optimizer.micro_batch_size} images: lower "
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
        stop_reason=stop_reason,
        seconds=seconds,
        metrics=metrics,
    )


def overfit(
    config: DoctorConfig, manifest: Manifest, device: torch.device
) -> tuple[list[float], str, float, dict[str, float]]:
    """Train on eight images without augmentation until the loss has fallen, then score the model on them.

    Returns:
        Losses, why it stopped, seconds, metrics.
    """
    config = override(
        config,
        workers=1,
        steps=config.checks.overfit_steps,
        schedule="constant",
        warmup_steps=min(config.optimizer.warmup_steps, config.checks.overfit_steps // 10),
        repeat_threshold=0.0,
        flip=0.0,
        crop=False,
        shortest_edges=(config.data.test_edge,),
    )
    with tempfile.TemporaryDirectory() as folder:
        subset = select_images(config, manifest, folder)
        steps = _epoch(config, subset)
        state = create_state(config, subset, device)
        losses, stop_reason, start = [], "steps", time.perf_counter()
        for number, batches in zip(range(config.checks.overfit_steps), itertools.cycle(steps), strict=False):
            step_metrics = take_step(config, state, batches, number)
            losses.append(_trained_loss(config, step_metrics))
            if not is_finite(step_metrics):
                stop_reason = "not finite"
            elif relative_loss(losses, len(steps)) <= config.checks.loss_share:
                stop_reason = "fallen"
            elif time.perf_counter() - start > 60 * config.checks.overfit_minutes:
                stop_reason = "time"
            if stop_reason != "steps":
                break
        seconds = time.perf_counter() - start
        metrics = {}
        if stop_reason != "not finite":
            dtype = torch.bfloat16 if config.optimizer.precision == "bf16" else torch.float32
            detector = ObjectDetector(state.model, state.processor, device, dtype)
            metrics = score_share(predict_share(detector, subset, config.run.masks))
    return losses, stop_reason, seconds, metrics


def _trained_loss(config: DoctorConfig, metrics: dict[str, float]) -> float:
    """Return the part of the loss that can fall: without the detector's terms if it is frozen."""
    if not config.model.freeze_detector:
        return metrics["loss"]
    return (
        config.loss.mask_loss_coefficient * metrics["loss_mask"]
        + config.loss.dice_loss_coefficient * metrics["loss_dice"]
    )


def select_images(config: DoctorConfig, manifest: Manifest, folder: str) -> Manifest:
    """Write a data set of the first images that have trainable objects.

    Raises:
        DataError: none of the first 500 images has any.
    """
    selected: list[Record] = []
    for record in itertools.islice(read_records(manifest), _MAX_SEARCHED):
        if len(selected) < IMAGES and _has_targets(config, manifest, record):
            selected.append(record)
    summary = write_shard(folder, 0, selected)
    if summary is None:
        raise DataError(
            f"{manifest.root}: none of the first {_MAX_SEARCHED} images can be decoded and has trainable objects."
        )
    return write_manifest(folder, [summary], manifest.categories)


def relative_loss(losses: Sequence[float], window: int) -> float:
    """Return the mean loss of the last steps divided by that of the first steps; 1 while there are too few steps."""
    last = max(3, window)
    if len(losses) < window + last:
        return 1.0
    return statistics.fmean(losses[-last:]) / statistics.fmean(losses[:window])


def findings(config: DoctorConfig, trial: TrialRun, images: int = IMAGES) -> Iterator[Finding]:
    """Report whether the model can overfit the images."""
    losses = trial.losses
    if not losses:
        return
    name = main_metric(config)
    scores = ", ".join(
        f"{key} {trial.metrics[key]:.2f}" for key in dict.fromkeys(["AP50", name]) if key in trial.metrics
    )
    text = (
        f"{images} images, {len(losses)} steps, {trial.seconds:.0f} s: loss {losses[0]:.2f} → {losses[-1]:.2f}"
        f"{f', {scores} on them' if scores else ''}"
    )
    if trial.stop_reason == "not finite":
        yield Finding(
            "overfit",
            "FAIL",
            f"{text}: the loss or gradient is not finite.",
            "lower --learning-rate, give --max-grad-norm 0.1 or --precision float32.",
        )
    elif trial.stop_reason == "fallen":
        yield Finding(
            "overfit", "ok", f"{text}; it has fallen to {config.checks.loss_share:g} of its initial value."
        )
    elif trial.stop_reason == "time":
        yield Finding(
            "overfit",
            "warn",
            f"{text}: the time limit was reached before it had fallen to {config.checks.loss_share:g} of its initial value.",
            "raise --overfit-minutes, or run the doctor on a faster machine.",
        )
    else:
        yield Finding(
            "overfit",
            "FAIL",
            f"{text}: it has not fallen to {config.checks.loss_share:g} of its initial value.",
            "check in batch.png that boxes and class names are right; try --learning-rate 1e-4 and "
            "--backbone-learning-rate 1e-5, or --backbone-weights; or raise --overfit-steps.",
        )


def _epoch(config: DoctorConfig, subset: Manifest) -> list[list[TrainingBatch]]:
    """Return the non-empty micro-batches of each step of one epoch."""
    stream = build_stream(config, subset, 1)
    stream = replace(stream, last_step=stream.plan.steps_per_epoch)
    batches = [
        batch
        for batch in iterate_micro_batches(stream, config.optimizer.micro_batch_size)
        if batch.weights.sum()
    ]
    return [list(step) for _, step in itertools.groupby(batches, key=lambda batch: batch.step)]


def _has_targets(config: DoctorConfig, manifest: Manifest, record: Record) -> bool:
    try:
        decode_record(record)
    except ImageError:
        return False
    if config.run.masks == "none":
        return len(training_targets(record, manifest.labels)[1]) > 0
    return len(mask_targets(record, manifest.labels, config.run.masks)[1]) > 0
