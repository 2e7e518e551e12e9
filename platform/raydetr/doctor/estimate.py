"""From a trial and a window of data to hours, epochs, memory, and how many CPUs must prepare images."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from raydetr.data.shards import Manifest
from raydetr.doctor.findings import Finding
from raydetr.doctor.nodes import Node
from raydetr.doctor.trial import TrialRun
from raydetr.training.config import TrainConfig
from raydetr.training.preview import duration

FROM_SCRATCH_EPOCHS = 300
"""The paper's schedule on COCO's 118,000 images; the longer one is 500 epochs."""

FAR_BELOW = 50
"""At 50 epochs of COCO, DETR is far from what it can be (Zhu et al. 2021, table 1: AP 35 after 50, 43 after 500)."""

FINE_TUNE_EPOCHS = 5


@dataclass(frozen=True)
class Speed:
    """What a run can be expected to do.

    worker_images_per_second: of all workers, if nothing held them up.
    data_images_per_second_per_cpu: made ready by one CPU.
    feeding_cpus: CPUs that make ready what the workers train on.
    images_per_second: of the run.
    bound_by: what it is that holds it up.
    """

    worker_images_per_second: float
    data_images_per_second_per_cpu: float
    feeding_cpus: int
    images_per_second: float
    bound_by: str


def speed(
    config: TrainConfig, trial: TrialRun, data_rate: float, logical_cpus: float, real_cpus: float
) -> Speed:
    """How fast a run can be.

    Args:
        config: of the run.
        trial: what a step takes.
        data_rate: images that one CPU makes ready in a second.
        logical_cpus: of the cluster, as Ray counts them.
        real_cpus: that its nodes have.
    """
    per_image = trial.step_seconds / max(trial.images, 1)
    # A step is as long as its longest share, which is what was measured.
    workers = config.micro_batch_size * config.micro_batches / trial.step_seconds
    free = max(logical_cpus - config.workers, 1)
    trains = per_image if config.accelerator == "cpu" else 0.0
    bounds = {
        "the workers": workers,
        "the CPUs that prepare images": free * data_rate,
        "the machines' cores, which workers and data share": real_cpus / (trains + 1 / data_rate),
    }
    bound_by = min(bounds, key=bounds.__getitem__)
    return Speed(workers, data_rate, math.ceil(workers / data_rate), bounds[bound_by], bound_by)


def epochs(config: TrainConfig, manifest: Manifest) -> float:
    """How often the run sees each image."""
    return config.steps * config.micro_batch_size * config.micro_batches / max(manifest.num_images, 1)


def findings(
    config: TrainConfig, manifest: Manifest, trial: TrialRun, found: Speed, cpus: float, embedded: bool
) -> Iterator[Finding]:
    """Time, data rate and epochs, in words.

    Args:
        config: of the run.
        manifest: of the training set.
        trial: what a step takes.
        found: `speed` of it.
        cpus: of the cluster.
        embedded: the data are the embedded ones, for which the steps of `small` were found to suffice.
    """
    hours = hours_of(config, found)
    yield Finding(
        "time",
        "ok",
        f"{trial.step_seconds:.2f} s a step ({trial.images} images of one worker), about "
        f"{found.images_per_second:.1f} images/s with {config.workers} workers, bound by {found.bound_by}: "
        f"{duration(3600 * hours)} for {config.steps:,} steps.",
    )
    left = cpus - config.workers
    rate = (
        f"one CPU prepares {found.data_images_per_second_per_cpu:.1f} images/s, the workers take "
        f"{found.worker_images_per_second:.1f}; CPUs that feed them: {found.feeding_cpus}"
    )
    if found.feeding_cpus > left:
        yield Finding(
            "data rate",
            "warn",
            f"{rate}, and {left:g} are left to the data.",
            f"give the cluster {found.feeding_cpus - left:g} more CPUs (--data-cpus {found.feeding_cpus} asks for "
            "them), or the workers will wait.",
        )
    else:
        yield Finding("data rate", "ok", f"{rate}; {left:g} are left to the data.")
    yield from _epochs(config, manifest, embedded)


def memory(
    config: TrainConfig, trial: TrialRun, nodes: Sequence[Node], described: Sequence[Any]
) -> Iterator[Finding]:
    """Whether the workers fit into the nodes' memory, and into their GPUs'."""
    if trial.gpu_memory_gib:
        used, there = trial.gpu_memory_gib
        status: Any = "ok" if used < 0.9 * there else "warn"
        remedy = "" if status == "ok" else "lower --micro-batch-size, or give --activation-checkpointing."
        yield Finding("GPU memory", status, f"{used:.1f} of {there:.0f} GiB.", remedy)
    places = 0
    for node, each in zip(nodes, described, strict=True):
        if isinstance(each, dict):
            free = each["memory_bytes"] / 2**30 - node.resources.get("object_store_memory", 0) / 2**30
            places += int(max(free, 0) / trial.memory_gib)
    text = f"a worker takes about {trial.memory_gib:.1f} GiB; besides the object store the nodes hold {places} such"
    if places < config.workers:
        yield Finding(
            "memory",
            "FAIL",
            f"{text}, --workers is {config.workers}.",
            "lower --workers or --micro-batch-size, give --activation-checkpointing, or larger nodes.",
        )
    else:
        yield Finding("memory", "ok", f"{text}.")


def figures(config: TrainConfig, manifest: Manifest, trial: TrialRun, found: Speed) -> dict[str, Any]:
    """For the summary."""
    return {
        "step_seconds": trial.step_seconds,
        "memory_gib": trial.memory_gib,
        **({"gpu_memory_gib": trial.gpu_memory_gib[0]} if trial.gpu_memory_gib else {}),
        **asdict(found),
        "hours": hours_of(config, found),
        "epochs": epochs(config, manifest),
        "overfit_steps": len(trial.losses),
        **(
            {"overfit_first_loss": trial.losses[0], "overfit_last_loss": trial.losses[-1]}
            if trial.losses
            else {}
        ),
        **{f"overfit_{name}": value for name, value in trial.figures.items()},
    }


def hours_of(config: TrainConfig, found: Speed) -> float:
    """Hours that the steps take, without start, validation and checkpoints."""
    return config.steps * config.micro_batch_size * config.micro_batches / found.images_per_second / 3600


def _epochs(config: TrainConfig, manifest: Manifest, embedded: bool) -> Iterator[Finding]:
    count = epochs(config, manifest)
    text = f"{config.steps:,} steps are {count:.1f} epochs of {manifest.num_images:,} images"
    least = FINE_TUNE_EPOCHS if config.model else FAR_BELOW
    if count >= least or config.multi_scale:
        yield Finding("epochs", "ok", f"{text}.")
    elif embedded:
        yield Finding("epochs", "ok", f"{text}, enough for the embedded ones.")
    else:
        wanted = math.ceil(config.steps * least / count / 100) * 100
        need = (
            f"even a fine-tune wants {FINE_TUNE_EPOCHS} or more"
            if config.model
            else f"from scratch DETR needs about {FROM_SCRATCH_EPOCHS}, and below {FAR_BELOW} it finds next to nothing"
        )
        advice = "" if config.model else ", or start from a trained model: --recipe fine-tune --model ADDRESS"
        yield Finding("epochs", "warn", f"{text}: {need}.", f"give --steps {wanted:,} or more{advice}.")
