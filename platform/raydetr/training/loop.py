"""The training loop of one worker."""

import contextlib
import logging
import shlex
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import ValidationTaskConfig

from raydetr.data.shards import Manifest
from raydetr.data.stream import ray_stream
from raydetr.data.stream.micro_batch import TrainingBatch
from raydetr.errors import LeaseError, StorageError, TrainingError
from raydetr.lease import Held
from raydetr.ray_internals.train import util
from raydetr.training import checkpoint, non_finite, validation
from raydetr.training.config import TrainConfig
from raydetr.training.distributed import StepTotals, all_reduce, step_totals, world_size
from raydetr.training.progress import Progress, log_line
from raydetr.training.signals import PreemptedError, Signal, Signals
from raydetr.training.state import TrainingState, create_state, parallelise
from raydetr.training.step import is_finite, train_step
from raydetr.training.watchdog import Watchdog

OUT_OF_TIME = "out of time"
NO_PROGRESS = "no progress"


@dataclass(frozen=True)
class Job:
    """What the driver tells every worker.

    config: with addresses that every worker can read.
    data_digest: of what is trained on.
    run_id: MLflow run to log to; empty: none.
    deadline: time.time() at which to end; None: never.
    background: validate in a task of its own, not between two steps.
    board: see `watchdog`.
    held: the driver's lease of the run's folder: checkpoints are committed only while it is; None: no other driver.
    """

    config: TrainConfig
    data_digest: str = ""
    run_id: str = ""
    deadline: float | None = None
    background: bool = False
    board: Any = None
    held: Held | None = None


def train_worker(job: Job) -> dict[str, str]:
    """Train from the step that the stream starts at to the last one, checkpointing on the way.

    Returns:
        `ended`: why before the last step, or empty; `error`: what is wrong, or empty. A `TrainingError` of the loop
        is the same on every worker and would come again: it is returned, since Ray Train would try again whatever is
        raised.

    Raises:
        PreemptedError: a node of a worker is about to be preempted. It is no failure: see `scaling.Restarts`.
    """
    try:
        return {"ended": _train(job), "error": ""}
    except TrainingError as error:
        return {"ended": "", "error": str(error)}
    except PreemptedError:
        logging.getLogger(util.__name__).setLevel(logging.CRITICAL)  # Ray's, which shows a traceback else
        raise


def _train(job: Job) -> str:
    config = job.config
    rank = ray.train.get_context().get_world_rank()
    device = ray.train.torch.get_device()
    state = create_state(config, Manifest.load(config.train_data), device)
    parallel = parallelise(state.module)
    progress, signals = Progress(config, job.run_id, rank), Signals(rank, job.deadline)
    watchdog = Watchdog(rank, config.hang_timeout_s, job.board, world_size())
    watchdog.follow(state.module)
    node = ray.get_runtime_context().get_node_id()
    with watchdog.running():
        batches_of_steps = ray_stream.steps(
            ray.train.get_dataset_shard("train"), config.micro_batch_size, per_worker(config)
        )
        for batches in timed(batches_of_steps, progress, watchdog, state):
            step = batches[0].step
            if state.step != step:
                watchdog.enter("loading the checkpoint", step)
                progress.restore(checkpoint.load(config.output, step, state))
            watchdog.enter("waiting for the others", step)
            model = state.model.config
            totals = step_totals(batches, model.num_queries, model.eos_coefficient, signals.of_step())
            metrics = train_step(parallel, state, batches, config, totals)
            if not is_finite(metrics):
                watchdog.enter("looking for what is not finite", step)
                handle_non_finite(state, batches, config, totals, metrics, rank)
            advance(state, config, totals, step)
            metrics |= {"images": float(totals.images), "skipped": float(state.skipped)}
            metrics["non_finite_steps"] = float(state.non_finite)
            progress.add(metrics, batches, sum(batch.node not in ("", node) for batch in batches))

            signal = Signal(totals.signal)
            nodes = signals.preempted_nodes() if Signal.LOOK in signal else ()
            if nodes and rank == 0:
                log_line(
                    f"step {step}: nodes {', '.join(nodes)} are about to be preempted: committing, and on with others"
                )
            ends = Signal.TIME_IS_UP in signal or Signal.NO_PROGRESS in signal or state.step == config.steps
            if nodes or ends or state.step % config.checkpoint_every == 0:
                watchdog.enter("writing a checkpoint", step)
                if rank:
                    watchdog.enter("waiting for the checkpoint")
                commit(state, job, progress)
                if not job.background and validation.is_due(config, state.step):
                    watchdog.enter("validating", step, limited=False)
                    validation.validate_together(config, job.run_id, state.step, rank, device)
                signals.no_progress = rank == 0 and validation.has_stalled(config, state.step)
            if ends:
                if state.step == config.steps:
                    return ""
                return OUT_OF_TIME if Signal.TIME_IS_UP in signal else NO_PROGRESS
            if nodes:
                raise PreemptedError(f"step {step}: nodes {', '.join(nodes)} are about to be preempted")
    return ""


