"""Where Ray Train enters a worker and a validation. Apart from both, so that Train's controller need not import torch."""

import logging
from typing import Any

import ray.train

from raydetr.ray_internals.train import context
from raydetr.training.config import TrainConfig


def train_loop_per_worker(arguments: dict[str, Any]) -> dict[str, str]:
    """Run `loop.train_worker` with the fields of `loop.Job`."""
    from raydetr.training.loop import Job, train_worker

    # A line per worker and checkpoint otherwise; Ray 2.60 names one of the loggers by its file.
    for name in ("ray.train", context.__file__):
        logging.getLogger(name).setLevel(logging.WARNING)
    return train_worker(Job(**arguments))


def validate(_: ray.train.Checkpoint, config: TrainConfig, run_id: str, step: int) -> dict[str, float]:
    """Run `validation.validate_checkpoint` in the task that Ray Train starts for it."""
    from raydetr.training.validation import validate_checkpoint

    return validate_checkpoint(config, run_id, step)
