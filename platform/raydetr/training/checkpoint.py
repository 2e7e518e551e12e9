"""Checkpoints of a run in `OUTPUT/checkpoints/step-00000200/`, each complete or ignored.

    model/            the model as it would be served: the moving average of the weights if the run has one
    training.pt       the rest of the training state: optimizer, raw weights, query groups
    state.json        step, counts, configuration, data digest, metrics not yet sent to MLflow or sent recently
    COMPLETE          the marker, written last

Files are written one by one. A checkpoint counts only once its marker exists, so a reader never sees half of one. The
number in its name counts completed steps. Steps count from 0, so it is also the step to resume from. The validation metrics of
its model are in `OUTPUT/validations/step-00000200.json`, which stays when the checkpoint is deleted.
"""

import io
import os
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from safetensors import SafetensorError

from detr.checkpoint.load_save import save_model
from detr.training.query_groups import QueryGroups
from raydetr import storage
from raydetr.errors import StorageError, TrainingError
from raydetr.lease import Held
from raydetr.training.state import TrainingState

Row = tuple[int, int, Mapping[str, float]]
"""Metrics of a step: the step, the time in milliseconds since 1970, and values by name."""

MARKER = "COMPLETE"
PREFIX = "step-"
STATE = "state.json"


@dataclass(frozen=True)
class History:
    """What a run has done up to a checkpoint, besides its weights."""

    metrics: Sequence[Row] = ()
    """Metrics that MLflow has not received, and those sent recently, which it may have lost."""
    seconds: float = 0.0
    """Seconds of training of all attempts; 0: not recorded."""


@dataclass(frozen=True)
class Counts:
    """Counts of a run up to a checkpoint; see `TrainingState`."""

    step: int
    images: int
    skipped: int
    non_finite: int


def uri(output: str, step: int) -> str:
    """Return the URI of the checkpoint after `step` steps."""
    return storage.join(output, "checkpoints", f"{PREFIX}{step:08d}")


def committed_steps(output: str) -> list[int]:
    """List the steps of the complete checkpoints of a run, ascending."""
    folder = storage.join(output, "checkpoints")
    return [
        int(name.removeprefix(PREFIX))
        for name in storage.list_names(folder)
        if name.startswith(PREFIX) and storage.exists(storage.join(folder, name, MARKER))
    ]


def last_committed_step(output: str) -> int:
    """Return the step to resume from: that of the last complete checkpoint, or 0."""
    return max(committed_steps(output), default=0)


def save(
    output: str,
    state: TrainingState,
    history: History,
    origin: Mapping[str, object],
    held: Held | None = None,
) -> str:
    """Write a checkpoint, marker last, and return its URI.

    Args:
        output: the run's folder.
        state: the state after `state.step` steps.
        history: stored in `state.json`.
        origin: where the run comes from, stored there for people who look at it.
        held: the driver's lease on the folder; None if no other process writes there.

    Raises:
        StorageError: the checkpoint cannot be written; earlier ones are untouched.
        LeaseError: another driver has taken the lease; nothing is committed.
    """
    target = uri(output, state.step)
    if held:
        held.verify()  # without the lease, the folder may be another driver's complete checkpoint
    storage.delete_folder(target)  # files of an earlier attempt that was interrupted
    training: dict[str, Any] = {"optimizer": state.optimizer.state_dict()}
    if isinstance(state.module, QueryGroups):
        training["query_groups"] = state.module.training_state()
    try:
        with tempfile.TemporaryDirectory() as folder:
            if state.average:
                state.average.swap()  # now the model holds the averages, and `average` the raw weights
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
    counts = Counts(state.step, state.images, state.skipped, state.non_finite)
    storage.write_json(storage.join(target, STATE), {**origin, **asdict(history), **asdict(counts)})
    if held:
        held.verify()  # the upload took time; writing the marker is the commit point
    storage.write_bytes(storage.join(target, MARKER), b"")
    return target


def load(output: str, step: int, state: TrainingState) -> History:
    """Restore the state of a complete checkpoint in place, and return the history of the run.

    Raises:
        TrainingError: the checkpoint is missing, incomplete or damaged.
    """
    source = uri(output, step)
    if not storage.exists(storage.join(source, MARKER)):
        raise TrainingError(
            f"{source}: no complete checkpoint here, but the data stream resumes after this step."
        )
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
            f"{source}: the checkpoint is damaged ({error}). Delete this folder and rerun the command to resume from "
            "the checkpoint before it."
        ) from error
    dtype = next(state.model.parameters()).dtype
    state.model.load_state_dict(saved.to(dtype=dtype).state_dict())
    state.optimizer.load_state_dict(training["optimizer"])
    if isinstance(state.module, QueryGroups):
        state.module.load_training_state(training["query_groups"])
    if state.average:
        # `model/` holds the averages. Load the raw weights as the average, then swap the two.
        state.average.load_state_dict(training["raw"])
        state.average.swap()
    counts, history = read_state(output, step)
    for name, count in asdict(counts).items():
        setattr(state, name, count)
    return history


def read_state(output: str, step: int) -> tuple[Counts, History]:
    """Read the counts and the history of a checkpoint."""
    content = storage.read_json(storage.join(uri(output, step), STATE))
    counts = Counts(*(content[field.name] for field in fields(Counts)))
    rows = [(int(step), int(at), values) for step, at, values in content["metrics"]]
    return counts, History(rows, float(content.get("seconds", 0.0)))


def write_validation(output: str, step: int, metrics: dict[str, float]) -> None:
    """Store the validation metrics of a checkpoint; an empty dict marks a failed validation."""
    storage.write_json(_validation(output, step), metrics)


def read_validation(output: str, step: int) -> dict[str, float] | None:
    """Read the validation metrics of a checkpoint; None if it has not been validated."""
    file = _validation(output, step)
    metrics: dict[str, float] | None = storage.read_json(file) if storage.exists(file) else None
    return metrics


def validated_steps(output: str) -> list[int]:
    """List the steps whose checkpoints were validated, ascending, including those deleted since."""
    names = storage.list_names(storage.join(output, "validations"))
    # Files that are still being written end in `.partial`.
    return [int(name.removeprefix(PREFIX).removesuffix(".json")) for name in names if name.endswith(".json")]


def _validation(output: str, step: int) -> str:
    return storage.join(output, "validations", f"{PREFIX}{step:08d}.json")


def delete_surplus(output: str, keep: int, best: int | None, pending: set[int]) -> None:
    """Delete all checkpoints except the latest ones, the best one and those waiting for validation.

    Incomplete checkpoints are deleted too.

    Args:
        output: the run's folder.
        keep: number of latest checkpoints to retain.
        best: step of the best checkpoint so far.
        pending: steps whose validation has not finished.
    """
    complete = committed_steps(output)
    retained = {best} | pending | set(complete[-keep:])
    for name in storage.list_names(storage.join(output, "checkpoints")):
        if name.startswith(PREFIX) and int(name.removeprefix(PREFIX)) not in retained:
            folder = storage.join(output, "checkpoints", name)
            # Delete the marker first, so that a half-deleted checkpoint does not count as complete.
            storage.delete_file(storage.join(folder, MARKER))
            storage.delete_folder(folder)
