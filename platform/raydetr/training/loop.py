"""The training loop of one worker. It reads as single-device code; what the others know enters through two sums."""

import hashlib
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from detr.image_processing.processor import DetrImageProcessor
from raydetr import storage
from raydetr.config import TrainConfig
from raydetr.data import stream
from raydetr.data.micro_batch import TrainingBatch
from raydetr.data.shards import Manifest
from raydetr.errors import TrainingError
from raydetr.training import checkpoint
from raydetr.training.distributed import all_reduce, step_totals, world_size
from raydetr.training.model import build_model
from raydetr.training.optim import MovingAverage, build_optimizer, set_learning_rates
from raydetr.training.progress import Progress

FAILURE = "failure.json"


def train_worker(config: TrainConfig, run_id: str) -> None:
    """Train from the step that the stream starts at to the last one, checkpointing on the way.

    Args:
        config: with addresses that every worker can read.
        run_id: MLflow run to log to; empty: none.

    A `TrainingError` of the loop is the same on every worker and would come again: it is left in the run's folder
    for the driver and the workers end, since Ray Train would try whatever is raised again and again.
    """
    try:
        _train(config, run_id)
    except TrainingError as error:
        if ray.train.get_context().get_world_rank() == 0:
            storage.write_json(storage.join(config.output, FAILURE), {"error": str(error)})


def _train(config: TrainConfig, run_id: str) -> None:
    device = ray.train.torch.get_device()
    state = create_state(config, Manifest.load(config.train_data), device)
    parallel = parallelise(state.model)
    shard = ray.train.get_dataset_shard("train")
    progress = Progress(config, run_id, rank=ray.train.get_context().get_world_rank())
    for batches in timed(stream.steps(shard, config.micro_batch_size, per_worker(config)), progress):
        if state.step != batches[0].step:
            progress.restore(checkpoint.load(config.output, batches[0].step, state))
        progress.add(train_step(parallel, state, batches, config), batches)
        if state.step % config.checkpoint_every == 0 or state.step == config.steps:
            commit(state, config, progress)


