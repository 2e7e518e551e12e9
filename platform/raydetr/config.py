"""The flags of the pipelines, as dataclasses; `command.run` turns them into a command line. Those of training, the
most, are in `training/config.py`.

Addresses: data are folders or `s3://…` of shards; models are `models:/NAME@ALIAS`, `models:/NAME/VERSION`
or a folder. An empty address means the embedded default named in the field's docstring.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from raydetr.errors import ConfigError
from raydetr.mlflow_names import require_alias

FaultPolicy = Literal["keep", "skip-image", "fail"]


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """COCO JSON and images to Parquet shards with a manifest."""

    annotations: tuple[str, ...] = ()
    """COCO detection JSON, as it is or by gzip: a file or an s3:// address; several are ingested together, each with ids
    of its own; empty: panoptic annotations alone."""
    panoptic_annotations: str = ""
    """COCO panoptic JSON; empty: none."""
    panoptic_masks: str = ""
    """Folder of the panoptic PNGs."""
    images: tuple[str, ...]
    """Folder of the images that the JSON's `file_name` fields name; of several JSONs one for all, or one for each."""
    output: str
    """Folder for shards, manifest.json and faults.parquet."""
    on_fault: FaultPolicy = "keep"
    """keep: faults are marked and reported; skip-image: leave images with a fault out; fail: stop."""
    max_fault_share: float = 0.2
    """Share of the images, or of the objects, that may be unusable for training; more is an error."""
    orientation: Literal["auto", "apply", "ignore"] = "auto"
    """Images with an EXIF rotation. auto: turned upright where the JSON has the size of the turned image; apply: all;
    ignore: none."""
    crowds_as_objects: bool = False
    """Read iscrowd 1 as 0: CVAT writes the brush masks of single objects so."""
    follow_links: bool = False
    """Read images that symbolic links in --images point to outside of it."""
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
    check_duplicates_against: tuple[str, ...] = ()
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
        for name in ("annotations", "images"):
            value: str | tuple[str, ...] = getattr(self, name)
            if isinstance(value, str):  # a caller in Python with a single one
                object.__setattr__(self, name, (value,) if value else ())
        if self.split and self.append:
            raise ConfigError("--split and --append exclude each other: append to one of the parts.")
        if self.group_by and not self.split:
            raise ConfigError("--group-by needs --split.")
        require_share(self.max_fault_share)
        if len(self.images) not in (1, len(self.annotations)):
            raise ConfigError(
                f"--images names {len(self.images)} folders for {len(self.annotations)} --annotations: give one folder "
                "for all, or one for each."
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a model on a data set: COCO's figures of boxes and masks, panoptic quality, a report."""

    model: str = "models:/raydetr@challenger"
    """Model address."""
    data: str = ""
    """Shards to score on; empty: those of --images, else the embedded validation set."""
    annotations: str = ""
    """COCO detection JSON of a data set that is no shards yet: they are made first, once."""
    images: str = ""
    """Folder of its images."""
    panoptic_annotations: str = ""
    """Its COCO panoptic JSON; empty: none."""
    panoptic_masks: str = ""
    """Folder of its panoptic PNGs."""
    max_fault_share: float = 0.2
    """Share of its images, or of its objects, that may be unusable; more is an error."""
    task: Literal["auto", "detection", "instance", "panoptic", "panoptic-boxes"] = "auto"
    """detection: boxes of objects; instance: and their masks; panoptic: boxes and masks of things and stuff;
    panoptic-boxes: their boxes; auto: what the model predicts and the data set has."""
    precision: Literal["float32", "bf16"] = "float32"
    """What the model computes in."""
    engine: Literal["torch", "openvino"] = "torch"
    """What computes it; openvino, an extra, is faster on a CPU."""
    segment_threshold: float = 0.5
    """Least score of a query that becomes a panoptic segment."""
    output: str = ""
    """Folder for predictions, analysis.json, report.html and metrics.json; empty: runs/evaluations/<model>-<data
    digest>."""
    coco_json: bool = False
    """Write the predictions as COCO results too: results.json, of panoptic ones panoptic.json and PNGs."""
    actors: int = 1
    """Model replicas (Ray Data actors)."""
    batch_size: int = 8
    """Images of one canonical shape per forward pass."""
    num_gpus: float = 0.0
    """GPUs per model replica; 0 runs on CPU."""
    metric: str = "AP"
    """Metric that --min-metric bounds."""
    min_metric: float = 0.0
    """Minimum of --metric: below it the exit status is 4 and the run and the version are tagged `below`; 0: no minimum."""
    tracking_uri: str = ""
    """MLflow tracking address; empty: MLFLOW_TRACKING_URI, else SQLite under runs/."""
    json: str = ""
    """File for the summary as JSON."""

    def __post_init__(self) -> None:
        _require_positive(self, "actors", "batch_size")
        require_share(self.max_fault_share)
        _require_engine(self.engine, on_gpu=bool(self.num_gpus))
        if bool(self.images) != bool(self.annotations or self.panoptic_annotations):
            raise ConfigError(
                "--images goes with --annotations or --panoptic-annotations, and these with it."
            )
        if self.images and self.data:
            raise ConfigError("--data and --images exclude each other: give shards, or a COCO folder.")
        if not 0 <= self.segment_threshold < 1:
            raise ConfigError(
                f"--segment-threshold is {self.segment_threshold}: it is from 0 to less than 1."
            )


@dataclass(frozen=True, kw_only=True)
class PromoteConfig:
    """Move an alias to a model version that the gate lets through, or back (`--undo`).

    The gate compares the challenger with the version that the alias points to, on data that both are evaluated on.
    """

    model: str = "models:/raydetr@challenger"
    """Model address of the version to promote, the challenger."""
    alias: str = "champion"
    """Alias to move."""
    data: str = ""
    """Data to judge by: a digest, its beginning (8 digits or more), or the address of the shards; empty: the one data
    set that both versions are evaluated on."""
    metric: str = "AP"
    """Figure that must be better, as a whole and in no class much worse: AP, AP50, AP75, mask_AP or PQ."""
    margin: float = 0.0
    """The challenger's figure minus the champion's must be more than this; negative: so much worse will do."""
    tolerance: float = 0.0
    """How far below 0 the lower end of that difference's bootstrap interval may lie; 0: better beyond chance."""
    max_class_drop: float = 0.05
    """No class may lose more of the figure than this where its interval is wholly below 0, that is, beyond chance."""
    min_class_objects: int = 10
    """Classes with fewer objects in the data are not looked at."""
    max_latency_ms: float = 0.0
    """Most milliseconds of one image (95th percentile, measured now on this machine); 0: not measured."""
    latency_images: int = 50
    """Images of the data that latency is measured on, the first ones."""
    allow_contaminated_eval: bool = False
    """Accept data that a version was trained on, or that its best checkpoint or its end was chosen by, as judge."""
    replace_champion: bool = False
    """Replace a champion that cannot be compared, such as one with other classes, without a comparison; needs --reason.
    The challenger's own evaluation and report are required all the same."""
    reason: str = ""
    """Why, in your words; kept with the decision."""
    report: str = ""
    """HTML page of the comparison to write; it is an artifact of the decision's MLflow run in any case."""
    undo: bool = False
    """Move the alias back to where it was before its last promotion instead; again: one promotion further."""
    dry_run: bool = False
    """Decide and tell, but move and record nothing."""
    tracking_uri: str = ""
    """MLflow tracking address; empty: MLFLOW_TRACKING_URI, else SQLite under runs/."""
    json: str = ""
    """File for the summary as JSON, also of a refusal."""

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
                "--replace-champion promotes without a comparison: give the reason by --reason, and no --undo."
            )
        if len(self.reason) > 500:
            raise ConfigError(f"--reason has {len(self.reason)} characters: 500 at most are kept.")


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Detect objects in a folder of images: a Parquet file, COCO results, and pictures where asked for."""

    images: str
    """Folder or bucket of images (JPEG, PNG, WebP), folders in it included, or one file."""
    output: str = "runs/predict"
    """Folder for predictions.parquet, results.json and images.json."""
    model: str = ""
    """Model address; empty with an empty endpoint: models:/raydetr@champion."""
    endpoint: str = ""
    """Address of a running endpoint, e.g. http://127.0.0.1:8000; instead of a model."""
    task: Literal["detection", "instance", "panoptic"] = "detection"
    """instance: a mask of every detection; panoptic: one map of segments; both by a model with a mask head."""
    precision: Literal["float32", "bf16"] = "float32"
    """What the model computes in."""
    engine: Literal["torch", "openvino"] = "torch"
    """What computes it; openvino, an extra, is faster on a CPU."""
    segment_threshold: float = 0.5
    """Least score of a query that becomes a panoptic segment."""
    visualize: bool = False
    """Write each image with its detections drawn on it into the folder `pictures`."""
    threshold: float = 0.5
    """Lowest score of a detection that is drawn and counted; the files hold all of them."""
    orientation: Literal["apply", "ignore"] = "ignore"
    """apply: turn photos upright by their EXIF orientation; ignore: boxes are in pixels of the stored image."""
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
        _require_engine(self.engine, on_gpu=bool(self.num_gpus))
        if self.model and self.endpoint:
            raise ConfigError("--model and --endpoint exclude each other: give one of them.")
        if self.endpoint and self.task != "detection":
            raise ConfigError(f"--task {self.task}: an endpoint answers with boxes; give a model.")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"--threshold is {self.threshold}: a score is between 0 and 1.")

    @property
    def masks(self) -> Literal["none", "instance", "panoptic"]:
        """Which masks are predicted."""
        return "none" if self.task == "detection" else self.task


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Answer POST /v1/detect and /v1/segment with the model behind an alias."""

    model: str = "models:/raydetr@champion"
    """Model address."""
    alias_poll_s: float = 10.0
    """Seconds between looks where an alias points; the version it moves to is checked and then served. 0: never."""
    challenger: str = ""
    """Address of a second version to try on live traffic; an alias is followed. Empty: none."""
    canary: float = 0.0
    """Share of requests that the challenger answers, 0 to 1."""
    shadow: float = 0.0
    """Share of detections that it makes too, unseen, to be compared with the answer, 0 to 1."""
    host: str = "127.0.0.1"
    """Address to bind to; another than this machine's own wants --tokens."""
    port: int = 8000
    """Port to bind to."""
    tokens: str = ""
    """File of a line `sha256hex  name` for each token; read again when it changes. Empty: everybody may ask."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Of the model replicas. gpu is never replaced by cpu: without GPUs it is an error."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: bfloat16 but for the heads, with torch on a CPU by autocast."""
    engine: Literal["torch", "openvino"] = "torch"
    """What computes the model; openvino, an extra, is faster on a CPU."""
    num_gpus: float = 0.0
    """GPUs of a model replica with --device gpu, may be a fraction; 0: one."""
    replicas: int = 1
    """Model replicas; of autoscaling: at the beginning."""
    min_replicas: int = 1
    """Least model replicas of autoscaling; 0: none while nobody asks."""
    max_replicas: int = 0
    """Most model replicas; 0: no autoscaling."""
    ingress_replicas: int = 1
    """Processes that answer HTTP and prepare images."""
    max_batch_size: int = 8
    """Most images of one canonical shape per forward pass."""
    batch_wait_s: float = 0.01
    """Longest time an image waits for others, in seconds."""
    max_queued_images: int = 64
    """Images that wait for a replica, besides those that replicas have; beyond it the answer is 429."""
    max_bytes: int = 20 * 1024 * 1024
    """Most bytes of a request's body."""
    max_bytes_in_flight: int = 256 * 1024 * 1024
    """Maximum bytes of the bodies of all requests in one HTTP process; beyond it the answer is 429."""
    max_pixels: int = 89_478_485
    """Most pixels of an image."""
    max_images: int = 16
    """Most images of a request."""
    decode_s: float = 10.0
    """Maximum processor seconds for decoding one image; beyond it the answer is 413."""
    deadline_s: float = 60.0
    """Seconds within which a request is answered; then 504, and its work is dropped."""
    tracking_uri: str = ""
    """MLflow tracking address; empty: MLFLOW_TRACKING_URI, else SQLite under runs/."""
    json: str = ""
    """File for the summary as JSON, written once the endpoint is ready."""

    def __post_init__(self) -> None:
        _require_positive(
            self,
            *("replicas", "ingress_replicas", "max_batch_size", "max_queued_images"),
            *("max_bytes", "max_bytes_in_flight", "max_pixels", "max_images"),
        )
        if not 0 < self.port < 65536:
            raise ConfigError(f"--port is {self.port}: give one between 1 and 65535.")
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
            raise ConfigError(f"--num-gpus is {self.num_gpus} and --device is cpu: say --device gpu.")
        if self.max_replicas and self.max_replicas < max(self.min_replicas, self.replicas):
            raise ConfigError(
                f"--max-replicas is {self.max_replicas}, less than --replicas {self.replicas} or --min-replicas "
                f"{self.min_replicas}."
            )
        for name in ("canary", "shadow"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}: it is a share, 0 to 1.")
        if bool(self.challenger) != bool(self.canary or self.shadow):
            raise ConfigError(
                f"--challenger is {self.challenger!r}, --canary {self.canary} and --shadow {self.shadow}: give a "
                "challenger and at least one share of the traffic for it, or none of them."
            )
        if self.min_replicas != 1 and not self.max_replicas:
            raise ConfigError(f"--min-replicas is {self.min_replicas} without --max-replicas: give both.")


