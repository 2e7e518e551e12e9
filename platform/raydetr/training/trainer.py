"""Driver of a training run: preflight checks, Ray Train, then the final model and its registration."""

import os
import time
from functools import partial

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, ValidationConfig
from ray.train.torch import TorchConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydetr import cluster, storage
from raydetr.data.ingest.coco import require_distinct_names
from raydetr.data.shards import Manifest, read_faults, read_rows
from raydetr.data.stream.ray_stream import PlanDataConfig, Stream, build_plan
from raydetr.data.stream.source import shard_source
from raydetr.data.synthetic.dataset import embedded
from raydetr.data.usable import require_trainable, require_usable, trainable
from raydetr.errors import ConfigError, TimeLimitError, TrainingError
from raydetr.flat_keys import override
from raydetr.lease import Held, lease
from raydetr.prediction.categories import match_categories
from raydetr.registry import models, tracking
from raydetr.results.json_form import from_json, to_json
from raydetr.results.summary import TrainingSummary
from raydetr.training import checkpoint, preview, scaling, validation
from raydetr.training.config import TrainConfig
from raydetr.training.finish import finish
from raydetr.training.loop import OUT_OF_TIME
from raydetr.training.model import build_model
from raydetr.training.run import open_run, pinned_model, plan_spec, require_same_run
from raydetr.training.watchdog import HeartbeatBoard
from raydetr.training.worker import train_loop_per_worker, validate

SUMMARY = "summary.json"
_ESTIMATED_STEPS = 200
"""Shorter runs take less time than the estimate itself."""


def train(config: TrainConfig) -> TrainingSummary:
    """Train or resume the run at `config.run.output`; return the summary of a finished run immediately.

    Raises:
        RaydetrError: before the first step, an error in the flags, the data or the cluster; later, an error that stops
            the run. `TimeLimitError` after `--max-hours`.
    """
    start = time.time()
    summary_file = storage.join(storage.absolute(config.run.output), SUMMARY)
    if storage.exists(summary_file):
        require_same_run(resolve_uris(config))
        print(f"{summary_file} exists: this run is finished. Give another --output for a new run.")
        return from_json(TrainingSummary, storage.read_json(summary_file))
    connect_for_training(config)
    asked_model, config = config.model.model, resolve_uris(config)
    cluster.require_shared(
        train_data=config.data.train_data,
        output=config.run.output,
        tracking_uri=config.tracking.tracking_uri,
        **({"val_data": config.validation.val_data} if config.validation.val_data else {}),
        **({"model": config.model.model} if models.is_path(config.model.model) else {}),
    )
    manifest = Manifest.load(config.data.train_data)
    print(
        f"checking {config.data.train_data} ({manifest.num_images:,} images) and building the model",
        flush=True,
    )
    check_prerequisites(config, manifest)
    with lease(config.run.output) as held:
        if storage.exists(summary_file):  # the previous holder of the lease finished the run
            require_same_run(config)
            return from_json(TrainingSummary, storage.read_json(summary_file))
        run_id = open_run(config, manifest, asked_model)
        with tracking.end_on_error(config.tracking.tracking_uri, run_id, held.is_held):
            validation.validate_missing_checkpoints(config, run_id)
            last = checkpoint.last_committed_step(config.run.output)
            if last < config.optimizer.steps and not validation.has_stalled(config, last):
                deadline = (
                    start + 3600 * config.fault_tolerance.max_hours
                    if config.fault_tolerance.max_hours
                    else None
                )
                start_workers(config, manifest, run_id, deadline, held)
                validation.validate_missing_checkpoints(config, run_id)
            held.verify()
            summary = finish(config, manifest, run_id, time.time() - start)
            held.verify()
        storage.write_json(summary_file, to_json(summary))
    return summary


def connect_for_training(config: TrainConfig) -> None:
    """Connect to a cluster that has the resources to start the run.

    Raises:
        ClusterError: the cluster has too few CPUs or GPUs, even after waiting for an autoscaler to add nodes.
    """
    min_workers = config.cluster.min_workers or config.cluster.workers
    on_gpu = config.cluster.on_gpu
    cluster.connect(
        config.cluster.workers + config.cluster.data_cpus,
        min_workers + config.cluster.data_cpus,
        gpus=config.cluster.workers * on_gpu
        + config.cluster.validation_gpus * bool(config.checkpoints.validate_every),
        min_gpus=min_workers * on_gpu,
    )


