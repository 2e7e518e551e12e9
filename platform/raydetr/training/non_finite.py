"""Handle a non-finite loss or gradient: report the images and the first layer, and save the batch for `--replay`.

OUTPUT/non-finite/step-00000123/rank-0.pt   the model inputs of this worker, and the normalizers of its loss
OUTPUT/non-finite/step-00000123/model/      the weights before the step, from rank 0
"""

import io
import os
import pickle
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from detr.checkpoint.load_save import save_model
from detr.model.detection import DetrForObjectDetection
from detr.model.segmentation import DetrForSegmentation
from detr.training.query_groups import QueryGroups
from raydetr import storage
from raydetr.data.stream.micro_batch import TrainingBatch
from raydetr.errors import ConfigError, StorageError, TrainingError
from raydetr.flat_keys import override
from raydetr.training.config import TrainConfig
from raydetr.training.distributed import StepTotals, world_size
from raydetr.training.progress import log_line
from raydetr.training.state import TrainingState
from raydetr.training.step import autocast, seed_dropout, to_arguments

FOLDER = "non-finite"


def handle_non_finite(
    state: TrainingState,
    batches: list[TrainingBatch],
    config: TrainConfig,
    totals: StepTotals,
    metrics: dict[str, float],
    rank: int,
) -> None:
    """Save the batch of a step with a non-finite loss or gradient, find the layer, and skip the step or stop.

    Every rank calls this for the same step, since the summed loss and gradient are non-finite on all of them.

    Raises:
        TrainingError: with `--on-non-finite stop`, or after `--max-non-finite` skipped steps; raised on all ranks.
    """
    step = batches[0].step
    state.optimizer.zero_grad(set_to_none=True)
    try:
        file, error = save_batch(config, rank, state, batches, totals), ""
    except StorageError as failure:  # do not raise on one rank: the other ranks wait in the gather below
        file, error = "", str(failure)
    place = (
        f"on rank {rank}: {where}"
        if (where := find_non_finite_in_step(state, batches, config, totals))
        else ""
    )
    state.optimizer.zero_grad(set_to_none=True)
    ids = [image_id for batch in batches for image_id in batch.image_ids]
    gathered: list[Any] = [(place, ids, file, error)]
    if world_size() > 1:
        gathered = [None] * world_size()
        dist.all_gather_object(gathered, (place, ids, file, error))
    places = "; ".join(each[0] for each in gathered if each[0]) or "in no single layer: the sum overflows"
    # Report the batch of the first rank that found a layer: the other ranks only received its gradient.
    _, _, file, error = next((each for each in gathered if each[0]), gathered[0])
    saved = (
        f"The batch could not be saved: {error}"
        if error
        else f"To replay the batch: pipelines/train.py --replay {shlex.quote(file)}"
    )
    state.non_finite += 1
    message = (
        f"Step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; images "
        f"{sorted(image_id for each in gathered for image_id in each[1])}. First non-finite value {places}. "
        f"{saved}"
    )
    if (
        config.fault_tolerance.on_non_finite == "skip"
        and state.non_finite <= config.fault_tolerance.max_non_finite
    ):
        if rank == 0:
            log_line(
                f"{message}\nSkipping the step ({state.non_finite} of at most {config.fault_tolerance.max_non_finite})."
            )
        return
    raise TrainingError(
        f"{message}. The last checkpoint is intact: pass its model folder in {config.run.output}/checkpoints as --model, "
        "with a lower --learning-rate and another --output, or rerun the command with --on-non-finite skip."
    )


def save_batch(
    config: TrainConfig,
    rank: int,
    state: TrainingState,
    batches: Sequence[TrainingBatch],
    totals: StepTotals,
) -> str:
    """Save this worker's batch of a step, and on rank 0 the model; return the URI of the batch.

    Raises:
        StorageError: the batch or the model cannot be written.
    """
    folder = storage.join(config.run.output, FOLDER, f"step-{batches[0].step:08d}")
    content: dict[str, Any] = {
        "step": batches[0].step,
        "seed": config.run.seed,
        "precision": config.optimizer.precision,
        "num_boxes": totals.num_boxes,
        "class_weight_sum": totals.class_weight_sum,
        "micro_batches": [
            {"image_ids": list(batch.image_ids), "position": batch.position, **to_arguments(batch, state)}
            for batch in batches
        ],
    }
    if isinstance(state.module, QueryGroups):
        content["query_groups"] = {
            "groups": state.module.groups,
            "cell_loss": state.module.dense_loss_weight,
            "state": state.module.training_state(),
        }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    uri = storage.join(folder, f"rank-{rank}.pt")
    storage.write_bytes(uri, buffer.getvalue())
    if rank == 0:
        try:
            with tempfile.TemporaryDirectory() as local:
                save_model(state.model, local)
                state.processor.save_pretrained(local)
                storage.upload_folder(local, storage.join(folder, "model"))
        except (OSError, SafetensorError) as error:  # such as a full local disk
            raise StorageError(f"{folder}: the model cannot be written ({error}).") from error
    return uri


