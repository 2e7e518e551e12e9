"""Estimate hours, epochs, memory and CPUs for data from a trial run and a window of data."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from raydetr.data.shards import Manifest
from raydetr.doctor.findings import Finding, Measurements, Status
from raydetr.doctor.nodes import Node
from raydetr.doctor.on_node import NodeDescription
from raydetr.doctor.trial import TrialRun
from raydetr.training.config import TrainConfig
from raydetr.training.preview import format_duration

FROM_SCRATCH_EPOCHS = 300
"""The paper's shorter schedule on COCO's 118,000 images; the longer one has 500 epochs."""

MIN_EPOCHS = 50
"""DETR is far from converged after 50 epochs of COCO (Zhu et al. 2021, table 1: AP 35 after 50, 43 after 500)."""

FINE_TUNE_EPOCHS = 5


@dataclass(frozen=True)
class Speed:
    """Expected throughput of a run.

    worker_images_per_second: of all workers together, if they never wait for data.
    data_images_per_second_per_cpu: images that one CPU prepares per second.
    feeding_cpus: CPUs needed to prepare images as fast as the workers train on them.
    images_per_second: throughput of the run.
    bound_by: the bottleneck.
    """

    worker_images_per_second: float
    data_images_per_second_per_cpu: float
    feeding_cpus: int
    images_per_second: float
    bound_by: str


def speed(
    config: TrainConfig, trial: TrialRun, data_rate: float, logical_cpus: float, real_cpus: float
) -> Speed:
    """Estimate the throughput of a run.

    Args:
        config: configuration of the run.
        trial: timings of a step.
        data_rate: images that one CPU prepares per second.
        logical_cpus: CPUs of the cluster, as Ray counts them.
        real_cpus: CPUs that the nodes have.
    """
    per_image = trial.step_seconds / max(trial.images, 1)
    # A step takes as long as the slowest worker. The trial measured rank 0, which gets the most micro-batches.
    workers = config.optimizer.images_per_step / trial.step_seconds
    free = max(logical_cpus - config.cluster.workers, 1)
    trains = per_image if config.cluster.accelerator == "cpu" else 0.0
    # Where workers and data tasks share cores, an image costs the time of both: training (on CPU) and preparation.
    bounds = {
        "the workers": workers,
        "the CPUs that prepare images": free * data_rate,
        "the machines' cores, which workers and data share": real_cpus / (trains + 1 / data_rate),
    }
    bound_by = min(bounds, key=bounds.__getitem__)
    return Speed(workers, data_rate, math.ceil(workers / data_rate), bounds[bound_by], bound_by)


def epochs(config: TrainConfig, manifest: Manifest) -> float:
    """Return how often the run sees each image."""
    return config.optimizer.steps * config.optimizer.images_per_step / max(manifest.num_images, 1)


def findings(
    config: TrainConfig, manifest: Manifest, trial: TrialRun, estimate: Speed, cpus: float, embedded: bool
) -> Iterator[Finding]:
    """Report time, data rate and epochs.

    Args:
        config: configuration of the run.
        manifest: manifest of the training set.
        trial: timings of a step.
        estimate: result of `speed`.
        cpus: CPUs of the cluster.
        embedded: whether the data are the demo scenes, for which the recipes have enough steps.
    """
    hours = hours_of(config, estimate)
    yield Finding(
        "time",
        "ok",
        f"{trial.step_seconds:.2f} s per step ({trial.images} images of one worker), about "
        f"{estimate.images_per_second:.1f} images/s with {config.cluster.workers} workers, limited by {estimate.bound_by}: "
        f"{format_duration(3600 * hours)} for {config.optimizer.steps:,} steps.",
    )
    left = cpus - config.cluster.workers
    rate = (
        f"one CPU prepares {estimate.data_images_per_second_per_cpu:.1f} images/s, the workers consume "
        f"{estimate.worker_images_per_second:.1f}, which takes {estimate.feeding_cpus} CPUs"
    )
    if estimate.feeding_cpus > left:
        yield Finding(
            "data rate",
            "warn",
            f"{rate}; only {left:g} are left for data tasks.",
            f"add {estimate.feeding_cpus - left:g} more CPUs to the cluster (--data-cpus {estimate.feeding_cpus} "
            "requests them), or the workers will wait for data.",
        )
    else:
        yield Finding("data rate", "ok", f"{rate}; {left:g} are left for data tasks.")
    yield from _epochs(config, manifest, embedded)


def memory(
    config: TrainConfig,
    trial: TrialRun,
    nodes: Sequence[Node],
    described: Sequence[NodeDescription | Exception],
) -> Iterator[Finding]:
    """Check that the workers fit into the memory of the nodes and of their GPUs."""
    if trial.gpu_memory_gib:
        used, total = trial.gpu_memory_gib
        status: Status = "ok" if used < 0.9 * total else "warn"
        remedy = "" if status == "ok" else "lower --micro-batch-size, or give --activation-checkpointing."
        yield Finding("GPU memory", status, f"{used:.1f} of {total:.0f} GiB.", remedy)
    capacity = 0
    for node, each in zip(nodes, described, strict=True):
        if not isinstance(each, Exception):
            free = each["memory_bytes"] / 2**30 - node.resources.get("object_store_memory", 0) / 2**30
            capacity += int(max(free, 0) / trial.memory_gib)
    text = f"a worker needs about {trial.memory_gib:.1f} GiB; memory outside the object stores is enough for {capacity}"
    if capacity < config.cluster.workers:
        yield Finding(
            "memory",
            "FAIL",
            f"{text}, but --workers is {config.cluster.workers}.",
            "lower --workers or --micro-batch-size, give --activation-checkpointing, or use nodes with more memory.",
        )
    else:
        yield Finding("memory", "ok", f"{text}.")


def summary_fields(config: TrainConfig, manifest: Manifest, trial: TrialRun, estimate: Speed) -> Measurements:
    """Return the measurements for the summary of the doctor."""
    return {
        "step_seconds": trial.step_seconds,
        "memory_gib": trial.memory_gib,
        **({"gpu_memory_gib": trial.gpu_memory_gib[0]} if trial.gpu_memory_gib else {}),
        **asdict(estimate),
        "hours": hours_of(config, estimate),
        "epochs": epochs(config, manifest),
        "overfit_steps": len(trial.losses),
        **(
            {"overfit_first_loss": trial.losses[0], "overfit_last_loss": trial.losses[-1]}
            if trial.losses
            else {}
        ),
        **{f"overfit_{name}": value for name, value in trial.metrics.items()},
    }


def hours_of(config: TrainConfig, estimate: Speed) -> float:
    """Return the hours of all steps, without startup, validation and checkpoints."""
    return config.optimizer.steps * config.optimizer.images_per_step / estimate.images_per_second / 3600


def _epochs(config: TrainConfig, manifest: Manifest, embedded: bool) -> Iterator[Finding]:
    count = epochs(config, manifest)
    text = f"{config.optimizer.steps:,} steps are {count:.1f} epochs of {manifest.num_images:,} images"
    minimum = FINE_TUNE_EPOCHS if config.model.model else MIN_EPOCHS
    if count >= minimum or config.model.architecture.multi_scale:
        yield Finding("epochs", "ok", f"{text}.")
    elif embedded:
        yield Finding("epochs", "ok", f"{text}, enough for the demo scenes.")
    else:
        wanted = math.ceil(config.optimizer.steps * minimum / count / 100) * 100
        need = (
            f"even fine-tuning needs {FINE_TUNE_EPOCHS} or more"
            if config.model.model
            else f"from scratch DETR needs about {FROM_SCRATCH_EPOCHS}; below {MIN_EPOCHS} it detects almost nothing"
        )
        advice = (
            "" if config.model.model else ", or start from a trained model: --recipe fine-tune --model MODEL"
        )
        yield Finding("epochs", "warn", f"{text}: {need}.", f"give --steps {wanted:,} or more{advice}.")
