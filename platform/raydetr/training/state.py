"""What changes while training, and how it begins."""

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
    """Everything that changes while training.

    model: what is saved and served.
    module: what is trained: the model, or the model with further groups of queries around it.
    average: None without `--ema-decay`.
    step: steps done.
    images, skipped: images trained on, and those that could not be decoded, so far.
    non_finite: steps that were left out because the loss or the gradient was not finite.
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
    """A new model and its optimiser on the device, the same on every worker."""
    model = build_model(config, manifest)
    module: DetrForObjectDetection | DetrForSegmentation | QueryGroups = model
    if config.query_groups > 1 or config.dense_loss_weight:
        module = QueryGroups(model, config.query_groups, config.dense_loss_weight)
    if config.locality_init and not config.model:
        detector = model.detr if isinstance(model, DetrForSegmentation) else model
        extra = module.extra_queries if isinstance(module, QueryGroups) else None
        init_local_attention(detector.model, extra)
        if isinstance(model, DetrForSegmentation):
            init_mask_scales(model)
    if config.channels_last:
        # 1.3 times the images of a small net per second and core.
        model = model.to(memory_format=torch.channels_last)
    module.to(device)
    if config.precision == "float64":
        module.double()
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable()
    if config.compile:
        detector = model.detr if isinstance(model, DetrForSegmentation) else model
        network: Any = detector.model
        # Each size on its own, up to torch's limit of eight, then as always: code for all sizes at once is more than
        # torch 2.11 can do on a GPU, and what is recorded as a CUDA graph has one size. Without graphs a GPU waits for
        # Python most of the time.
        network.states = torch.compile(
            network.states, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None
        )
    module.train()
    return TrainingState(
        model=model,
        module=module,
        optimizer=build_optimizer(module, config),
        average=MovingAverage(model, config.ema_decay) if config.ema_decay else None,
        processor=image_processor(config),
    )


def parallelise(module: nn.Module) -> nn.Module:
    """The module whose gradients are averaged over the workers; itself where there is one."""
    if world_size() == 1:
        return module
    with warnings.catch_warnings():
        # torch 2.15 renames the argument; 2.9 knows only this name. There are no buffers to broadcast: batch
        # norm is frozen.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        parallel = DistributedDataParallel(module, gradient_as_bucket_view=True, broadcast_buffers=False)
    if dist.get_backend() == "gloo":  # NCCL adds up in an order of its own
        parallel.register_comm_hook(None, mean_by_rank)
    return parallel
