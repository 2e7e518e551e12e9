"""Where Ray Train enters a worker. Apart from the loop, so that Train's controller need not import torch."""

import logging

from raydetr.config import TrainConfig


def train_loop_per_worker(arguments: dict[str, TrainConfig | str]) -> None:
    """Run `loop.train_worker` with the entries of `arguments`: config, run_id."""
    from raydetr.training.loop import train_worker

    logging.getLogger("ray.train").setLevel(logging.WARNING)  # a line per worker and checkpoint otherwise
    train_worker(**arguments)  # type: ignore[arg-type]