def require_share(max_fault_share: float) -> None:
    """Raise ConfigError where --max-fault-share is no share."""
    if not 0 <= max_fault_share <= 1:
        raise ConfigError(f"--max-fault-share is {max_fault_share}: it is a share, 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class TokenFileConfig:
    """Make a token for a client of the endpoint."""

    name: str
    """Of the client, for the request log."""
    tokens: str = "tokens"
    """File of a line `sha256hex  name` for each token; created where there is none. For serve.py --tokens."""
    token_file: str = ""
    """File for the token, readable by its owner alone; empty: it is printed."""
    json: str = ""
    """File for the summary as JSON, which has the token where it is printed."""


def _require_engine(engine: str, on_gpu: bool) -> None:
    if engine == "openvino" and on_gpu:
        raise ConfigError("--engine openvino computes on CPUs: leave out the GPUs, or say --engine torch.")
    if engine == "openvino" and find_spec("openvino") is None:
        raise ConfigError(
            "--engine openvino: OpenVINO is not installed: pip install 'raydetr[openvino]', here and on the nodes."
        )


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
    """Optimizer steps; 0: as many as the recipe `scenes` has."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and augmentation."""
    port: int = 8000
    """Port that the endpoint binds to on 127.0.0.1."""
    json: str = ""
    """File for the summary as JSON, besides summary.json."""