def resolve_uris(config: TrainConfig) -> TrainConfig:
    """Return the configuration with embedded defaults, absolute URIs, and aliases resolved to versions."""
    return override(
        config,
        train_data=storage.absolute(config.data.train_data or embedded("train")),
        val_data=storage.absolute(config.validation.val_data) if config.validation.val_data else "",
        output=storage.absolute(config.run.output),
        model=storage.absolute(config.model.model)
        if models.is_path(config.model.model)
        else pinned_model(config),
        tracking_uri=tracking.resolve_uri(config.tracking.tracking_uri),
    )


def check_prerequisites(config: TrainConfig, manifest: Manifest) -> None:
    """Check flags, data and model before workers start.

    Raises:
        ConfigError: the model cannot be built, images have more objects than the model has queries,
            masks to train on are missing, or `--val-data` has nothing to score.
        DataError: the data have no trainable objects or too many unusable ones, or `--val-data` is missing or has
            categories that the model does not have.
        RegistryError: `--model` does not exist.
    """
    require_distinct_names(manifest.categories, config.data.train_data)
    usable = trainable(manifest, config.run.task)
    require_trainable(config.data.train_data, manifest, usable, config.run.task)
    require_usable(
        config.data.train_data, usable, config.fault_tolerance.max_fault_share, read_faults(manifest.root)
    )
    if max(usable.shares):
        print(f"Not trained on: {usable.text()}; see faults.parquet in {config.data.train_data}.", flush=True)
    try:
        model = build_model(config, manifest)
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"The model cannot be built: {error}") from error
    if model.config.multi_scale is not None:
        config.require_multi_scale()
    elif config.model.architecture.multi_scale:
        raise ConfigError(
            f"--model {config.model.model} is not a multi-scale model: add --recipe fine-tune or detr-small, which keep its "
            "architecture."
        )
    for caution in preview.resolution_cautions(config, manifest, model):
        print(f"warning: {caution.problem}: {caution.remedy}.", flush=True)
    if (
        config.run.task in ("detection", "instance")
        and manifest.max_objects_per_image > model.config.num_queries
    ):
        remedy = (
            "Start from another --model, or train a new one with --num-queries"
            if config.model.model
            else "Give --num-queries"
        )
        raise ConfigError(
            f"The model has {model.config.num_queries} queries, but an image of {config.data.train_data} has "
            f"{manifest.max_objects_per_image} objects: a model can detect at most one object per query. "
            f"{remedy} {manifest.max_objects_per_image} or more (with slack)."
        )
    _require_masks(config, config.data.train_data, manifest)
    if config.validation.val_data:
        val_manifest = Manifest.load(config.validation.val_data)
        match_categories(model.config.id2label, val_manifest.categories)
        if not val_manifest.num_images or (
            config.run.task in ("detection", "instance") and not val_manifest.num_objects
        ):
            raise ConfigError(
                f"--val-data {config.validation.val_data} has {val_manifest.num_images} images with {val_manifest.num_objects} "
                "objects: there is nothing to score. Give other data, or remove --val-data."
            )
        _require_masks(config, config.validation.val_data, val_manifest)


def _require_masks(config: TrainConfig, uri: str, manifest: Manifest) -> None:
    if config.run.task == "detection" or not manifest.shards:
        return
    instances = config.run.task == "instance"
    columns = ["objects.list.element.segmentation"] if instances else ["panoptic_image"]
    for record in read_rows(manifest.root, manifest.shards[0].file, None, columns).to_pylist():
        if (
            any(item["segmentation"] for item in record["objects"] or ())
            if instances
            else record["panoptic_image"]
        ):
            return
    wanted = "annotations with a segmentation" if instances else "--panoptic-annotations and --panoptic-masks"
    raise ConfigError(
        f"--task is {config.run.task}, but no image in the first shard of {uri} has "
        f"{'a mask' if instances else 'a panoptic PNG'}: ingest the data with {wanted}."
    )


def start_workers(
    config: TrainConfig,
    manifest: Manifest,
    run_id: str,
    deadline: float | None,
    held: Held | None = None,
) -> None:
    """Run the workers until the last step is committed or the run stops early.

    Raises:
        TrainingError: workers failed more than `--max-failures` times, or the loop itself raised an error.
        TimeLimitError: `--max-hours` is over.
    """
    stream = Stream(
        source=shard_source(manifest),
        plan=build_plan(manifest, plan_spec(config), config.data.repeat_threshold),
        last_step=config.optimizer.steps,
        first_step=partial(checkpoint.last_committed_step, config.run.output),
        masks=config.run.masks,
    )
    background = can_validate_in_background(config)
    print(
        f"{stream.plan.steps_per_epoch} steps per epoch, {config.optimizer.steps / stream.plan.steps_per_epoch:.1f} epochs; "
        f"from step {stream.first_step()}",
        flush=True,
    )
    _print_estimate(config, manifest, config.optimizer.steps - stream.first_step())
    print(f"starting {config.cluster.workers} workers; the first step may take up to a minute", flush=True)
    outcome = _run_workers(config, manifest, stream, run_id, deadline, background, held)
    if outcome["error"]:
        raise TrainingError(outcome["error"])
    if outcome["stop_reason"] == OUT_OF_TIME:
        raise TimeLimitError(
            f"{config.run.output}: stopped after --max-hours {config.fault_tolerance.max_hours:g}; step "
            f"{checkpoint.last_committed_step(config.run.output)} of {config.optimizer.steps} is committed. Rerun the command to "
            "resume."
        )