def per_worker(config: TrainConfig) -> int:
    """Micro-batches of each step that every worker gets, the fillers included."""
    return -(-config.micro_batches // world_size())


def create_state(config: TrainConfig, manifest: Manifest, device: torch.device) -> checkpoint.TrainingState:
    """A new model and its optimiser on the device, the same on every worker."""
    # Channels last: 1.3 times the images of a small net per second and core.
    model = build_model(config, manifest).to(memory_format=torch.channels_last).to(device)
    if config.precision == "float64":
        model.double()
    model.train()
    size = {"shortest_edge": config.test_edge, "longest_edge": config.longest_edge}
    return checkpoint.TrainingState(
        model=model,
        optimizer=build_optimizer(model, config),
        average=MovingAverage(model, config.ema_decay) if config.ema_decay else None,
        processor=DetrImageProcessor(size=size),
    )


def parallelise(model: torch.nn.Module) -> torch.nn.Module:
    """The model whose gradients are averaged over the workers; itself where there is one."""
    if world_size() == 1:
        return model
    with warnings.catch_warnings():
        # torch 2.15 renames the argument; 2.9 knows only this name. There are no buffers to broadcast: batch
        # norm is frozen.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


def train_step(
    parallel: torch.nn.Module,
    state: checkpoint.TrainingState,
    batches: Sequence[TrainingBatch],
    config: TrainConfig,
) -> dict[str, float]:
    """One optimiser step over this worker's micro-batches; returns the metrics of the whole step.

    Raises:
        TrainingError: the loss or the gradient is not finite, or too many images could not be decoded.
    """
    step = batches[0].step
    totals = step_totals(batches, config.num_queries, state.model.config.eos_coefficient)
    losses = compute_gradients(parallel, state, batches, config, totals.num_boxes, totals.class_weight_sum)
    # Every worker holds its share of the losses times W: their mean is the loss of the global batch.
    names = sorted(losses)
    values = all_reduce(torch.stack([losses[name].double() for name in names]).cpu()) / world_size()
    metrics = dict(zip(names, values.tolist(), strict=True))
    parameters = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    metrics["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm))
    if not all(map(torch.isfinite, torch.tensor([metrics["loss"], metrics["grad_norm"]]))):
        ids = [image_id for batch in batches for image_id in batch.image_ids]
        raise TrainingError(
            f"Step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; this worker's images "
            f"{ids}. The last checkpoint is intact: give its model folder in {config.output}/checkpoints as "
            "--model, with a lower --learning-rate and another --output."
        )
    metrics["learning_rate"] = set_learning_rates(state.optimizer, step, config)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=False)
    if state.average:
        state.average.update(step)
    state.step = step + 1
    state.images += totals.images
    state.skipped += totals.skipped
    if state.skipped > config.max_skipped * max(state.images + state.skipped, 1000):
        raise TrainingError(
            f"Step {step}: {state.skipped} of {state.images + state.skipped} images could not be decoded, more "
            f"than --max-skipped {config.max_skipped}; see faults.parquet beside the shards."
        )
    return metrics | {"images": float(totals.images), "skipped": float(state.skipped)}


def compute_gradients(
    parallel: torch.nn.Module,
    state: checkpoint.TrainingState,
    batches: Sequence[TrainingBatch],
    config: TrainConfig,
    num_boxes: float,
    class_weight_sum: float,
) -> dict[str, Tensor]:
    """Accumulate the gradients of a step; returns this worker's sums of the loss terms, times W."""
    sums: dict[str, Tensor] = {}
    for batch in batches:
        seed_dropout(config.seed, batch)
        pixel_values, pixel_mask = to_device(batch, state)
        synchronise = batch is batches[-1]
        with accumulate(parallel, synchronise), autocast(config, pixel_values.device):
            outputs = parallel(
                pixel_values=pixel_values,
                pixel_mask=pixel_mask,
                labels=[
                    {name: value.to(pixel_values.device) for name, value in each.items()}
                    for each in batch.labels
                ],
                num_boxes=num_boxes,
                class_weight_sum=class_weight_sum,
                image_weights=batch.weights.to(pixel_values.device),
            )
            outputs.loss.backward()
        for name, value in {"loss": outputs.loss, **outputs.loss_dict}.items():
            sums[name] = sums.get(name, 0) + value.detach()
    return sums


def to_device(batch: TrainingBatch, state: checkpoint.TrainingState) -> tuple[Tensor, Tensor]:
    """(pixel_values [B, 3, H, W] normalised and zero where padded, pixel_mask bool [B, H, W])."""
    parameter = next(state.model.parameters())
    mask = batch.pixel_mask().to(parameter.device)
    mean, std = (
        torch.tensor(values, dtype=parameter.dtype, device=parameter.device)[:, None, None]
        for values in (state.processor.image_mean, state.processor.image_std)
    )
    pixels = batch.pixels.to(parameter.device, parameter.dtype)
    return pixels.sub_(mean * 255).div_(std * 255).mul_(mask[:, None]), mask


def accumulate(parallel: torch.nn.Module, synchronise: bool) -> AbstractContextManager[None]:
    """Gradients cross the network once a step, with the last micro-batch."""
    if synchronise or not isinstance(parallel, DistributedDataParallel):
        return nullcontext()
    return parallel.no_sync()


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 for what tolerates it; the criterion computes in float32 by itself."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")


def seed_dropout(seed: int, batch: TrainingBatch) -> None:
    """Make dropout a function of (seed, step, micro-batch): no random state is carried over a restart."""
    digest = hashlib.blake2b(f"{seed}/dropout/{batch.step}/{batch.position}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little", signed=True))


def commit(state: checkpoint.TrainingState, config: TrainConfig, progress: Progress) -> None:
    """Write a checkpoint on rank 0, then send the metrics of the steps it stands for."""
    if progress.rank == 0:
        checkpoint.save(config.output, state, progress.uncommitted(), config.keep_checkpoints)
        progress.send()
    # Every worker reports: Ray Train waits for all of them, so none runs ahead of a checkpoint. The checkpoint
    # itself is not handed over: Train would copy it, and file by file without a marker that comes last.
    ray.train.report({"step": state.step})


def timed(batches: Iterator[list[TrainingBatch]], progress: Progress) -> Iterator[list[TrainingBatch]]:
    """The same batches, with the time spent waiting for each told to `progress`."""
    while True:
        start = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            return
        progress.waited += time.perf_counter() - start
        yield batch
