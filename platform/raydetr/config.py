"""Flags of the pipelines as dataclasses, which `command.run` turns into a command line.

The flags of training are in `training/config.py`. Data URIs are folders or `s3://…` prefixes of shards. Model URIs are
`models:/NAME@ALIAS`, `models:/NAME/VERSION` or a folder. An empty URI means the embedded default that the field's
docstring names.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from detr.config import EngineName
from raydetr.errors import ConfigError
from raydetr.mlflow_names import require_alias

FaultPolicy = Literal["keep", "skip-image", "fail"]


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Convert COCO JSON and images to Parquet shards with a manifest."""

    annotations: tuple[str, ...] = ()
    """COCO detection JSON, plain or gzipped: a path or an s3:// URI. Several files are ingested together; their ids may
    overlap. Empty: panoptic annotations only."""
    panoptic_annotations: str = ""
    """COCO panoptic JSON; empty: none."""
    panoptic_masks: str = ""
    """Folder of the panoptic PNGs."""
    images: tuple[str, ...]
    """Folder of the images that the JSON's `file_name` fields name. With several JSON files: one folder for all, or one
    for each."""
    output: str
    """Folder for shards, manifest.json and faults.parquet."""
    on_fault: FaultPolicy = "keep"
    """keep: mark and report faults; skip-image: also skip images with a fault; fail: stop at the first fault."""
    max_fault_share: float = 0.2
    """Maximum fraction of the images, or of the objects, that may be unusable for training; more is an error."""
    orientation: Literal["auto", "apply", "ignore"] = "auto"
    """Handling of EXIF rotation. auto: rotate images upright if the JSON has the size of the rotated image; apply:
    rotate all; ignore: rotate none."""
    crowds_as_objects: bool = False
    """Read iscrowd 1 as 0; for CVAT, which writes brush masks of single objects with iscrowd 1."""
    follow_links: bool = False
    """Follow symbolic links in --images that point outside that folder."""
    seed: int = 0
    """Seed of the order in which records are written."""
    shard_bytes: int = 128 * 1024 * 1024
    """Target size of a shard in bytes of image data."""
    split: str = ""
    """Fractions for the folders train, val and test, e.g. 0.8,0.1,0.1; empty: write one data set."""
    group_by: str = ""
    """Field of the JSON's images; images with the same value stay in the same part of --split."""
    append: bool = False
    """Add the images to the data set in --output as new shards."""
    check_duplicates_against: tuple[str, ...] = ()
    """Other shards to check for near-duplicate images, e.g. those of the training set; each match is a fault."""
    classes: str = ""
    """JSON file that maps class names to new names, or to null to drop the class; empty: no change."""
    report: str = ""
    """HTML report of the data set to write, with sample images; with --split, of the first part. Empty: none."""
    num_queries: int = 100
    """Number of object queries that the report compares with the objects per image."""
    json: str = ""
    """File for the summary as JSON."""

    @property
    def fractions(self) -> tuple[float, ...]:
        """Parse the fractions of `split`.

        Raises:
            ConfigError: they are not numbers.
        """
        try:
            return tuple(float(part) for part in self.split.split(","))
        except ValueError as error:
            raise ConfigError(f"--split is {self.split!r}: expected numbers such as 0.8,0.1,0.1.") from error

    def __post_init__(self) -> None:
        for name in ("annotations", "images"):
            value: str | tuple[str, ...] = getattr(self, name)
            if isinstance(value, str):  # Python callers may pass a single string
                object.__setattr__(self, name, (value,) if value else ())
        if self.split and self.append:
            raise ConfigError("--split and --append exclude each other: append to one of the parts.")
        if self.group_by and not self.split:
            raise ConfigError("--group-by requires --split.")
        require_share(self.max_fault_share)
        if len(self.images) not in (1, len(self.annotations)):
            raise ConfigError(
                f"--images names {len(self.images)} folders for {len(self.annotations)} --annotations: give one folder "
                "for all, or one for each."
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate a model on a data set: COCO metrics of boxes and masks, panoptic quality, an HTML report."""

    model: str = "models:/raydetr@challenger"
    """Model URI."""
    data: str = ""
    """Shards to evaluate on; empty: those made from --images, else the embedded validation set."""
    annotations: str = ""
    """COCO detection JSON of a data set that is not in shards; it is ingested first, once."""
    images: str = ""
    """Folder of the images of --annotations."""
    panoptic_annotations: str = ""
    """COCO panoptic JSON of the data set; empty: none."""
    panoptic_masks: str = ""
    """Folder of the panoptic PNGs."""
    max_fault_share: float = 0.2
    """Maximum fraction of the images, or of the objects, that may be unusable; more is an error."""
    task: Literal["auto", "detection", "instance", "panoptic", "panoptic-boxes"] = "auto"
    """detection: boxes of objects; instance: boxes and masks of objects; panoptic: boxes and masks of things and stuff;
    panoptic-boxes: boxes of things and stuff; auto: whatever the model predicts and the data set has."""
    precision: Literal["float32", "bf16"] = "float32"
    """Data type that the model computes in."""
    engine: EngineName = "torch"
    """Inference engine; openvino, an optional extra, is faster on a CPU."""
    segment_threshold: float = 0.5
    """Minimum score of a query that becomes a panoptic segment."""
    output: str = ""
    """Folder for predictions, analysis.json, report.html and metrics.json; empty: runs/evaluations/<model>-<data
    digest>."""
    coco_json: bool = False
    """Also write the predictions as COCO results: results.json, or panoptic.json and PNGs."""
    actors: int = 1
    """Model replicas (Ray Data actors)."""
    batch_size: int = 8
    """Images of one canonical shape per forward pass."""
    num_gpus: float = 0.0
    """GPUs per model replica; 0 runs on CPU."""
    metric: str = "AP"
    """Metric that --min-metric applies to."""
    min_metric: float = 0.0
    """Minimum of --metric; below it the exit status is 4 and run and version are tagged `below`; 0: no minimum."""
    tracking_uri: str = ""
    """MLflow tracking URI; empty: MLFLOW_TRACKING_URI, else SQLite under runs/."""
    json: str = ""
    """File for the summary as JSON."""

    def __post_init__(self) -> None:
        _require_positive(self, "actors", "batch_size")
        require_share(self.max_fault_share)
        _require_engine(self.engine, on_gpu=bool(self.num_gpus))
        if bool(self.images) != bool(self.annotations or self.panoptic_annotations):
            raise ConfigError(
                "--images needs --annotations or --panoptic-annotations, and these need --images: give both."
            )
        if self.images and self.data:
            raise ConfigError("--data and --images exclude each other: give shards, or a COCO folder.")
        if not 0 <= self.segment_threshold < 1:
            raise ConfigError(
                f"--segment-threshold is {self.segment_threshold}: it must be at least 0 and less than 1."
            )


@dataclass(frozen=True, kw_only=True)
class PromoteConfig:
    """Promote a model version: move an alias to it if the gate passes, or move the alias back (`--undo`).

    The gate compares the challenger with the version that the alias points to, on data that both were evaluated on.
    """

    model: str = "models:/raydetr@challenger"
    """Model URI of the challenger, the version to promote."""
    alias: str = "champion"
    """Alias to move."""
    data: str = ""
    """Evaluation data: a digest, a prefix of one (8 digits or more), or the URI of the shards; empty: the only data set
    that both versions were evaluated on."""
    metric: str = "AP"
    """Metric that must improve overall and drop in no class by much: AP, AP50, AP75, mask_AP or PQ."""
    margin: float = 0.0
    """The challenger's metric minus the champion's must exceed this; a negative margin accepts a worse metric."""
    tolerance: float = 0.0
    """The lower bound of that difference's 95 % interval must be at least minus this; 0: significantly better."""
    max_class_drop: float = 0.05
    """Maximum drop of the metric in a class whose interval of the difference lies entirely below 0."""
    min_class_objects: int = 10
    """Ignore classes with fewer objects in the data."""
    max_latency_ms: float = 0.0
    """Maximum milliseconds per image: 95th percentile, measured on this machine during the promotion; 0: not
    measured."""
    latency_images: int = 50
    """Measure latency on this many images, the first of the data."""
    allow_contaminated_eval: bool = False
    """Accept evaluation data that a version was trained on, or that its best checkpoint or its end was selected on."""
    replace_champion: bool = False
    """Promote without a comparison, to replace a champion that cannot be compared, such as one with other classes.
    Requires --reason, and the challenger's own evaluation and report."""
    reason: str = ""
    """Reason in your own words, stored with the decision."""
    report: str = ""
    """HTML page of the comparison to write; the decision's MLflow run always has it as an artifact."""
    undo: bool = False
    """Move the alias back to where it was before its last promotion; repeat it to go back further."""
    dry_run: bool = False
    """Print the decision, but move and record nothing."""
    tracking_uri: str = ""
    """MLflow tracking URI; empty: MLFLOW_TRACKING_URI, else SQLite under runs/."""
    json: str = ""
    """File for the summary as JSON; written after a refusal too."""

    def __post_init__(self) -> None:
        require_alias(self.alias, "--alias")
        _require_positive(self, "latency_images")
        for name in ("tolerance", "max_class_drop", "min_class_objects", "max_latency_ms"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must not be negative."
                )
        if self.replace_champion and (self.undo or not self.reason.strip()):
            raise ConfigError(
                "--replace-champion promotes without a comparison: give the reason with --reason, and no --undo."
            )
        if len(self.reason) > 500:
            raise ConfigError(f"--reason has {len(self.reason)} characters: give at most 500.")


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Detect objects in a folder of images: write a Parquet file, COCO results, and overlays with --visualize."""

    images: str
    """Folder or bucket of images (JPEG, PNG, WebP), subfolders included, or one file."""
    output: str = "runs/predict"
    """Folder for predictions.parquet, results.json and images.json."""
    model: str = ""
    """Model URI; empty without --endpoint: models:/raydetr@champion."""
    endpoint: str = ""
    """URL of a running endpoint to use instead of a model, e.g. http://127.0.0.1:8000."""
    task: Literal["detection", "instance", "panoptic"] = "detection"
    """instance: a mask for each detection; panoptic: one segment map per image; both need a model with a mask head."""
    precision: Literal["float32", "bf16"] = "float32"
    """Data type that the model computes in."""
    engine: EngineName = "torch"
    """Inference engine; openvino, an optional extra, is faster on a CPU."""
    segment_threshold: float = 0.5
    """Minimum score of a query that becomes a panoptic segment."""
    visualize: bool = False
    """Write each image with its detections drawn on it to the folder `pictures`."""
    threshold: float = 0.5
    """Minimum score of a detection that is drawn and counted; the files contain all detections."""
    orientation: Literal["apply", "ignore"] = "ignore"
    """apply: rotate photos upright by their EXIF orientation; ignore: boxes are in pixels of the stored image."""
    actors: int = 1
    """Model replicas (Ray Data actors)."""
    batch_size: int = 8
    """Images of one canonical shape per forward pass."""
    num_gpus: float = 0.0
    """GPUs per model replica; 0 runs on CPU."""
    tracking_uri: str = ""
    """MLflow tracking URI; empty: MLFLOW_TRACKING_URI, else SQLite under runs/."""
    json: str = ""
    """File for the summary as JSON."""

    def __post_init__(self) -> None:
        _require_positive(self, "actors", "batch_size")
        _require_engine(self.engine, on_gpu=bool(self.num_gpus))
        if self.model and self.endpoint:
            raise ConfigError("--model and --endpoint exclude each other: give one of them.")
        if self.endpoint and self.task != "detection":
            raise ConfigError(f"--task {self.task}: with --endpoint only boxes are predicted: give --model.")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"--threshold is {self.threshold}: it must be from 0 to 1.")

    @property
    def masks(self) -> Literal["none", "instance", "panoptic"]:
        """Kind of masks that the task predicts."""
        return "none" if self.task == "detection" else self.task


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serve POST /v1/detect and /v1/segment with the model version behind an alias."""

    model: str = "models:/raydetr@champion"
    """Model URI."""
    alias_poll_s: float = 10.0
    """Seconds between checks of where an alias points; a new version is verified, then served. 0: never."""
    challenger: str = ""
    """Model URI of a second version to try on live traffic; if it is an alias, its moves are followed. Empty: none."""
    canary: float = 0.0
    """Fraction of requests that the challenger answers, 0 to 1."""
    shadow: float = 0.0
    """Fraction of detections, 0 to 1, that the challenger repeats in the background to compare them with the answer."""
    host: str = "127.0.0.1"
    """Address to bind to; one that other machines can reach requires --tokens."""
    port: int = 8000
    """Port to bind to."""
    tokens: str = ""
    """File with a line `sha256hex  name` for each token, reloaded when it changes. Empty: no authentication."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device of the model replicas. gpu without GPUs is an error: serving never falls back silently to CPU."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: bfloat16 except for the heads; with torch on a CPU by autocast."""
    engine: EngineName = "torch"
    """Inference engine; openvino, an optional extra, is faster on a CPU."""
    num_gpus: float = 0.0
    """GPUs per model replica with --device gpu, may be a fraction; 0: one."""
    replicas: int = 1
    """Model replicas; with autoscaling, the initial number."""
    min_replicas: int = 1
    """Minimum model replicas of autoscaling; 0: scale to zero without requests."""
    max_replicas: int = 0
    """Maximum model replicas of autoscaling; 0: no autoscaling."""
    ingress_replicas: int = 1
    """Processes that answer HTTP and prepare images."""
    max_batch_size: int = 8
    """Maximum images of one canonical shape per forward pass."""
    batch_wait_s: float = 0.01
    """Maximum seconds that an image waits for a batch to fill."""
    max_queued_images: int = 64
    """Maximum requests that wait for a replica in a process of the HTTP ingress, not counting those on replicas; beyond
    it the answer is 429."""
    max_bytes: int = 20 * 1024 * 1024
    """Maximum bytes of a request's body."""
    max_bytes_in_flight: int = 256 * 1024 * 1024
    """Maximum bytes of the bodies of all requests in one HTTP process; beyond it the answer is 429."""
    max_pixels: int = 89_478_485
    """Maximum pixels of an image."""
    max_images: int = 16
    """Maximum images of a request."""
    decode_s: float = 10.0
    """Maximum CPU seconds for decoding one image; beyond it the answer is 413."""
    deadline_s: float = 60.0
    """Maximum seconds for a request; beyond it the answer is 504 and its work is dropped."""
    tracking_uri: str = ""
    """MLflow tracking URI; empty: MLFLOW_TRACKING_URI, else SQLite under runs/."""
    json: str = ""
    """File for the summary as JSON, written once the endpoint is ready."""

    def __post_init__(self) -> None:
        _require_positive(
            self,
            *("replicas", "ingress_replicas", "max_batch_size", "max_queued_images"),
            *("max_bytes", "max_bytes_in_flight", "max_pixels", "max_images"),
        )
        if not 0 < self.port < 65536:
            raise ConfigError(f"--port is {self.port}: it must be from 1 to 65535.")
        for name in ("deadline_s", "decode_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be above 0.")
        for name in ("batch_wait_s", "alias_poll_s", "num_gpus", "min_replicas", "max_replicas"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}: it must not be negative."
                )
        _require_engine(self.engine, on_gpu=self.device == "gpu")
        if self.num_gpus and self.device == "cpu":
            raise ConfigError(f"--num-gpus is {self.num_gpus} and --device is cpu: set --device gpu.")
        if self.max_replicas and self.max_replicas < max(self.min_replicas, self.replicas):
            raise ConfigError(
                f"--max-replicas is {self.max_replicas}, less than --replicas {self.replicas} or --min-replicas "
                f"{self.min_replicas}: raise it or lower these."
            )
        for name in ("canary", "shadow"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}: it must be from 0 to 1.")
        if bool(self.challenger) != bool(self.canary or self.shadow):
            raise ConfigError(
                f"--challenger is {self.challenger!r}, --canary {self.canary} and --shadow {self.shadow}: give a "
                "challenger with at least one of --canary and --shadow, or none of them."
            )
        if self.min_replicas != 1 and not self.max_replicas:
            raise ConfigError(f"--min-replicas is {self.min_replicas} without --max-replicas: give both.")


