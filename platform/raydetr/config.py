"""The flags of the pipelines, as dataclasses; `command.run` turns them into a command line. Those of training, the
most, are in `training/config.py`.

Addresses: data are folders or `s3://…` of shards; models are `models:/NAME@ALIAS`, `models:/NAME/VERSION`
or a folder. An empty address means the embedded default named in the field's docstring.
"""

from dataclasses import dataclass
from typing import Literal

from raydetr.errors import ConfigError

FaultPolicy = Literal["keep", "skip-image", "fail"]


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """COCO JSON and images to Parquet shards with a manifest."""

    annotations: str = ""
    """COCO detection JSON: a file or an s3:// address; empty: panoptic annotations alone."""
    panoptic_annotations: str = ""
    """COCO panoptic JSON; empty: none."""
    panoptic_masks: str = ""
    """Folder of the panoptic PNGs."""
    images: str
    """Folder of the images that the JSON's `file_name` fields name."""
    output: str
    """Folder for shards, manifest.json and faults.parquet."""
    on_fault: FaultPolicy = "keep"
    """keep: faults are marked and reported; skip-image: leave images with a fault out; fail: stop."""
    seed: int = 0
    """Seed of the order in which records are written."""
    shard_bytes: int = 128 * 1024 * 1024
    """Target size of one shard in bytes of image data."""
    split: str = ""
    """Fractions, such as 0.8,0.1,0.1, of the folders train, val and test to write; empty: one data set."""
    group_by: str = ""
    """Field of the JSON's images whose values are not divided by --split."""
    append: bool = False
    """Add the images to the data set in --output, as new shards."""
    compare_with: tuple[str, ...] = ()
    """Shards that must share no picture with these, such as those of the training set: near-duplicates are faults."""
    classes: str = ""
    """JSON of old class name to new name, or null to drop it; empty: as they are."""
    report: str = ""
    """HTML page to write on what the data set holds, with pictures; empty: none. Of --split: on the first part."""
    num_queries: int = 100
    """Object queries that the report compares with."""
    json: str = ""
    """File for the summary as JSON."""

    @property
    def fractions(self) -> tuple[float, ...]:
        """The fractions of `split`.

        Raises:
            ConfigError: they are not numbers.
        """
        try:
            return tuple(float(part) for part in self.split.split(","))
        except ValueError as error:
            raise ConfigError(f"--split is {self.split!r}: expected numbers such as 0.8,0.1,0.1.") from error

    def __post_init__(self) -> None:
        if self.split and self.append:
            raise ConfigError("--split and --append exclude each other: append to one of the parts.")
        if self.group_by and not self.split:
            raise ConfigError("--group-by needs --split.")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a model on shards with the 12 COCO figures."""

    model: str = "models:/raydetr@challenger"
    """Model address."""
    data: str = ""
    """Shards to score on; empty: the embedded validation set."""
    output: str = ""
    """Folder for predictions and metrics.json; empty: runs/evaluations/<model>-<data digest>."""
    actors: int = 1
    """Model replicas (Ray Data actors)."""
    batch_size: int = 8
    """Images of one canonical shape per forward pass."""
    num_gpus: float = 0.0
    """GPUs per model replica; 0 runs on CPU."""
    tracking_uri: str = ""
    """MLflow tracking address; empty: MLFLOW_TRACKING_URI, else SQLite under runs/."""
    json: str = ""
    """File for the summary as JSON."""

    def __post_init__(self) -> None:
        _require_positive(self, "actors", "batch_size")


@dataclass(frozen=True, kw_only=True)
class PromoteConfig:
    """Move an alias to a model version that has an evaluation on file."""

    model: str = "models:/raydetr@challenger"
    """Model address of the version to promote."""
    alias: str = "champion"
    """Alias to move."""
    tracking_uri: str = ""
    """MLflow tracking address; empty: MLFLOW_TRACKING_URI, else SQLite under runs/."""
    json: str = ""
    """File for the summary as JSON."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Detect objects in a folder of images: pictures with boxes and a COCO results JSON."""

    images: str
    """Folder of images (JPEG, PNG, WebP), or one file."""
    output: str = "runs/predict"
    """Folder for the pictures and results.json."""
    model: str = ""
    """Model address; empty with an empty endpoint: models:/raydetr@champion."""
    endpoint: str = ""
    """Address of a running endpoint, e.g. http://127.0.0.1:8000; instead of a model."""
    threshold: float = 0.5
    """Lowest score of a box that is drawn; results.json holds all of them."""
    tracking_uri: str = ""
    """MLflow tracking address; empty: MLFLOW_TRACKING_URI, else SQLite under runs/."""
    json: str = ""
    """File for the summary as JSON."""

    def __post_init__(self) -> None:
        if self.model and self.endpoint:
            raise ConfigError("--model and --endpoint exclude each other: give one of them.")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"--threshold is {self.threshold}: a score is between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Answer POST /v1/detect with the model behind an alias."""

    model: str = "models:/raydetr@champion"
    """Model address."""
    host: str = "127.0.0.1"
    """Address to bind to."""
    port: int = 8000
    """Port to bind to."""
    replicas: int = 1
    """Model replicas."""
    max_batch_size: int = 8
    """Most images of one canonical shape per forward pass."""
    batch_wait_s: float = 0.01
    """Longest time an image waits for others, in seconds."""
    num_gpus: float = 0.0
    """GPUs per model replica; 0 runs on CPU."""
    tracking_uri: str = ""
    """MLflow tracking address; empty: MLFLOW_TRACKING_URI, else SQLite under runs/."""
    json: str = ""
    """File for the summary as JSON, written once the endpoint is ready."""

    def __post_init__(self) -> None:
        _require_positive(self, "replicas", "max_batch_size")
        if not 0 < self.port < 65536:
            raise ConfigError(f"--port is {self.port}: give one between 1 and 65535.")
        if self.batch_wait_s < 0:
            raise ConfigError(f"--batch-wait-s is {self.batch_wait_s}: it must not be negative.")


def _require_positive(config: object, *names: str) -> None:
    """Raise ConfigError where one of these fields is less than 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {getattr(config, name)}: it must be at least 1."
            )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole path on the embedded data set."""

    output: str = "runs/demo"
    """Folder of the run, its pictures and summary.json."""
    steps: int = 0
    """Optimiser steps; 0: as many as the recipe `small` has."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and augmentation."""
    port: int = 8000
    """Port that the endpoint binds to on 127.0.0.1."""
    json: str = ""
    """File for the summary as JSON, besides summary.json."""