def find_non_finite_in_step(
    state: TrainingState, batches: Sequence[TrainingBatch], config: TrainConfig, totals: StepTotals
) -> str:
    """Repeat this worker's part of a step, and describe the first non-finite value; empty if all values are finite."""
    normalizers = {"num_boxes": totals.num_boxes, "class_weight_sum": totals.class_weight_sum}
    for batch in batches:
        seed_dropout(config.run.seed, batch.step, batch.position)
        place = find_non_finite(state.module, {**to_arguments(batch, state), **normalizers}, config)
        if place:
            return f"{place} (images {list(batch.image_ids)})"
    return ""


def find_non_finite(model: nn.Module, arguments: Mapping[str, Any], config: TrainConfig) -> str:
    """Describe the first non-finite value of a forward and backward pass; empty if all values are finite."""
    model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the weights: {name}"
    if not torch.isfinite(arguments["pixel_values"]).all():
        return "the input: pixel_values"
    eager = torch.compiler.set_stance("force_eager")  # module hooks do not run in a compiled network
    device = arguments["pixel_values"].device
    with eager, _non_finite_modules(model) as (forward, backward), autocast(config, device):
        outputs = model(**arguments)
        if forward:
            return f"the forward pass: {forward[0]}"
        if not torch.isfinite(outputs.loss):
            terms = [name for name, value in outputs.loss_dict.items() if not torch.isfinite(value)]
            return f"the loss: {', '.join(terms)}"
        outputs.loss.backward()
        if backward:
            return f"the backward pass: the gradient of the output of {backward[0]}"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the backward pass: the gradient of {name}"
    return ""


@contextmanager
def _non_finite_modules(model: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """Collect the names of modules with a non-finite output, or output gradient, in the order they occur."""
    forward: list[str] = []
    backward: list[str] = []

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            if not torch.isfinite(output).all():
                forward.append(f"{name} ({type(module).__name__})")
            if output.requires_grad:
                output.register_hook(
                    lambda gradient: None if torch.isfinite(gradient).all() else backward.append(name)
                )

        return module.register_forward_hook(hook)

    # Hook all modules, not only leaves: a parent also computes between its children. Hooks of children run first.
    handles = [watch(name, module) for name, module in model.named_modules()]
    try:
        yield forward, backward
    finally:
        for handle in handles:
            handle.remove()


def replay(config: TrainConfig) -> dict[str, Any]:
    """Repeat the step of a saved batch on this machine: `pipelines/train.py --replay FILE`.

    Precision and dropout are those of the run.

    Returns:
        `step`, and for the images of each micro-batch the first non-finite value, or "finite".

    Raises:
        ConfigError: the file was not written by `save_batch`.
    """
    try:
        data = io.BytesIO(storage.read_bytes(config.fault_tolerance.replay))
        content = torch.load(data, weights_only=True, map_location="cpu")
        batches = content["micro_batches"]
        config = override(config, seed=content["seed"], precision=content["precision"])
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--replay {config.fault_tolerance.replay}: this is not a batch saved by a training run ({error})."
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        storage.download_folder(storage.join(os.path.dirname(config.fault_tolerance.replay), "model"), folder)
        kind = DetrForSegmentation if "masks" in batches[0]["labels"][0] else DetrForObjectDetection
        model: DetrForObjectDetection | DetrForSegmentation = kind.from_pretrained(folder)
    module: nn.Module = model
    if "query_groups" in content:
        groups = content["query_groups"]
        module = QueryGroups(model, groups["groups"], groups["cell_loss"])
        module.load_training_state(groups["state"])
    module.train()
    if config.optimizer.precision == "float64":
        module.double()
    places = {}
    for batch in batches:
        seed_dropout(config.run.seed, content["step"], batch["position"])
        arguments = {name: batch[name] for name in ("pixel_values", "pixel_mask", "labels", "image_weights")}
        normalizers = {name: content[name] for name in ("num_boxes", "class_weight_sum")}
        place = find_non_finite(module, {**arguments, **normalizers}, config)
        places[f"images {batch['image_ids']}"] = place or "finite"
    return {"step": content["step"], **places}
