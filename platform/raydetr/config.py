"""The flags of every pipeline, as dataclasses; `command.run` turns them into a command line.

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

    annotations: str
    """COCO detection JSON: a file or an s3:// address."""
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
    json: str = ""
    """File for the summary as JSON."""


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
    tracking_uri: str = ""
    """MLflow tracking address; empty: MLFLOW_TRACKING_URI, else SQLite under runs/."""
    json: str = ""
    """File for the summary as JSON."""


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
