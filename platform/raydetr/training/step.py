"""One optimizer step of one worker. It reads as single-device code; the other workers enter through two sums."""

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
    """Take one optimizer step over this worker's micro-batches.

    With a non-finite loss or gradient (`is_finite(metrics)` is False on every worker) weights and optimizer state stay
    unchanged, and the gradients remain for inspection. `state.step` never changes here.

    Args:
        parallel: `state.module` wrapped by `parallelize`.
        state: training state, changed in place.
        batches: this worker's micro-batches of the step.
        config: configuration of the run.
        totals: sums over all workers' micro-batches, from `step_totals`.

    Returns:
        The metrics of the whole step.
    """
    losses = compute_gradients(parallel, state, batches, config, totals.num_boxes, totals.class_weight_sum)
    # Each worker has its share of the losses times W, so their mean over workers is the loss of the global batch.
    names = sorted(losses)
    values = all_reduce(torch.stack([losses[name].double() for name in names]).cpu()) / world_size()
    metrics = dict(zip(names, values.tolist(), strict=True))
    parameters = [parameter for parameter in state.module.parameters() if parameter.requires_grad]
    limit = config.optimizer.max_grad_norm or math.inf
    metrics["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    if is_finite(metrics):
        metrics |= set_learning_rates(state.optimizer, batches[0].step, config.optimizer)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=False)
        if state.average:
            state.average.update(batches[0].step)
    return metrics


def is_finite(metrics: dict[str, float]) -> bool:
    """Return whether the loss and the gradient norm of a step are finite."""
    return math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])


def compute_gradients(
    parallel: torch.nn.Module,
    state: TrainingState,
    batches: Sequence[TrainingBatch],
    config: TrainConfig,
    num_boxes: float,
    class_weight_sum: float,
) -> dict[str, Tensor]:
    """Accumulate the gradients of a step, and return this worker's sums of the loss terms, times W."""
    if config.optimizer.compile:
        allocate_gradients(state.module)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        seed_dropout(config.run.seed, batch.step, batch.position)
        arguments = to_arguments(batch, state)
        synchronize = batch is batches[-1]
        with accumulate(parallel, synchronize), autocast(config, arguments["pixel_values"].device):
            outputs = parallel(**arguments, num_boxes=num_boxes, class_weight_sum=class_weight_sum)
            outputs.loss.backward()
        for name, value in {"loss": outputs.loss, **outputs.loss_dict}.items():
            sums[name] = sums.get(name, 0) + value.detach()
    return sums


def allocate_gradients(module: torch.nn.Module) -> None:
    """Allocate the gradient of every parameter before the first backward pass.

    Otherwise `parameter.grad` would be memory of the recorded CUDA graph, which its next replay overwrites.
    """
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def to_arguments(batch: TrainingBatch, state: TrainingState) -> dict[str, Any]:
    """Return the arguments of the model's forward for a micro-batch, on the model's device."""
    pixel_values, pixel_mask = to_device(batch, state)
    device = pixel_values.device
    return {
        "pixel_values": pixel_values,
        "pixel_mask": pixel_mask,
        "labels": [{name: value.to(device) for name, value in each.items()} for each in batch.labels],
        "image_weights": batch.weights.to(device),
    }


def to_device(batch: TrainingBatch, state: TrainingState) -> tuple[Tensor, Tensor]:
    """Pad and normalize the images of a micro-batch on the model's device.

    Returns:
        pixel_values: [B, 3, H, W] in the model's dtype, normalized, zero in the padding.
        pixel_mask: bool [B, H, W], True on pixels of the image.
    """
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
            # Transfer uint8 first: `copy_` with a dtype conversion would convert before the transfer.
            slot[:, :height, :width].copy_(image.to(device)).sub_(mean * 255).div_(std * 255)
    return pixels, batch.pixel_mask().to(device)


def accumulate(parallel: torch.nn.Module, synchronize: bool) -> AbstractContextManager[None]:
    """Return a context that suppresses the gradient all-reduce in all micro-batches of a step but the last."""
    if synchronize or not isinstance(parallel, DistributedDataParallel):
        return nullcontext()
    return parallel.no_sync()


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Return the autocast context of `--precision bf16`; the criterion itself computes in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.optimizer.precision == "bf16")


def seed_dropout(seed: int, step: int, position: int) -> None:
    """Seed torch as a function of (seed, step, micro-batch), so that a restart needs no random state for dropout."""
    digest = hashlib.blake2b(f"{seed}/dropout/{step}/{position}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little", signed=True))
