"""Identity of a run: its settings, its MLflow run, and the order of its data."""

import os
import sys
import uuid
from importlib import metadata
from typing import Any

import ray
import torch

from raydetr import cluster, storage
from raydetr.data.shards import MANIFEST, Manifest
from raydetr.data.stream.plan import PlanSpec
from raydetr.errors import TrainingError
from raydetr.flat_keys import flatten
from raydetr.registry import models, tracking
from raydetr.training import checkpoint
from raydetr.training.config import RENAMED, TrainConfig

RUN = "run.json"
KEY_TAG = "training.key"


def plan_spec(config: TrainConfig) -> PlanSpec:
    """Build the plan settings of a configuration: data order and augmentation."""
    return PlanSpec(
        seed=config.run.seed,
        micro_batch_size=config.optimizer.micro_batch_size,
        micro_batches=config.optimizer.micro_batches,
        window_row_groups=config.data.window_row_groups,
        group_sizes=config.data.group_sizes,
        augmentation=config.data.augmentation,
    )


def pinned_model(config: TrainConfig) -> str:
    """Return the URI of the model to start from, with an alias resolved to the version it had when the run started.

    Raises:
        ConfigError, RegistryError: the model, version or alias does not exist.
    """
    if not config.model.model.startswith("models:"):
        return config.model.model
    file = storage.join(config.run.output, RUN)
    started: dict[str, Any] = storage.read_json(file) if storage.exists(file) else {"identity": {}}
    pinned = started["identity"].get("model")
    if config.model.model in (pinned, started.get("asked_model")):
        return str(pinned)
    version = models.registered_version(
        config.model.model, tracking.resolve_uri(config.tracking.tracking_uri)
    )
    return f"models:/{version.name}/{version.version}"


def open_run(config: TrainConfig, manifest: Manifest, asked_model: str = "") -> str:
    """Return the id of the MLflow run of this output folder; start one for a new folder.

    Args:
        config: configuration of the run, with the model that `pinned_model` returns.
        manifest: manifest of the training data.
        asked_model: `--model` as the user gave it.

    Raises:
        TrainingError: the folder has a checkpoint of a run with other flags or other data.
    """
    identity = config.identity() | {
        "data_digest": manifest.digest,
        "val_digest": Manifest.load(config.validation.val_data).digest if config.validation.val_data else "",
    }
    file = storage.join(config.run.output, RUN)
    started: dict[str, Any] = {"run_id": None, "key": uuid.uuid4().hex}
    current = {"identity": identity, "config": flatten(config), "asked_model": asked_model}
    if storage.exists(file):
        started = storage.read_json(file)
        differing = _find_differences(config, identity, started["identity"])
        if differing and checkpoint.last_committed_step(config.run.output):
            raise TrainingError(
                f"{config.run.output} holds a run that was started with other values of {', '.join(differing)}: give "
                "the same flags to resume it, or another --output."
            )
    else:
        storage.write_json(file, started | current)
    # If the driver is killed before it stores the run id, the next one finds the MLflow run by this key.
    key = started.get("key", "")
    run_id = started["run_id"] or tracking.find_run_by_tag(
        config.tracking.tracking_uri, config.run.experiment, KEY_TAG, key
    )
    run_id = tracking.start_run(
        config.tracking.tracking_uri,
        config.run.experiment,
        os.path.basename(config.run.output.rstrip("/")),
        _params(config) | {"data_digest": manifest.digest},
        {"data_digest": manifest.digest, KEY_TAG: key, **environment_tags()},
        run_id,
    )
    storage.write_json(file, started | current | {"run_id": run_id})
    return run_id


def require_same_run(config: TrainConfig) -> None:
    """Check that the finished run in the output folder has these flags and data.

    Args:
        config: configuration of the run, with the model that `pinned_model` returns.

    Raises:
        TrainingError: the finished run had other flags or other data.
    """
    file = storage.join(config.run.output, RUN)
    if not storage.exists(file):
        return
    earlier = storage.read_json(file)["identity"]
    identity = config.identity()
    for name, data in (("data_digest", config.data.train_data), ("val_digest", config.validation.val_data)):
        # Data that were deleted after the run finished cannot be compared, and need not be.
        if data and storage.exists(storage.join(data, MANIFEST)):
            identity[name] = Manifest.load(data).digest
    if differing := _find_differences(config, identity, earlier):
        raise TrainingError(
            f"{config.run.output} holds a finished run with other values of {', '.join(differing)}: give another --output "
            "for a new run, or the same flags to see the result of the finished one."
        )


def _find_differences(config: TrainConfig, identity: dict[str, Any], earlier: dict[str, Any]) -> list[str]:
    """List the fields that differ from the run in the output folder and must not, sorted."""
    # A run that is older than a flag ran with what is now its default. `_as_json`: JSON has lists for tuples.
    earlier = {RENAMED.get(name, name): value for name, value in earlier.items()}
    earlier = TrainConfig().identity() | {"val_digest": identity.get("val_digest")} | earlier
    differing = sorted(name for name in identity if _as_json(identity[name]) != _as_json(earlier.get(name)))
    may_change = {*flatten(config.validation), "val_digest"}
    if may_change.issuperset(differing) and not checkpoint.validated_steps(config.run.output):
        return []
    return differing


def environment_tags() -> dict[str, str]:
    """Return tags that describe the software and the cluster."""
    versions = {
        f"environment.{name}": metadata.version(name) for name in ("torch", "ray", "timm", "torchvision")
    }
    resources = ray.cluster_resources()
    return versions | {
        "environment.code": cluster.code_digest(),
        "environment.python": sys.version.split()[0],
        "environment.cuda": str(torch.version.cuda),
        "environment.nodes": str(len([node for node in ray.nodes() if node["Alive"]])),
        "environment.cpus": f"{resources.get('CPU', 0):g}",
        "environment.gpus": f"{resources.get('GPU', 0):g}",
    }


def _params(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration, without the architecture if it comes from the config.json of `--model`."""
    unused = flatten(config.model.architecture) if config.model.model else {}
    return {name: value for name, value in flatten(config).items() if name not in unused}


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
