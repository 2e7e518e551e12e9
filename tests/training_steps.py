"""Run training steps in one process, with the real data stream (without Ray) and the real training step."""

import itertools
from collections.abc import Iterator

from raydetr.data.shards import Manifest
from raydetr.data.stream import ray_stream
from raydetr.data.stream.micro_batch import TrainingBatch, unpack
from raydetr.data.stream.source import shard_source
from raydetr.training.config import TrainConfig
from raydetr.training.distributed import step_totals
from raydetr.training.run import plan_spec
from raydetr.training.state import TrainingState
from raydetr.training.step import train_step


def batches_of_steps(config: TrainConfig, manifest: Manifest) -> Iterator[list[TrainingBatch]]:
    """Yield the micro-batches of steps 0 to `config.optimizer.steps` − 1."""
    plan = ray_stream.build_plan(manifest, plan_spec(config))
    stream = ray_stream.Stream(
        source=shard_source(manifest),
        plan=plan,
        last_step=config.optimizer.steps,
        first_step=lambda: 0,
        masks=config.run.masks,
    )
    rows = (
        batch
        for window in ray_stream.list_windows(stream, 0)
        for row in ray_stream.build_micro_batches(window, stream, world_size=1)
        for batch in unpack(row, config.optimizer.micro_batch_size)
    )
    for _, group in itertools.groupby(rows, key=lambda batch: batch.step):
        yield list(group)


def train_here(config: TrainConfig, manifest: Manifest, state: TrainingState) -> list[dict[str, float]]:
    """Run all steps, and return their metrics."""
    metrics = []
    for batches in batches_of_steps(config, manifest):
        model = state.model.config
        totals = step_totals(batches, model.num_queries, model.eos_coefficient)
        metrics.append(train_step(state.module, state, batches, config, totals))
        state.step += 1
    return metrics
