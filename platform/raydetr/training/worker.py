"""Entry points of Ray Train for workers and validation tasks, in a module that the controller loads without torch."""

import logging
from typing import Any

import ray.train

from raydetr.ray_internals.train import context
from raydetr.training.config import TrainConfig


def train_loop_per_worker(arguments: dict[str, Any]) -> dict[str, str]:
    """Run `loop.train_worker` with the fields of `loop.Job`."""
    from raydetr.training.loop import Job, train_worker

    # Ray Train would log a line per worker and checkpoint. Ray 2.60 names one of these loggers after its file.
    for name in ("ray.train", context.__file__):
        logging.getLogger(name).setLevel(logging.WARNING)
    return train_worker(Job(**arguments))


def validate(_: ray.train.Checkpoint, config: TrainConfig, run_id: str, step: int) -> dict[str, float]:
    """Run `validation.validate_checkpoint` in a task that Ray Train starts."""
    from raydetr.training.validation import validate_checkpoint

    return validate_checkpoint(config, run_id, step)