def _print_estimate(config: TrainConfig, manifest: Manifest, steps: int) -> None:
    """Print how long the steps will take, if they run on this machine's CPUs and there are many."""
    if config.cluster.accelerator == "cpu" and cluster.nodes() == 1 and steps >= _ESTIMATED_STEPS:
        seconds = preview.estimate_step_seconds(config, manifest)
        print(
            f"about {seconds:.2g} s per step on this machine, at least {preview.format_duration(seconds * steps)} for "
            f"{steps:,} steps",
            flush=True,
        )


def _run_workers(
    config: TrainConfig,
    manifest: Manifest,
    stream: Stream,
    run_id: str,
    deadline: float | None,
    background: bool,
    held: Held | None,
) -> dict[str, str]:
    """Run the workers, including restarts, and return the result of `train_worker`."""
    # Ray Train kills a worker whose process has not answered for this time.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.fault_tolerance.hang_timeout_s)
    on_this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    trainer = scaling.Trainer(
        train_loop_per_worker,
        train_loop_config={
            "config": config,
            "data_digest": manifest.digest,
            "run_id": run_id,
            "deadline": deadline,
            "background": background,
            "held": held,
            "board": ray.remote(HeartbeatBoard)
            .options(num_cpus=0, scheduling_strategy=on_this_node)
            .remote(),
        },
        # Longer than the watchdog needs: a collective that waits for a hung worker must not time out before the
        # watchdog reports it.
        torch_config=TorchConfig(timeout_s=int(4 * config.fault_tolerance.hang_timeout_s) + 600),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=(config.cluster.min_workers, config.cluster.workers)  # type: ignore[arg-type]
            if config.cluster.min_workers
            else config.cluster.workers,
            elastic_resize_monitor_interval_s=scaling.RESIZE_EVERY_S,
            use_gpu=config.cluster.on_gpu,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if config.cluster.on_gpu else {})},
        ),
        run_config=RunConfig(
            # Unique for each start, so that Ray Train never restores state of its own: only our checkpoints count.
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{stream.first_step()}",
            storage_path=storage.join(config.run.output, "ray"),
            failure_config=FailureConfig(max_failures=config.fault_tolerance.max_failures),
        ),
        datasets={"train": stream},  # not a Ray Dataset: PlanDataConfig turns it into one
        dataset_config=PlanDataConfig(),
        validation_config=ValidationConfig(
            partial(validate, config=config, run_id=run_id),
            ray_remote_kwargs={
                "num_cpus": config.cluster.validation_cpus,
                "num_gpus": config.cluster.validation_gpus,
            },
        )
        if background
        else None,
        deadline=deadline,
    )
    try:
        outcome: dict[str, str] | None = trainer.fit().return_value  # type: ignore[attr-defined]
    except TrainingFailedError as error:
        if isinstance(error, ControllerError) and isinstance(error.controller_failure, TimeLimitError):
            # The time limit passed while no worker was running.
            return {"stop_reason": OUT_OF_TIME, "error": ""}
        raise TrainingError(f"{config.run.output}: training stopped: {error}") from error
    return outcome or {"stop_reason": "", "error": "the workers exited without returning a result"}


def can_validate_in_background(config: TrainConfig) -> bool:
    """Return whether the cluster has free resources for validation next to training; print a message if not."""
    if not config.checkpoints.validate_every:
        return False
    resources = ray.cluster_resources()
    gpus = config.cluster.workers * (config.cluster.on_gpu) + config.cluster.validation_gpus
    cpus = config.cluster.workers + config.cluster.data_cpus + config.cluster.validation_cpus
    if resources.get("CPU", 0) >= cpus and resources.get("GPU", 0) >= gpus:
        return True
    print(
        f"Training pauses for each validation: next to workers and data tasks, the cluster has no "
        f"{config.cluster.validation_cpus:g} CPU and {config.cluster.validation_gpus:g} GPU for it.",
        flush=True,
    )
    return False
