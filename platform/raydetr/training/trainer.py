"""The driver of a training run: checks first, then Ray Train, then the finished model and its registration."""

import dataclasses
import os
import tempfile
import time
from functools import partial
from typing import Any

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from detr.augment import AugmentSpec
from raydetr import cluster, storage
from raydetr.config import TrainConfig
from raydetr.data.plan import PlanSpec
from raydetr.data.shards import Manifest
from raydetr.data.source import shard_source
from raydetr.data.stream import PlanDataConfig, Stream, build_plan
from raydetr.data.synthetic import embedded
from raydetr.errors import ConfigError, TrainingError
from raydetr.registry import models, tracking
from raydetr.training import checkpoint
from raydetr.training.lease import lease
from raydetr.training.loop import FAILURE, create_state
from raydetr.training.model import build_model
from raydetr.training.worker import train_loop_per_worker

SUMMARY = "summary.json"
RUN = "run.json"
MODEL = "model"
FREE_FIELDS = {"workers", "data_cpus", "max_failures", "keep_checkpoints", "accelerator", "json", "val_data"}
"""Fields that may differ when a run is resumed: they change how it is computed, not what."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, or go on with, the run at `config.output`; a finished one returns its summary at once.

    Returns:
        The summary: run id, model address and folder, steps, losses, images per second, data digest.

    Raises:
        RaydetrError: what is wrong with the flags, the data or the cluster, before the first step; later a
            run that cannot go on.
    """
    finished = storage.join(storage.absolute(config.output), SUMMARY)
    if storage.exists(finished):
        print(f"{finished} is there: this run is finished. Give another --output for a new one.")
        return dict(storage.read_json(finished))
    cluster.connect(config.workers + config.data_cpus)
    config = resolve_addresses(config)
    cluster.require_shared(
        train_data=config.train_data, output=config.output, tracking_uri=config.tracking_uri
    )
    manifest = Manifest.load(config.train_data)
    check(config, manifest)
    with lease(config.output):
        run_id = open_run(config, manifest)
        start = time.perf_counter()
        if checkpoint.last_committed_step(config.output) < config.steps:
            fit(config, manifest, run_id)
        summary = finish(config, manifest, run_id, time.perf_counter() - start)
        storage.write_json(finished, summary)
    return summary


def resolve_addresses(config: TrainConfig) -> TrainConfig:
    """The configuration with embedded defaults filled in and every address absolute."""
    return dataclasses.replace(
        config,
        train_data=storage.absolute(config.train_data or embedded("train")),
        output=storage.absolute(config.output),
        tracking_uri=tracking.resolve_uri(config.tracking_uri),
    )


def check(config: TrainConfig, manifest: Manifest) -> None:
    """What can be known to be wrong before workers start.

    Raises:
        ConfigError: there are images with more objects than the model has queries, or no such model can be built.
        RegistryError: there is no model at `--model`.
    """
    if manifest.max_objects_per_image > config.num_queries:
        raise ConfigError(
            f"--num-queries is {config.num_queries}, but an image of {config.train_data} has "
            f"{manifest.max_objects_per_image} objects: a model can find at most one object per query. Give "
            f"--num-queries {manifest.max_objects_per_image} or more (with slack)."
        )
    try:
        build_model(config, manifest)
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"The model cannot be built: {error}") from error


def plan_spec(config: TrainConfig) -> PlanSpec:
    """The order and augmentation that a configuration asks for."""
    return PlanSpec(
        seed=config.seed,
        micro_batch_size=config.micro_batch_size,
        micro_batches=config.micro_batches,
        window_row_groups=config.window_row_groups,
        group_sizes=config.group_sizes,
        augmentation=AugmentSpec(
            flip=config.flip,
            shortest_edges=config.shortest_edges,
            longest_edge=config.longest_edge,
            crop=config.crop,
            crop_shortest_edges=config.crop_shortest_edges,
            crop_sizes=config.crop_sizes,
        ),
    )


