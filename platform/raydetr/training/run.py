"""What a run is: its identity, the MLflow run that belongs to it, the order of its data."""

import dataclasses
import os
import sys
import uuid
from importlib import metadata
from typing import Any

import ray
import torch

from detr.image_processing.augment import AugmentSpec
from raydetr import cluster, storage
from raydetr.data.shards import MANIFEST, Manifest
from raydetr.data.stream.plan import PlanSpec
from raydetr.errors import TrainingError
from raydetr.registry import models, tracking
from raydetr.training import checkpoint
from raydetr.training.config import ARCHITECTURE, TrainConfig

VALIDATED_ON = {"val_data", "val_digest", "validation_images"}
"""Fields that may differ until there are figures: those of other images cannot be compared with them."""
RUN = "run.json"
KEY_TAG = "training.key"
FREE_FIELDS = {
    "accelerator",
    "checkpoint_every",
    "data_cpus",
    "hang_timeout_s",
    "json",
    "keep_best",
    "keep_checkpoints",
    "max_failures",
    "max_fault_share",
    "max_hours",
    "max_non_finite",
    "max_skipped",
    "min_workers",
    "name",
    "on_non_finite",
    "patience",
    "replay",
    "tracking_uri",  # of a cluster whose head was lost: the server is at the new head's address
    "validate_every",
    "validation_cpus",
    "validation_gpus",
    "workers",
}
"""Fields that may differ when a run is resumed: they change how it is computed or followed, not what."""
RENAMED = {
    "cell_loss": "dense_loss_weight",
    "clip_norm": "max_grad_norm",
    "drop_at": "lr_drop_at",
    "local_attention": "locality_init",
}
"""Former names of fields, in the run.json of runs that were started with version 0.1."""


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


def pinned_model(config: TrainConfig) -> str:
    """The address of the model to start from, with what an alias meant when the run of this folder was begun.

    Raises:
        ConfigError, RegistryError: there is no such model, version or alias.
    """
    if not config.model.startswith("models:"):
        return config.model
    address = storage.join(config.output, RUN)
    begun: dict[str, Any] = storage.read_json(address) if storage.exists(address) else {"identity": {}}
    pinned = begun["identity"].get("model")
    if config.model in (pinned, begun.get("asked_model")):
        return str(pinned)
    version = models.registered_version(config.model, tracking.resolve_uri(config.tracking_uri))
    return f"models:/{version.name}/{version.version}"


def open_run(config: TrainConfig, manifest: Manifest, asked_model: str = "") -> str:
    """The MLflow run of this output folder: a new one, or the one it was begun with.

    Args:
        config: its model as `pinned_model` has it.
        manifest: of what is trained on.
        asked_model: `--model` as it was given.

    Raises:
        TrainingError: the folder belongs to a run with other flags or other data, of which a checkpoint is there.
    """
    identity = _flags(config) | {
        "data_digest": manifest.digest,
        "val_digest": Manifest.load(config.val_data).digest if config.val_data else "",
    }
    address = storage.join(config.output, RUN)
    begun: dict[str, Any] = {"run_id": None, "key": uuid.uuid4().hex}
    now = {"identity": identity, "asked_model": asked_model}
    if storage.exists(address):
        begun = storage.read_json(address)
        differing = _differing(config, identity, begun["identity"])
        if differing and checkpoint.last_committed_step(config.output):
            raise TrainingError(
                f"{config.output} holds a run that was begun with other values of {', '.join(differing)}: give "
                "the same flags to go on with it, or another --output."
            )
    else:
        storage.write_json(address, begun | now)
    # A driver that is killed in here finds the run by its key when it is started again.
    key = begun.get("key", "")
    run_id = begun["run_id"] or tracking.run_of_key(config.tracking_uri, config.experiment, KEY_TAG, key)
    run_id = tracking.start_run(
        config.tracking_uri,
        config.experiment,
        os.path.basename(config.output.rstrip("/")),
        _params(config) | {"data_digest": manifest.digest},
        {"data_digest": manifest.digest, KEY_TAG: key, **environment()},
        run_id,
    )
    storage.write_json(address, begun | now | {"run_id": run_id})
    return run_id


def require_same_run(config: TrainConfig) -> None:
    """Check that the finished run in the output folder is the requested one.

    Args:
        config: its model as `pinned_model` has it.

    Raises:
        TrainingError: it was made with other flags or other data.
    """
    address = storage.join(config.output, RUN)
    if not storage.exists(address):
        return
    earlier = storage.read_json(address)["identity"]
    identity = _flags(config)
    for name, data in (("data_digest", config.train_data), ("val_digest", config.val_data)):
        # Data that were deleted since then cannot have changed the run.
        if data and storage.exists(storage.join(data, MANIFEST)):
            identity[name] = Manifest.load(data).digest
    if differing := _differing(config, identity, earlier):
        raise TrainingError(
            f"{config.output} holds a finished run with other values of {', '.join(differing)}: give another --output "
            "for a new run, or the flags of that one to see its result."
        )


def _flags(config: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_FIELDS}


def _differing(config: TrainConfig, identity: dict[str, Any], earlier: dict[str, Any]) -> list[str]:
    """Names of what differs from the run in the output folder and may not, sorted."""
    # A run that was started before there was a flag had what is its default now. JSON has no tuples.
    earlier = {RENAMED.get(name, name): value for name, value in earlier.items()}
    earlier = dataclasses.asdict(TrainConfig()) | {"val_digest": identity.get("val_digest")} | earlier
    differing = sorted(name for name in identity if _plain(identity[name]) != _plain(earlier.get(name)))
    if VALIDATED_ON.issuperset(differing) and not checkpoint.validated_steps(config.output):
        return []
    return differing


def environment() -> dict[str, str]:
    """What a run was computed with, as tags."""
    versions = {
        f"environment.{name}": metadata.version(name) for name in ("torch", "ray", "timm", "torchvision")
    }
    there = ray.cluster_resources()
    return versions | {
        "environment.code": cluster.code_digest(),
        "environment.python": sys.version.split()[0],
        "environment.cuda": str(torch.version.cuda),
        "environment.nodes": str(len([node for node in ray.nodes() if node["Alive"]])),
        "environment.cpus": f"{there.get('CPU', 0):g}",
        "environment.gpus": f"{there.get('GPU', 0):g}",
    }


def _params(config: TrainConfig) -> dict[str, Any]:
    """The configuration without what a model that training starts from has of its own, in its config.json."""
    unused = ARCHITECTURE if config.model else ()
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in unused}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
