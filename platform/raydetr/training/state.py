"""Training state: model, optimizer, moving average and counters; how they are created."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detr.image_processing.processor import DetrImageProcessor
from detr.model.detection import DetrForObjectDetection
from detr.model.initialization import init_local_attention, init_mask_scales
from detr.model.segmentation import DetrForSegmentation
from detr.training.query_groups import QueryGroups
from raydetr.data.shards import Manifest
from raydetr.training.config import TrainConfig
from raydetr.training.distributed import mean_by_rank, world_size
from raydetr.training.model import build_model, image_processor
from raydetr.training.optim import MovingAverage, build_optimizer


@dataclass
class TrainingState:
    """Everything that changes during training.

    model: the model that is saved and served.
    module: the module that is trained: the model, or `QueryGroups` around it.
    average: moving average of the weights; None without `--ema-decay`.
    step: number of completed steps.
    images, skipped: number of images trained on, and of those that could not be decoded.
    non_finite: number of steps skipped because of a non-finite loss or gradient.
    """

    model: DetrForObjectDetection | DetrForSegmentation
    module: DetrForObjectDetection | DetrForSegmentation | QueryGroups
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None
    processor: DetrImageProcessor
    step: int = 0
    images: int = 0
    skipped: int = 0
    non_finite: int = 0


def create_state(config: TrainConfig, manifest: Manifest, device: torch.device) -> TrainingState:
    """Create the model and its optimizer on the device, identical on every worker."""
    model = build_model(config, manifest)
    module: DetrForObjectDetection | DetrForSegmentation | QueryGroups = model
    if config.loss.query_groups > 1 or config.loss.dense_loss_weight:
        module = QueryGroups(model, config.loss.query_groups, config.loss.dense_loss_weight)
    if config.model.architecture.locality_init and not config.model.model:
        detector = model.detr if isinstance(model, DetrForSegmentation) else model
        extra = module.extra_queries if isinstance(module, QueryGroups) else None
        init_local_attention(detector.model, extra)
        if isinstance(model, DetrForSegmentation):
            init_mask_scales(model)
    if config.optimizer.channels_last:
        # Measured: 1.3 times the images per second and core for a small network.
        model = model.to(memory_format=torch.channels_last)
    module.to(device)
    if config.optimizer.precision == "float64":
        module.double()
    if config.optimizer.activation_checkpointing:
        model.gradient_checkpointing_enable()
    if config.optimizer.compile:
        detector = model.detr if isinstance(model, DetrForSegmentation) else model
        network = detector.model
        # Compile for each batch shape separately, up to torch's limit of eight; further shapes run eagerly. torch 2.11
        # cannot compile dynamic shapes here on a GPU, and a CUDA graph has one fixed shape. Without CUDA graphs the GPU
        # waits for Python most of the time.
        compiled: Any = torch.compile(
            network.compute_states, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None
        )
        network.engine = lambda _, *inputs, **options: compiled(*inputs, **options)
    module.train()
    return TrainingState(
        model=model,
        module=module,
        optimizer=build_optimizer(module, config.optimizer),
        average=MovingAverage(model, config.optimizer.ema_decay) if config.optimizer.ema_decay else None,
        processor=image_processor(config),
    )


def parallelize(module: nn.Module) -> nn.Module:
    """Wrap the module in DistributedDataParallel; return it unchanged with a single worker."""
    if world_size() == 1:
        return module
    with warnings.catch_warnings():
        # torch 2.15 renames this argument; 2.9 has only this name. There are no buffers to broadcast, since batch
        # norm is frozen.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        parallel = DistributedDataParallel(module, gradient_as_bucket_view=True, broadcast_buffers=False)
    if dist.get_backend() == "gloo":  # NCCL chooses its own order of additions
        parallel.register_comm_hook(None, mean_by_rank)
    return parallel
