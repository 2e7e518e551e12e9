"""One optimiser step of one worker. It reads as single-device code; what the others know enters through two sums."""

import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from raydetr.data.stream.micro_batch import TrainingBatch
from raydetr.training.config import TrainConfig
from raydetr.training.distributed import StepTotals, all_reduce, world_size
from raydetr.training.optim import set_learning_rates
from raydetr.training.state import TrainingState


def train_step(
    parallel: torch.nn.Module,
    state: TrainingState,
    batches: Sequence[TrainingBatch],
    config: TrainConfig,
    totals: StepTotals,
) -> dict[str, float]:
    """One optimiser step over this worker's micro-batches.

    The optimiser does nothing where the loss or the gradient is not finite, which `is_finite` of the metrics says,
    on every worker alike. The gradients are left for who wants to look at them; `state.step` does not move.

    Args:
        parallel: `state.module`, as `parallelise` returns it.
        state: to be changed.
        batches: this worker's micro-batches of the step.
        config: of the run.
        totals: of all workers' micro-batches, from `step_totals`.

    Returns:
        the metrics of the whole step.
    """
    losses = compute_gradients(parallel, state, batches, config, totals.num_boxes, totals.class_weight_sum)
    # Every worker holds its share of the losses times W: their mean is the loss of the global batch.
    names = sorted(losses)
    values = all_reduce(torch.stack([losses[name].double() for name in names]).cpu()) / world_size()
    metrics = dict(zip(names, values.tolist(), strict=True))
    parameters = [parameter for parameter in state.module.parameters() if parameter.requires_grad]
    limit = config.max_grad_norm or math.inf
    metrics["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    if is_finite(metrics):
        metrics |= set_learning_rates(state.optimizer, batches[0].step, config)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=False)
        if state.average:
            state.average.update(batches[0].step)
    return metrics


def is_finite(metrics: dict[str, float]) -> bool:
    """Whether a step's loss and gradient are numbers to go on with."""
    return math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])


def compute_gradients(
    parallel: torch.nn.Module,
    state: TrainingState,
    batches: Sequence[TrainingBatch],
    config: TrainConfig,
    num_boxes: float,
    class_weight_sum: float,
) -> dict[str, Tensor]:
    """Accumulate the gradients of a step; returns this worker's sums of the loss terms, times W."""
    if config.compile:
        keep_gradients(state.module)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        seed_dropout(config.seed, batch.step, batch.position)
        arguments = to_arguments(batch, state)
        synchronise = batch is batches[-1]
        with accumulate(parallel, synchronise), autocast(config, arguments["pixel_values"].device):
            outputs = parallel(**arguments, num_boxes=num_boxes, class_weight_sum=class_weight_sum)
            outputs.loss.backward()
        for name, value in {"loss": outputs.loss, **outputs.loss_dict}.items():
            sums[name] = sums.get(name, 0) + value.detach()
    return sums


def keep_gradients(module: torch.nn.Module) -> None:
    """Give every parameter a gradient to add to: that of a recorded backward pass lies where the next one writes."""
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def to_arguments(batch: TrainingBatch, state: TrainingState) -> dict[str, Any]:
    """What the model is given of a micro-batch, on its device."""
    pixel_values, pixel_mask = to_device(batch, state)
    device = pixel_values.device
    return {
        "pixel_values": pixel_values,
        "pixel_mask": pixel_mask,
        "labels": [{name: value.to(device) for name, value in each.items()} for each in batch.labels],
        "image_weights": batch.weights.to(device),
    }


def to_device(batch: TrainingBatch, state: TrainingState) -> tuple[Tensor, Tensor]:
    """(pixel_values [B, 3, H, W] normalised and zero where padded, pixel_mask bool [B, H, W])."""
    parameter = next(state.model.parameters())
    device, dtype = parameter.device, parameter.dtype
    mean, std = (
        torch.tensor(values, dtype=dtype, device=device)[:, None, None]
        for values in (state.processor.image_mean, state.processor.image_std)
    )
    shape = (len(batch.images), 3, *batch.shape)
    pixels = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last).zero_()
    for slot, image in zip(pixels, batch.images, strict=True):
        if image is not None:
            _, height, width = image.shape
            # To the device as bytes: a copy that converts would do so before.
            slot[:, :height, :width].copy_(image.to(device)).sub_(mean * 255).div_(std * 255)
    return pixels, batch.pixel_mask().to(device)


def accumulate(parallel: torch.nn.Module, synchronise: bool) -> AbstractContextManager[None]:
    """Gradients cross the network once a step, with the last micro-batch."""
    if synchronise or not isinstance(parallel, DistributedDataParallel):
        return nullcontext()
    return parallel.no_sync()


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 for what tolerates it; the criterion computes in float32 by itself."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")


def seed_dropout(seed: int, step: int, position: int) -> None:
    """Make dropout a function of (seed, step, micro-batch): no random state is carried over a restart."""
    digest = hashlib.blake2b(f"{seed}/dropout/{step}/{position}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little", signed=True))
