"""Checkpoints of a run: `OUTPUT/checkpoints/step-00000200/`, whole or not there.

A checkpoint is written file by file and counts only once its marker, written last, is there; a reader never sees
half of one. It is named by the number of steps done, which is also the step to go on with.
"""

import io
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from detr import DetrForObjectDetection
from detr.image_processing.processor import DetrImageProcessor
from raydetr import storage
from raydetr.errors import TrainingError
from raydetr.training.optim import MovingAverage

MARKER = "COMPLETE"
PREFIX = "step-"


@dataclass
class TrainingState:
    """Everything that changes while training.

    step: steps done.
    images, skipped: images trained on, and those that could not be decoded, so far.
    average: None without `--ema-decay`.
    """

    model: DetrForObjectDetection
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None
    processor: DetrImageProcessor
    step: int = 0
    images: int = 0
    skipped: int = 0


def address(output: str, step: int) -> str:
    """Where the checkpoint after `step` steps is."""
    return storage.join(output, "checkpoints", f"{PREFIX}{step:08d}")


def committed_steps(output: str) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    folder = storage.join(output, "checkpoints")
    return [
        int(name.removeprefix(PREFIX))
        for name in storage.list_names(folder)
        if name.startswith(PREFIX) and storage.exists(storage.join(folder, name, MARKER))
    ]


def last_committed_step(output: str) -> int:
    """The step to go on with: that of the last complete checkpoint, 0 without one."""
    return max(committed_steps(output), default=0)


def save(output: str, state: TrainingState, metadata: dict[str, Any], keep: int) -> str:
    """Write a checkpoint, marker last, and then remove all but the latest `keep`. Returns its address.

    Args:
        output: the run's folder.
        state: after `state.step` steps.
        metadata: kept as JSON beside it.
        keep: complete checkpoints to keep, this one included.

    Raises:
        StorageError: it cannot be written; earlier checkpoints are untouched.
    """
    target = address(output, state.step)
    storage.delete_folder(target)  # the rest of an attempt that ended half-way
    with tempfile.TemporaryDirectory() as folder:
        state.model.save_pretrained(os.path.join(folder, "model"))
        state.processor.save_pretrained(os.path.join(folder, "model"))
        storage.upload_folder(folder, target)
    training = io.BytesIO()
    torch.save(
        {
            "optimizer": state.optimizer.state_dict(),
            "average": state.average.state_dict() if state.average else None,
        },
        training,
    )
    storage.write_bytes(storage.join(target, "training.pt"), training.getvalue())
    progress = {"step": state.step, "images": state.images, "skipped": state.skipped}
    storage.write_json(storage.join(target, "state.json"), {**metadata, **progress})
    storage.write_bytes(storage.join(target, MARKER), b"")
    for step in committed_steps(output)[:-keep]:
        # The marker goes first: what is left half deleted must not count.
        storage.delete_file(storage.join(address(output, step), MARKER))
        storage.delete_folder(address(output, step))
    return target


def load(output: str, step: int, state: TrainingState) -> dict[str, Any]:
    """Restore the state of a complete checkpoint in place; returns its metadata.

    Raises:
        TrainingError: there is no such checkpoint, or it is of another model.
    """
    source = address(output, step)
    if not storage.exists(storage.join(source, MARKER)):
        raise TrainingError(f"{source}: no complete checkpoint, though the data stream starts after it.")
    with tempfile.TemporaryDirectory() as folder:
        storage.download_folder(storage.join(source, "model"), folder)
        saved = DetrForObjectDetection.from_pretrained(folder)
    dtype = next(state.model.parameters()).dtype
    state.model.load_state_dict(saved.to(dtype=dtype).state_dict())
    training = torch.load(
        io.BytesIO(storage.read_bytes(storage.join(source, "training.pt"))),
        map_location="cpu",
        weights_only=True,
    )
    state.optimizer.load_state_dict(training["optimizer"])
    if state.average:
        state.average.load_state_dict(training["average"])
    metadata: dict[str, Any] = storage.read_json(storage.join(source, "state.json"))
    state.step, state.images, state.skipped = metadata["step"], metadata["images"], metadata["skipped"]
    return metadata
