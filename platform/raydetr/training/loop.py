"""Training loop of one worker."""

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import ValidationTaskConfig

from raydetr.data.shards import Manifest
from raydetr.data.stream import ray_stream
from raydetr.data.stream.micro_batch import TrainingBatch
from raydetr.errors import LeaseError, StorageError, TrainingError
from raydetr.flat_keys import flatten
from raydetr.lease import Held
from raydetr.ray_internals.train import util
from raydetr.training import checkpoint, validation
from raydetr.training.config import TrainConfig
from raydetr.training.distributed import StepTotals, all_reduce, step_totals, world_size
from raydetr.training.non_finite import handle_non_finite
from raydetr.training.progress import Progress, log_line
from raydetr.training.signals import PreemptedError, Signal, Signals
from raydetr.training.state import TrainingState, create_state, parallelize
from raydetr.training.step import is_finite, train_step
from raydetr.training.watchdog import Watchdog

OUT_OF_TIME = "out of time"
NO_PROGRESS = "no progress"


@dataclass(frozen=True)
class Job:
    """Arguments that the driver passes to every worker.

    config: configuration of the run, with URIs that every worker can read.
    data_digest: digest of the training data.
    run_id: MLflow run to log to; empty: none.
    deadline: time.time() at which to stop; None: no limit.
    background: validate in a separate task, not between two steps.
    board: `HeartbeatBoard` actor, see `watchdog`.
    held: the driver's lease on the run's folder. Checkpoints are committed only while it is valid; None: no lease.
    """

    config: TrainConfig
    data_digest: str = ""
    run_id: str = ""
    deadline: float | None = None
    background: bool = False
    board: Any = None
    held: Held | None = None


def train_worker(job: Job) -> dict[str, str]:
    """Train from the first step of the stream to the last step of the run, with checkpoints along the way.

    Returns:
        `stop_reason`: why the run stopped before the last step, or empty; `error`: the error message, or empty. A
        `TrainingError` of the loop is the same on every worker and would occur again after a restart. It is returned
        because Ray Train restarts the workers after any exception.

    Raises:
        PreemptedError: a worker's node is about to be preempted. It does not count as a failure, see
            `scaling.RestartPolicy`.
    """
    try:
        return {"stop_reason": _train(job), "error": ""}
    except TrainingError as error:
        return {"stop_reason": "", "error": str(error)}
    except PreemptedError:
        logging.getLogger(util.__name__).setLevel(logging.CRITICAL)  # or Ray logs a traceback
        raise


def _train(job: Job) -> str:
    config = job.config
    rank = ray.train.get_context().get_world_rank()
    device = ray.train.torch.get_device()
    state = create_state(config, Manifest.load(config.data.train_data), device)
    parallel = parallelize(state.module)
    progress, signals = Progress(config, job.run_id, rank), Signals(rank, job.deadline)
    watchdog = Watchdog(rank, config.fault_tolerance.hang_timeout_s, job.board, world_size())
    watchdog.watch_module(state.module)
    node = ray.get_runtime_context().get_node_id()
    with watchdog.running():
        batches_of_steps = ray_stream.steps(
            ray.train.get_dataset_shard("train"),
            config.optimizer.micro_batch_size,
            micro_batches_per_worker(config),
        )
        for batches in time_batches(batches_of_steps, progress, watchdog, state):
            step = batches[0].step
            if state.step != step:
                watchdog.enter("loading the checkpoint", step)
                progress.restore(checkpoint.load(config.run.output, step, state))
            watchdog.enter("waiting for other ranks", step)
            model = state.model.config
            totals = step_totals(batches, model.num_queries, model.eos_coefficient, signals.for_step())
            metrics = train_step(parallel, state, batches, config, totals)
            if not is_finite(metrics):
                watchdog.enter("searching for non-finite values", step)
                handle_non_finite(state, batches, config, totals, metrics, rank)
            advance(state, config, totals, step)
            metrics |= {"images": float(totals.images), "skipped": float(state.skipped)}
            metrics["non_finite_steps"] = float(state.non_finite)
            progress.add(metrics, batches, sum(batch.node not in ("", node) for batch in batches))

            signal = Signal(totals.signal)
            nodes = signals.preempted_nodes() if Signal.CHECK_PREEMPTION in signal else ()
            if nodes and rank == 0:
                log_line(
                    f"step {step}: nodes {', '.join(nodes)} are about to be preempted: writing a checkpoint, "
                    "then restarting the workers on other nodes"
                )
            stops = (
                Signal.TIME_LIMIT in signal
                or Signal.NO_PROGRESS in signal
                or state.step == config.optimizer.steps
            )
            if nodes or stops or state.step % config.checkpoints.checkpoint_every == 0:
                watchdog.enter("writing a checkpoint", step)
                if rank:
                    watchdog.enter("waiting for the checkpoint")
                commit(state, job, progress)
                if not job.background and validation.is_due(config, state.step):
                    watchdog.enter("validating", step, limited=False)
                    validation.validate_together(config, job.run_id, state.step, rank, device)
                signals.no_progress = rank == 0 and validation.has_stalled(config, state.step)
            if stops:
                if state.step == config.optimizer.steps:
                    return ""
                return OUT_OF_TIME if Signal.TIME_LIMIT in signal else NO_PROGRESS
            if nodes:
                raise PreemptedError(f"step {step}: nodes {', '.join(nodes)} are about to be preempted")
    return ""


