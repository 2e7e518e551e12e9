"""Configuration of a training run: a group of settings for each component. `recipes` has presets.

The flag of a setting is its name, without the name of its group: `--steps` sets `config.optimizer.steps`. All names are
therefore distinct, and `flat_keys` reads and writes configurations under these flat names. The defaults are the paper's
(Carion et al. 2020, section 4 and appendix A.4) and those of the original code.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from detr.config import DetrConfig
from detr.image_processing.augment_spec import AugmentSpec
from detr.multiscale_config import MultiScaleConfig
from raydetr.errors import ConfigError
from raydetr.flat_keys import flatten, group_fields
from raydetr.mlflow_names import require_experiment, require_model_name

Task = Literal["detection", "instance", "panoptic", "panoptic-boxes"]
Precision = Literal["float32", "bf16", "float64"]

RENAMED = {
    "cell_loss": "dense_loss_weight",
    "clip_norm": "max_grad_norm",
    "drop_at": "lr_drop_at",
    "local_attention": "locality_init",
}
"""Old setting → new name, for files of runs that were started with version 0.1."""


def _require(holds: bool, group: Any, name: str, reason: str) -> None:
    if not holds:
        raise ConfigError(f"--{name.replace('_', '-')} is {getattr(group, name)}: {reason}.")


def _require_at_least(minimum: int, group: Any, *names: str) -> None:
    for name in names:
        reason = "it must not be negative" if minimum == 0 else f"it must be at least {minimum}"
        _require(getattr(group, name) >= minimum, group, name, reason)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data, their order and their size."""

    fixed: ClassVar[bool] = True
    train_data: str = ""
    """Shards to train on; empty: the training set of the demo scenes."""
    repeat_threshold: float = 0.0
    """Repeat images of categories that occur in a smaller share of the images (LVIS repeat factors); 0: every image
    once per epoch."""
    window_row_groups: int = 4
    """Row groups (of 32 records) that are read and shuffled together."""
    group_sizes: bool = True
    """Put images of similar size into the same step, for less padding."""
    test_edge: int = 800
    """Length of the shorter side for evaluation and serving."""
    augmentation: AugmentSpec = field(default_factory=AugmentSpec)

    def __post_init__(self) -> None:
        _require_at_least(1, self, "window_row_groups", "test_edge")
        _require(0 <= self.repeat_threshold <= 1, self, "repeat_threshold", "it must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class ArchitectureConfig:
    """Architecture of a new model; with --model, that of the model."""

    backbone: str = "resnet50"
    """Name of a timm model."""
    backbone_out_indices: tuple[int, ...] = (1, 2, 3, 4)
    """Indices of the backbone's feature maps to use; the last one feeds the transformer."""
    backbone_weights: str = "timm"
    """Initial backbone weights: a .pth or .safetensors file, package:NAME for the .pth file inside a Python package, or
    timm to let timm load or download them; empty: random."""
    d_model: int = DetrConfig.d_model
    """Width of the transformer."""
    encoder_layers: int = DetrConfig.encoder_layers
    """Number of encoder layers."""
    decoder_layers: int = DetrConfig.decoder_layers
    """Number of decoder layers."""
    attention_heads: int = DetrConfig.encoder_attention_heads
    """Number of attention heads per layer."""
    ffn_dim: int = DetrConfig.encoder_ffn_dim
    """Width of the feed-forward layers."""
    num_queries: int = DetrConfig.num_queries
    """Number of object queries: the maximum number of detections per image."""
    locality_init: bool = False
    """Initialize a new model for locality: queries spread over the image, half of the attention heads attending near
    their query, and masks that depend on their queries."""
    multi_scale: bool = False
    """Train the multi-scale architecture, which learns within minutes from backbone weights alone; transformers cannot
    load its files. --backbone-out-indices sets the strides."""
    nms_threshold: float = MultiScaleConfig.nms_threshold
    """multi-scale: queries start from locations whose boxes of the same class overlap with at most this IoU. Lower
    values give fewer duplicates; raise it if objects of the same class overlap."""
    compat: Literal["original", "transformers"] = "original"
    """Which implementation to follow where the original DETR and transformers differ: initialization, norms, input
    dropout."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "d_model", "attention_heads", "ffn_dim", "num_queries")
        _require(
            0 < self.nms_threshold <= 1,
            self,
            "nms_threshold",
            "it is an IoU and must be above 0 and at most 1",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to start from, and what is trained."""

    fixed: ClassVar[bool] = True
    model: str = ""
    """Model to start from: a folder, s3://…, hub:ORG/NAME, models:/NAME@ALIAS or models:/NAME/VERSION. Its class head
    is reinitialized if the classes differ. Empty: a new model."""
    freeze_detector: bool = False
    """instance, panoptic: freeze the detector of --model and train only the mask head: the second of two stages."""
    trainable_backbone_stages: int = DetrConfig.trainable_backbone_stages
    """Number of last backbone stages to train; 5: all of them and the stem."""
    dropout: float = DetrConfig.dropout
    """Dropout of the transformer."""
    architecture: ArchitectureConfig = ArchitectureConfig()

    def __post_init__(self) -> None:
        _require(0 <= self.dropout < 1, self, "dropout", "it must be at least 0 and less than 1")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Matching cost, loss and auxiliary tasks."""

    fixed: ClassVar[bool] = True
    auxiliary_loss: bool = True
    """Compute the loss on every decoder layer."""
    class_cost: float = DetrConfig.class_cost
    """Weight of the class in the matching cost."""
    bbox_cost: float = DetrConfig.bbox_cost
    """Weight of the L1 distance of boxes in the matching cost."""
    giou_cost: float = DetrConfig.giou_cost
    """Weight of GIoU in the matching cost."""
    bbox_loss_coefficient: float = DetrConfig.bbox_loss_coefficient
    """Weight of the L1 distance of boxes in the loss; the cross-entropy has weight 1."""
    giou_loss_coefficient: float = DetrConfig.giou_loss_coefficient
    """Weight of GIoU in the loss."""
    mask_loss_coefficient: float = DetrConfig.mask_loss_coefficient
    """Weight of the focal loss of masks."""
    dice_loss_coefficient: float = DetrConfig.dice_loss_coefficient
    """Weight of the Dice loss of masks."""
    eos_coefficient: float = DetrConfig.eos_coefficient
    """Class weight of "no object" in the cross-entropy."""
    query_groups: int = 1
    """Number of query groups in training, each matched separately (Group DETR); the saved model has only the first."""
    dense_loss_weight: float = 0.0
    """Weight of the dense supervision of encoder tokens: each token predicts the object at its location; 0: none."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "query_groups")
        _require_at_least(0, self, "dense_loss_weight")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Steps, batches, AdamW and precision."""

    fixed: ClassVar[bool] = True
    steps: int = 300_000
    """Optimizer steps."""
    micro_batch_size: int = 2
    """Images per micro-batch, which is what a worker processes at a time."""
    micro_batches: int = 8
    """Micro-batches per optimizer step. The global batch is this times --micro-batch-size, for any --workers."""
    learning_rate: float = 1e-4
    """Peak learning rate of the transformer and the heads."""
    backbone_learning_rate: float = 1e-5
    """Peak learning rate of the backbone."""
    weight_decay: float = 1e-4
    """Weight decay (AdamW)."""
    max_grad_norm: float = 0.1
    """Gradients with a larger norm are scaled down to this norm; 0: no clipping."""
    warmup_steps: int = 0
    """Steps of linear learning-rate warmup."""
    schedule: Literal["cosine", "step", "constant"] = "step"
    """Decay of the learning rate: cosine to 0, one step to a tenth, or none."""
    lr_drop_at: float = 2 / 3
    """schedule=step: fraction of --steps after which the learning rate drops to a tenth."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights, which becomes the model; 0: no average."""
    precision: Precision = "float32"
    """Precision of the model; bf16 uses autocast with the loss in float32."""
    activation_checkpointing: bool = False
    """Recompute the transformer layers in the backward pass: less memory, a third more time in these layers."""
    channels_last: bool = True
    """Use the channels-last memory format for convolutions."""
    compile: bool = False
    """torch.compile the network for the first eight batch shapes, half a minute each: faster steps on a GPU, most
    of all with small batches."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "steps", "micro_batch_size", "micro_batches")
        _require_at_least(
            0,
            self,
            "learning_rate",
            "backbone_learning_rate",
            "weight_decay",
            "max_grad_norm",
            "warmup_steps",
        )
        _require(0 <= self.lr_drop_at <= 1, self, "lr_drop_at", "it must be between 0 and 1")
        _require(0 <= self.ema_decay < 1, self, "ema_decay", "it must be at least 0 and less than 1")

    @property
    def images_per_step(self) -> int:
        """The global batch: images of an optimizer step, on all workers."""
        return self.micro_batch_size * self.micro_batches


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run."""

    fixed: ClassVar[bool] = True
    output: str = "runs/train"
    """Folder of the run, and its identity: rerun the command to resume it."""
    task: Task = "detection"
    """detection: boxes; instance: boxes and masks; panoptic: boxes and masks of things and stuff; panoptic-boxes: only
    the boxes of things and stuff, the first of two stages."""
    seed: int = 0
    """Seed of the initial weights, the order of the data, augmentation and dropout."""
    experiment: str = "training"
    """MLflow experiment."""

    def __post_init__(self) -> None:
        require_experiment(self.experiment, "--experiment")

    @property
    def masks(self) -> Literal["none", "instance", "panoptic", "panoptic-boxes"]:
        """Return which masks the data stream carries in addition to boxes."""
        return "none" if self.task == "detection" else self.task

    @property
    def segments(self) -> bool:
        """Return whether the model has a mask head."""
        return self.task in ("instance", "panoptic")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Data to validate on. They may change until the first validation, since metrics on different images cannot be compared."""

    fixed: ClassVar[bool] = True
    val_data: str = ""
    """Shards to validate on, during training (--validate-every) and at the end; empty: no validation."""
    validation_images: int = 0
    """Number of images of --val-data to score during training; 0: all."""

    def __post_init__(self) -> None:
        _require_at_least(0, self, "validation_images")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints, and their validation."""

    fixed: ClassVar[bool] = False
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to retain. The best one and those waiting for validation are retained as well."""
    validate_every: int = 0
    """Steps between validations on --val-data, a multiple of --checkpoint-every; 0: only at the end."""
    patience: int = 0
    """Stop early after this many validations without improvement of the main metric (AP, mask_AP or PQ, by --task); 0:
    never."""
    keep_best: bool = True
    """Use the checkpoint with the best validation as the final model, instead of the last one."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "checkpoint_every", "keep_checkpoints")
        _require_at_least(0, self, "validate_every", "patience")
        _require(
            self.validate_every % self.checkpoint_every == 0,
            self,
            "validate_every",
            f"it must be a multiple of --checkpoint-every ({self.checkpoint_every}), since checkpoints are validated",
        )
        _require(
            not self.patience or bool(self.validate_every), self, "patience", "it requires --validate-every"
        )


@dataclass(frozen=True, kw_only=True)
class FaultToleranceConfig:
    """What stops the run, and what it survives."""

    fixed: ClassVar[bool] = False
    max_hours: float = 0.0
    """Stop with a checkpoint and exit status 75 after this many hours; rerun the command to resume. 0: no limit."""
    max_failures: int = 10
    """Maximum number of worker failures to recover from; preempted nodes do not count."""
    hang_timeout_s: float = 1800.0
    """Seconds without progress after which a worker is reported and stopped, and all workers restart."""
    max_fault_share: float = 0.2
    """Maximum share of images, or of objects, that ingest found unusable; more is an error before the first step."""
    max_skipped: float = 0.01
    """Maximum share of images that cannot be decoded; the run stops when there are more."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """On a non-finite loss or gradient, stop the run or skip the step; the batch is saved for --replay."""
    max_non_finite: int = 10
    """on-non-finite=skip: maximum number of skipped steps; one more stops the run."""
    replay: str = ""
    """A file from OUTPUT/non-finite: replay its batch, print the first layer with a non-finite output or gradient, and
    exit without training."""

    def __post_init__(self) -> None:
        _require_at_least(0, self, "max_hours", "max_failures", "max_non_finite")
        for name in ("max_fault_share", "max_skipped"):
            _require(0 <= getattr(self, name) <= 1, self, name, "it must be between 0 and 1")
        _require(self.hang_timeout_s > 0, self, "hang_timeout_s", "it must be positive")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Workers and resources."""

    fixed: ClassVar[bool] = False
    workers: int = 2
    """Number of training workers, at most --micro-batches."""
    min_workers: int = 0
    """Elastic training: continue with as few as this many workers when nodes are lost, and grow back to --workers when
    nodes return; 0: always --workers."""
    accelerator: Literal["cpu", "gpu"] = "cpu"
    """Device of the workers; gpu: one GPU per worker."""
    data_cpus: int = 2
    """CPUs for data tasks, in addition to one per worker."""
    validation_cpus: float = 1.0
    """CPUs of a validation task. Training pauses during validation if the cluster has no CPUs left for it."""
    validation_gpus: float = 0.0
    """GPUs of a validation task. Training pauses during validation if the cluster has no GPUs left for it."""

    def __post_init__(self) -> None:
        _require_at_least(1, self, "workers")
        _require(
            self.data_cpus >= 1,
            self,
            "data_cpus",
            "it must be at least 1, since the run hangs if data tasks have no CPU",
        )
        _require_at_least(0, self, "min_workers", "validation_cpus", "validation_gpus")
        _require(self.min_workers <= self.workers, self, "min_workers", "it must not be above --workers")

    @property
    def on_gpu(self) -> bool:
        """Return whether each worker has a GPU."""
        return self.accelerator == "gpu"


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Registry, MLflow server and summary."""

    fixed: ClassVar[bool] = False
    name: str = "raydetr"
    """Name in the model registry; the new version gets the alias challenger. Empty: do not register."""
    tracking_uri: str = ""
    """MLflow tracking URI; empty: MLFLOW_TRACKING_URI if set, else SQLite under runs/."""
    json: str = ""
    """File to write the summary to, as JSON."""

    def __post_init__(self) -> None:
        if self.name:
            require_model_name(self.name, "--name")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a DETR. --recipe sets the defaults of all other flags.

    `fixed` says whether a resumed run must have the group's settings that it was started with. The other groups may
    change: they say where a run computes, when it stops and which checkpoint it keeps, not what a step computes.
    """

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig = RunConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    fault_tolerance: FaultToleranceConfig = FaultToleranceConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        _require(
            self.cluster.workers <= self.optimizer.micro_batches,
            self.cluster,
            "workers",
            f"but a step has only {self.optimizer.micro_batches} micro-batches: raise --micro-batches or lower "
            "--workers",
        )
        _require(
            not self.checkpoints.validate_every or bool(self.validation.val_data),
            self.checkpoints,
            "validate_every",
            "it requires --val-data",
        )
        if self.model.architecture.multi_scale:
            self.require_multi_scale()
        if self.model.freeze_detector and (self.run.masks == "none" or not self.model.model):
            raise ConfigError(
                "--freeze-detector trains the mask head of an existing detector: give --task instance or panoptic, "
                "and the detector as --model."
            )

    def require_multi_scale(self) -> None:
        """Raise ConfigError if a setting does not apply to the multi-scale architecture."""
        remedy = "multi-scale models do not support it: remove it, or use --recipe detr-small or detr-r50"
        _require(self.loss.query_groups == 1, self.loss, "query_groups", remedy)
        _require(self.loss.dense_loss_weight == 0, self.loss, "dense_loss_weight", remedy)
        _require(not self.model.architecture.locality_init, self.model.architecture, "locality_init", remedy)
        _require(not self.optimizer.compile, self.optimizer, "compile", remedy)

    @property
    def json(self) -> str:
        """Return the file for the summary; empty: none."""
        return self.tracking.json

    def identity(self) -> dict[str, object]:
        """Return the settings that a resumed run must repeat, by flat name."""
        return {
            name: value
            for group in group_fields(self)
            if group.fixed
            for name, value in flatten(group).items()
        }