def per_worker(config: TrainConfig) -> int:
    """Micro-batches of each step that every worker gets, the fillers included."""
    return -(-config.micro_batches // world_size())


def advance(state: TrainingState, config: TrainConfig, totals: StepTotals, step: int) -> None:
    """The step is done.

    Raises:
        TrainingError: too many images could not be decoded.
    """
    state.step = step + 1
    state.images += totals.images
    state.skipped += totals.skipped
    if state.skipped > config.max_skipped * max(state.images + state.skipped, 1000):
        raise TrainingError(
            f"Step {step}: {state.skipped} of {state.images + state.skipped} images could not be decoded, more "
            f"than --max-skipped {config.max_skipped}. Each was named with its reason above: ingest the data again, and "
            "see faults.parquet beside the shards."
        )


def handle_non_finite(
    state: TrainingState,
    batches: list[TrainingBatch],
    config: TrainConfig,
    totals: StepTotals,
    metrics: dict[str, float],
    rank: int,
) -> None:
    """Keep the batch of a step whose loss or gradient is not finite, find the layer, and go on or stop.

    Raises:
        TrainingError: `--on-non-finite stop`, or too many of them.
    """
    step = batches[0].step
    state.optimizer.zero_grad(set_to_none=True)
    try:
        file, error = non_finite.keep(config, rank, state, batches, totals), ""
    except StorageError as failure:  # of this worker alone: the others wait for it below
        file, error = "", str(failure)
    found = (
        f"rank {rank}: {where}"
        if (where := non_finite.first_bad_layer(state, batches, config, totals))
        else ""
    )
    state.optimizer.zero_grad(set_to_none=True)
    ids = [image_id for batch in batches for image_id in batch.image_ids]
    told: list[Any] = [(found, ids, file, error)]
    if world_size() > 1:
        told = [None] * world_size()
        dist.all_gather_object(told, (found, ids, file, error))
    places = "; ".join(each[0] for each in told if each[0]) or "in no single layer: the sum overflows"
    _, _, file, error = next((each for each in told if each[0]), told[0])  # of the worker that it began with
    kept = (
        f"Its batch could not be kept: {error}"
        if error
        else f"Its batch: pipelines/train.py --replay {shlex.quote(file)}"
    )
    state.non_finite += 1
    message = (
        f"Step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; images "
        f"{sorted(image_id for each in told for image_id in each[1])}. First not finite in {places}. "
        f"{kept}"
    )
    if config.on_non_finite == "skip" and state.non_finite <= config.max_non_finite:
        if rank == 0:
            log_line(
                f"{message}\nThe step is left out (number {state.non_finite} of at most {config.max_non_finite})."
            )
        return
    raise TrainingError(
        f"{message}. The last checkpoint is intact: give its model folder in {config.output}/checkpoints as "
        "--model, with a lower --learning-rate and another --output, or --on-non-finite skip."
    )


def commit(state: TrainingState, job: Job, progress: Progress) -> None:
    """Write a checkpoint on rank 0, then send the metrics of the steps it stands for.

    Raises:
        TrainingError: it cannot be written, on all ranks.
    """
    config, error, done = job.config, "", "its last checkpoint"
    if progress.rank == 0:
        origin = {"config": asdict(config), "data_digest": job.data_digest}
        try:
            checkpoint.save(config.output, state, {**progress.uncommitted(), **origin}, job.held)
        except (StorageError, LeaseError) as failure:
            error = str(failure)
            with contextlib.suppress(StorageError):  # it may not even be read
                done = f"step {checkpoint.last_committed_step(config.output)}"
        else:
            prune_checkpoints(config)
            progress.send()
    else:
        progress.rows = []
    # Rank 0 has the message; that there is one ends all of them here.
    if all_reduce(torch.tensor([float(bool(error))])).item():
        raise TrainingError(
            f"The checkpoint of step {state.step} cannot be written: {error} The run is complete up to {done}: make room "
            "or mend the storage, and give the same command again."
        )
    # Every worker reports: Ray Train waits for all of them, so none runs ahead of a checkpoint. What it is handed is
    # no checkpoint but an empty folder: it would copy ours file by file, without a marker that comes last. It starts
    # the validation, which finds ours by the step.
    if progress.rank == 0 and job.background and validation.is_due(config, state.step):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "step").write_text(str(state.step))
            ray.train.report(
                {"step": state.step},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                validation=ValidationTaskConfig(fn_kwargs={"step": state.step}),
            )
    else:
        ray.train.report({"step": state.step})


def prune_checkpoints(config: TrainConfig) -> None:
    """Remove the checkpoints that are not to be kept; where that is refused, they stay, and it is said."""
    try:
        best, waiting = validation.best_checkpoint(config), validation.waiting_checkpoints(config)
        checkpoint.remove_surplus(config.output, config.keep_checkpoints, best, waiting)
    except StorageError as failure:
        log_line(f"Earlier checkpoints cannot be removed: {failure}")


def timed(
    batches: Iterator[list[TrainingBatch]], progress: Progress, watchdog: Watchdog, state: TrainingState
) -> Iterator[list[TrainingBatch]]:
    """The same batches, with the time spent waiting for each told to `progress`."""
    while True:
        start = time.perf_counter()
        watchdog.enter("waiting for data", state.step)
        try:
            batch = next(batches)
        except StopIteration:
            return
        progress.waited += time.perf_counter() - start
        yield batch