def micro_batches_per_worker(config: TrainConfig) -> int:
    """Return the number of micro-batches per step that each worker gets, including empty ones."""
    return -(-config.optimizer.micro_batches // world_size())


def advance(state: TrainingState, config: TrainConfig, totals: StepTotals, step: int) -> None:
    """Advance the step counter and the image counts after a step.

    Raises:
        TrainingError: more images than `--max-skipped` could not be decoded.
    """
    state.step = step + 1
    state.images += totals.images
    state.skipped += totals.skipped
    # The share is of at least 1,000 images, so that a few bad images at the start do not stop the run.
    if state.skipped > config.fault_tolerance.max_skipped * max(state.images + state.skipped, 1000):
        raise TrainingError(
            f"Step {step}: {state.skipped} of {state.images + state.skipped} images could not be decoded, more "
            f"than --max-skipped {config.fault_tolerance.max_skipped}. Each one is logged above with the reason: ingest the data "
            "again, and check faults.parquet next to the shards."
        )


def commit(state: TrainingState, job: Job, progress: Progress) -> None:
    """Write a checkpoint on rank 0, then send the metrics of the steps that it covers.

    Raises:
        TrainingError: the checkpoint cannot be written; raised on all ranks.
    """
    config, error, committed = job.config, "", "its last checkpoint"
    if progress.rank == 0:
        origin = {"config": flatten(config), "data_digest": job.data_digest}
        try:
            checkpoint.save(config.run.output, state, progress.history(), origin, job.held)
        except (StorageError, LeaseError) as failure:
            error = str(failure)
            with contextlib.suppress(StorageError):  # the storage may not even be readable
                committed = f"step {checkpoint.last_committed_step(config.run.output)}"
        else:
            validation.prune_checkpoints(config)
            progress.send()
    else:
        progress.rows = []
    # Only rank 0 has the message, but all ranks must stop here.
    if all_reduce(torch.tensor([float(bool(error))])).item():
        raise TrainingError(
            f"The checkpoint of step {state.step} cannot be written: {error} The run is complete up to {committed}: "
            "free disk space or fix the storage, then rerun the command to resume."
        )
    # Every worker reports. Ray Train waits for all of them, so no worker runs ahead of a checkpoint. The checkpoint
    # that it gets is a placeholder folder: it would copy a real one file by file, without a marker written last. Ray
    # Train needs it to start the validation task, which finds the real checkpoint by the step.
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


def time_batches(
    batches: Iterator[list[TrainingBatch]], progress: Progress, watchdog: Watchdog, state: TrainingState
) -> Iterator[list[TrainingBatch]]:
    """Yield the same batches, and add the time spent waiting for each to `progress`."""
    while True:
        start = time.perf_counter()
        watchdog.enter("waiting for data", state.step)
        try:
            batch = next(batches)
        except StopIteration:
            return
        progress.waited += time.perf_counter() - start
        yield batch
