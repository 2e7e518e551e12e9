"""A training run that records what its model receives: python -m tests.cluster.recorded_training TRAIN_DATA OUTPUT.

Each worker appends to OUTPUT/records/<process id>.jsonl a row per forward pass: step, rank, images.
"""

import os
import sys
from pathlib import Path
from typing import Any

import ray.train

from detr import DetrForObjectDetection
from raydetr.config import TrainConfig
from raydetr.training import trainer
from tests import training_record

STEPS = 60


def config(train_data: str, output: str) -> TrainConfig:
    return TrainConfig(
        train_data=train_data,
        output=output,
        tracking_uri=f"sqlite:///{output}/mlflow.db",
        workers=2,
        steps=STEPS,
        checkpoint_every=7,
        backbone="resnet18",
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


def recorded_loop(arguments: dict[str, Any]) -> None:
    """The real loop in a worker, with a hook on the model's forward."""
    from raydetr.training import loop

    folder = Path(arguments["config"].output) / "records"
    folder.mkdir(exist_ok=True)
    file = folder / f"{os.getpid()}.jsonl"
    rank = ray.train.get_context().get_world_rank()
    now = {"step": -1}
    step, forward = loop.train_step, DetrForObjectDetection.forward

    def recorded_step(parallel: Any, state: Any, batches: Any, config: TrainConfig) -> Any:
        now["step"] = batches[0].step
        return step(parallel, state, batches, config)

    def recorded_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        row = {"step": now["step"], "rank": rank, "images": training_record.fingerprints(kwargs)}
        training_record.append(file, row)
        return forward(self, *args, **kwargs)

    loop.train_step = recorded_step
    DetrForObjectDetection.forward = recorded_forward
    try:
        loop.train_worker(**arguments)
    finally:  # Ray may use the process again
        loop.train_step, DetrForObjectDetection.forward = step, forward


if __name__ == "__main__":
    trainer.train_loop_per_worker = recorded_loop
    summary = trainer.train(config(sys.argv[1], sys.argv[2]))
    print(summary)