def open_run(config: TrainConfig, manifest: Manifest) -> str:
    """The MLflow run of this output folder: a new one, or the one it was begun with.

    Raises:
        TrainingError: the folder belongs to a run with other flags or other data.
    """
    identity = {
        name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_FIELDS
    } | {"data_digest": manifest.digest}
    address = storage.join(config.output, RUN)
    run_id = None
    if storage.exists(address):
        begun = storage.read_json(address)
        # JSON has no tuples: compare what JSON makes of both.
        differing = sorted(name for name in identity if _plain(identity[name]) != begun["identity"].get(name))
        if differing:
            raise TrainingError(
                f"{config.output} holds a run that was begun with other values of {', '.join(differing)}: give "
                "the same flags to go on with it, or another --output."
            )
        run_id = begun["run_id"]
    run_id = tracking.start_run(
        config.tracking_uri,
        config.experiment,
        os.path.basename(config.output.rstrip("/")),
        identity,
        {"data_digest": manifest.digest},
        run_id,
    )
    storage.write_json(address, {"run_id": run_id, "identity": identity})
    return run_id


def fit(config: TrainConfig, manifest: Manifest, run_id: str) -> None:
    """Run the workers until the last step is committed.

    Raises:
        TrainingError: more workers failed than `--max-failures`, or the loop itself raised.
    """
    stream = Stream(
        source=shard_source(manifest),
        plan=build_plan(manifest, plan_spec(config), config.repeat_threshold),
        last_step=config.steps,
        first_step=partial(checkpoint.last_committed_step, config.output),
    )
    print(
        f"{stream.plan.steps_per_epoch} steps an epoch, {config.steps / stream.plan.steps_per_epoch:.1f} epochs; "
        f"from step {stream.first_step()}",
        flush=True,
    )
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"config": config, "run_id": run_id},
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.accelerator == "gpu",
            resources_per_worker={"CPU": 1, **({"GPU": 1} if config.accelerator == "gpu" else {})},
        ),
        run_config=RunConfig(
            # A name of its own: what to go on from is decided by our checkpoints alone.
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=storage.join(config.output, "ray"),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
        datasets={"train": stream},  # type: ignore[dict-item]  # what PlanDataConfig takes
        dataset_config=PlanDataConfig(),
    )
    failure = storage.join(config.output, FAILURE)
    storage.delete_file(failure)
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise TrainingError(f"{config.output}: training stopped: {error}") from error
    if storage.exists(failure):
        raise TrainingError(storage.read_json(failure)["error"])


def finish(config: TrainConfig, manifest: Manifest, run_id: str, seconds: float) -> dict[str, Any]:
    """Write the finished model, register it, end the MLflow run; returns the summary."""
    state = create_state(config, manifest, torch.device("cpu"))
    checkpoint.load(config.output, config.steps, state)
    if state.average:
        state.average.swap()
    losses = tracking.metric_history(config.tracking_uri, run_id, "loss")
    summary: dict[str, Any] = {
        "run_id": run_id,
        "steps": state.step,
        "images": state.images,
        "skipped_images": state.skipped,
        "seconds": seconds,
        "images_per_second": state.images / seconds,
        "first_loss": _mean([value for _, value in losses[:20]]),
        "last_loss": _mean([value for _, value in losses[-20:]]),
        "data_digest": manifest.digest,
        "model_folder": storage.join(config.output, MODEL),
    }
    with tempfile.TemporaryDirectory() as folder:
        state.model.float().save_pretrained(folder)
        state.processor.save_pretrained(folder)
        storage.upload_folder(folder, summary["model_folder"])
        if config.name:
            version = models.register(
                config.tracking_uri,
                run_id,
                folder,
                config.name,
                alias="challenger",
                tags={"data_digest": manifest.digest},
            )
            summary |= {"model": f"models:/{config.name}/{version}", "model_version": version}
    tracking.end_run(config.tracking_uri, run_id)
    return summary


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
