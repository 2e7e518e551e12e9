"""A training run that records what its model receives, and that can be made to hang.

    python -m tests.cluster.recorded_training TRAIN_DATA OUTPUT [flags of pipelines/train.py]

Each worker appends a row per forward pass to RECORDS/<process id>.jsonl: step, rank, node, time, images.

Environment variables:
    RECORDS         folder of the records; must be set where Ray starts
    ONE_DISK        the nodes of the cluster are processes of one machine and share its disk
    PACE_S          minimum time of a step in seconds
    RESIZE_EVERY_S  seconds between checks of an elastic run for more nodes

Files in RECORDS:
    hang-<rank>      the worker of this rank deletes the file and sleeps in its forward pass
    slow             while it exists, a step takes two more seconds
    slow-validation  while it exists, no validation finishes
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
import ray.train

from detr import DetrForObjectDetection
from detr.training.query_groups import QueryGroups
from raydetr import cluster
from raydetr.command import run
from raydetr.results.json_form import to_json
from raydetr.training import scaling, trainer, worker
from raydetr.training.config import TrainConfig
from tests import training_record
from tests.training_config import small_config

STEPS = 60


def config(train_data: str, output: str) -> TrainConfig:
    return small_config(
        train_data=train_data,
        output=output,
        tracking_uri=f"sqlite:///{output}/mlflow.db",
        workers=2,
        steps=STEPS,
        checkpoint_every=7,
        backbone="test_resnet",
        backbone_out_indices=(1, 2, 3, 4),
        backbone_weights="",
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        attention_heads=4,
        ffn_dim=32,
        num_queries=8,
        micro_batch_size=2,
        micro_batches=4,
        shortest_edges=(48, 64),
        longest_edge=96,
        test_edge=64,
        window_row_groups=1,
        name="",
        max_skipped=0.1,
    )


def recorded_loop(arguments: dict[str, Any]) -> dict[str, str]:
    """Run the real loop of a worker, with a hook on the model's forward."""
    from raydetr.training import loop

    folder = Path(os.environ["RECORDS"])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{os.getpid()}.jsonl"
    rank = ray.train.get_context().get_world_rank()
    current = {"step": -1}
    node = ray.get_runtime_context().get_node_id()
    step, kinds = loop.train_step, (DetrForObjectDetection, QueryGroups)
    forwards = [kind.forward for kind in kinds]

    def recorded_step(parallel: Any, state: Any, batches: Any, *rest: Any) -> Any:
        current["step"] = batches[0].step
        time.sleep(float(os.environ.get("PACE_S", "0")) + 2 * (folder / "slow").exists())
        return step(parallel, state, batches, *rest)

    def recorded(forward: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            row = {"step": current["step"], "rank": rank, "node": node, "time": time.time()}
            training_record.append(file, {**row, "images": training_record.fingerprints(kwargs)})
            hang = folder / f"hang-{rank}"
            if hang.exists():
                hang.unlink()
                time.sleep(3600)
            return forward(self, *args, **kwargs)

        return call

    loop.train_step = recorded_step
    for kind, forward in zip(kinds, forwards, strict=True):
        kind.forward = recorded(forward)
    try:
        return loop.train_worker(loop.Job(**arguments))
    finally:  # Ray may reuse the process
        loop.train_step = step
        for kind, forward in zip(kinds, forwards, strict=True):
            kind.forward = forward


def slow_validate(checkpoint: ray.train.Checkpoint, **arguments: Any) -> dict[str, float]:
    """Run the real validation once its file is deleted."""
    while Path(os.environ["RECORDS"], "slow-validation").exists():
        time.sleep(0.1)
    return worker.validate(checkpoint, **arguments)


if __name__ == "__main__":
    trainer.train_loop_per_worker = recorded_loop
    trainer.validate = slow_validate
    if os.environ.get("ONE_DISK"):
        cluster.require_shared = lambda **_: None
    if every := os.environ.get("RESIZE_EVERY_S"):
        scaling.RESIZE_EVERY_S = float(every)
    run(
        lambda config: to_json(trainer.train(config)),
        TrainConfig,
        default=config(*sys.argv[1:3]),
        args=sys.argv[3:],
    )
