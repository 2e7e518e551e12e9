"""Checkpoints of a run: `OUTPUT/checkpoints/step-00000200/`, whole or not there.

    model/            the model as it would be served: the moving average of the weights where there is one
    training.pt       what training needs besides: optimiser, raw weights, query groups
    state.json        step, counts, configuration, data digest, metrics that were not sent long ago
    COMPLETE          the marker, written last

A checkpoint is written file by file and counts only once its marker is there; a reader never sees half of one. It is
named by the number of steps done, which is also the step to go on with. The figures of its model, once it was validated,
are in `OUTPUT/validations/step-00000200.json`, which stay when the checkpoint is removed.
"""

import io
import os
import pickle
import tempfile
from typing import Any

import torch
from safetensors import SafetensorError

from detr.checkpoint.load_save import save_model
from detr.training.query_groups import QueryGroups
from raydetr import storage
from raydetr.errors import StorageError, TrainingError
from raydetr.lease import Held
from raydetr.training.state import TrainingState

MARKER = "COMPLETE"
PREFIX = "step-"
STATE = "state.json"


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


def save(output: str, state: TrainingState, metadata: dict[str, Any], held: Held | None = None) -> str:
    """Write a checkpoint, marker last. Returns its address.

    Args:
        output: the run's folder.
        state: after `state.step` steps.
        metadata: kept as JSON in it.
        held: the driver's lease of the folder; None: no other process writes there.

    Raises:
        StorageError: it cannot be written; earlier checkpoints are untouched.
        LeaseError: another driver has taken the lease; nothing is committed.
    """
    target = address(output, state.step)
    if held:
        held.verify()  # the folder may be the other driver's complete checkpoint
    storage.delete_folder(target)  # the rest of an attempt that ended half-way
    training: dict[str, Any] = {"optimizer": state.optimizer.state_dict()}
    if isinstance(state.module, QueryGroups):
        training["query_groups"] = state.module.training_state()
    try:
        with tempfile.TemporaryDirectory() as folder:
            if state.average:
                state.average.swap()  # the model holds the averages, the average the raw weights
                training["raw"] = [value.clone() for value in state.average.values]
            try:
                save_model(state.model, os.path.join(folder, "model"))
            finally:
                if state.average:
                    state.average.swap()
            state.processor.save_pretrained(os.path.join(folder, "model"))
            storage.upload_folder(folder, target)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{target}: cannot be written ({error}).") from error
    buffer = io.BytesIO()
    torch.save(training, buffer)
    storage.write_bytes(storage.join(target, "training.pt"), buffer.getvalue())
    counts = {name: getattr(state, name) for name in ("step", "images", "skipped", "non_finite")}
    storage.write_json(storage.join(target, STATE), {**metadata, **counts})
    if held:
        held.verify()
    storage.write_bytes(storage.join(target, MARKER), b"")
    return target


def load(output: str, step: int, state: TrainingState) -> dict[str, Any]:
    """Restore the state of a complete checkpoint in place; returns its metadata.

    Raises:
        TrainingError: there is no such checkpoint, or it is damaged.
    """
    source = address(output, step)
    if not storage.exists(storage.join(source, MARKER)):
        raise TrainingError(f"{source}: no complete checkpoint, though the data stream starts after it.")
    try:
        with tempfile.TemporaryDirectory() as folder:
            storage.download_folder(storage.join(source, "model"), folder)
            saved = type(state.model).from_pretrained(folder)
        training = torch.load(
            io.BytesIO(storage.read_bytes(storage.join(source, "training.pt"))),
            map_location="cpu",
            weights_only=True,
        )
    except (SafetensorError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"{source}: the checkpoint is damaged ({error}). Delete this folder: the same command goes on from the "
            "checkpoint before it."
        ) from error
    dtype = next(state.model.parameters()).dtype
    state.model.load_state_dict(saved.to(dtype=dtype).state_dict())
    state.optimizer.load_state_dict(training["optimizer"])
    if isinstance(state.module, QueryGroups):
        state.module.load_training_state(training["query_groups"])
    if state.average:
        # The model now holds the averages, the average the raw weights: as after `swap`.
        state.average.load_state_dict(training["raw"])
        state.average.swap()
    metadata: dict[str, Any] = read_state(output, step)
    for name in ("step", "images", "skipped", "non_finite"):
        setattr(state, name, metadata[name])
    return metadata


def read_state(output: str, step: int) -> dict[str, Any]:
    """The metadata and counts of a checkpoint."""
    state: dict[str, Any] = storage.read_json(storage.join(address(output, step), STATE))
    return state


def write_validation(output: str, step: int, figures: dict[str, float]) -> None:
    """Keep the figures of a checkpoint's model; none for a validation that failed."""
    storage.write_json(_validation(output, step), figures)


def read_validation(output: str, step: int) -> dict[str, float] | None:
    """The figures of a checkpoint's model; None where it was not validated, or not yet."""
    file = _validation(output, step)
    figures: dict[str, float] | None = storage.read_json(file) if storage.exists(file) else None
    return figures


def validated_steps(output: str) -> list[int]:
    """Steps whose checkpoints were validated, ascending, those included that were removed since."""
    names = storage.list_names(storage.join(output, "validations"))
    # Not those that are being written.
    return [int(name.removeprefix(PREFIX).removesuffix(".json")) for name in names if name.endswith(".json")]


def _validation(output: str, step: int) -> str:
    return storage.join(output, "validations", f"{PREFIX}{step:08d}.json")


def remove_surplus(output: str, keep: int, best: int | None, waiting: set[int]) -> None:
    """Remove all checkpoints but the latest ones, the best one and those that are to be validated.

    What is left of one whose writing was cut off goes too.

    Args:
        output: the run's folder.
        keep: how many of the latest.
        best: step of the best one so far.
        waiting: steps whose validation is under way.
    """
    complete = committed_steps(output)
    kept = {best} | waiting | set(complete[-keep:])
    for name in storage.list_names(storage.join(output, "checkpoints")):
        if name.startswith(PREFIX) and int(name.removeprefix(PREFIX)) not in kept:
            folder = storage.join(output, "checkpoints", name)
            # The marker goes first: what is left half deleted must not count.
            storage.delete_file(storage.join(folder, MARKER))
            storage.delete_folder(folder)