def require_share(max_fault_share: float) -> None:
    """Raise ConfigError if --max-fault-share is not from 0 to 1."""
    if not 0 <= max_fault_share <= 1:
        raise ConfigError(f"--max-fault-share is {max_fault_share}: it must be from 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class TokenFileConfig:
    """Create a token for a client of the endpoint."""

    name: str
    """Name of the client, for the request log."""
    tokens: str = "tokens"
    """File with a line `sha256hex  name` for each token, for serve.py --tokens; created if it does not exist."""
    token_file: str = ""
    """File for the token, readable by its owner only; empty: print the token."""
    json: str = ""
    """File for the summary as JSON; it contains the token if the token is printed."""


def _require_engine(engine: str, on_gpu: bool) -> None:
    if engine == "openvino" and on_gpu:
        raise ConfigError("--engine openvino runs on CPUs only: request no GPUs, or set --engine torch.")
    if engine == "openvino" and find_spec("openvino") is None:
        raise ConfigError(
            "--engine openvino: OpenVINO is not installed: pip install 'raydetr[openvino]', here and on the nodes."
        )


def _require_positive(config: object, *names: str) -> None:
    """Raise ConfigError if one of these fields is less than 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {getattr(config, name)}: it must be at least 1."
            )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Run all stages on the generated demo scenes."""

    output: str = "runs/demo"
    """Folder of the run, its plots and images, and summary.json."""
    steps: int = 0
    """Optimizer steps; 0: those of the recipe `scenes`."""
    seed: int = 0
    """Seed of the initial weights, the data order and the augmentation."""
    port: int = 8000
    """Port that the endpoint binds to on 127.0.0.1."""
    json: str = ""
    """Additional file for the summary as JSON, next to summary.json in --output."""
