"""A loss or gradient that is not finite: which images, which layer first, and the batch kept so that it can be replayed.

OUTPUT/non-finite/step-00000123/rank-0.pt   what this worker's model was given, and the normalisers of its loss
OUTPUT/non-finite/step-00000123/model/      the weights before the step, of rank 0
"""

import dataclasses
import io
import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from detr.checkpoint.load_save import save_model
from detr.model.detection import DetrForObjectDetection
from detr.model.segmentation import DetrForSegmentation
from detr.training.query_groups import QueryGroups
from raydetr import storage
from raydetr.data.stream.micro_batch import TrainingBatch
from raydetr.errors import ConfigError, StorageError
from raydetr.training.config import TrainConfig
from raydetr.training.distributed import StepTotals
from raydetr.training.state import TrainingState
from raydetr.training.step import autocast, seed_dropout, to_arguments

FOLDER = "non-finite"


def keep(
    config: TrainConfig,
    rank: int,
    state: TrainingState,
    batches: Sequence[TrainingBatch],
    totals: StepTotals,
) -> str:
    """Save what this worker had in a step; returns the file's address.

    Raises:
        StorageError: it cannot be written.
    """
    folder = storage.join(config.output, FOLDER, f"step-{batches[0].step:08d}")
    content: dict[str, Any] = {
        "step": batches[0].step,
        "seed": config.seed,
        "precision": config.precision,
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
    address = storage.join(folder, f"rank-{rank}.pt")
    storage.write_bytes(address, buffer.getvalue())
    if rank == 0:
        try:
            with tempfile.TemporaryDirectory() as local:
                save_model(state.model, local)
                state.processor.save_pretrained(local)
                storage.upload_folder(local, storage.join(folder, "model"))
        except (OSError, SafetensorError) as error:  # the local disk is full
            raise StorageError(f"{folder}: the model cannot be written ({error}).") from error
    return address


def first_bad_layer(
    state: TrainingState, batches: Sequence[TrainingBatch], config: TrainConfig, totals: StepTotals
) -> str:
    """Do this worker's part of a step again and say where the first number that is not finite appears; empty: nowhere."""
    normalisers = {"num_boxes": totals.num_boxes, "class_weight_sum": totals.class_weight_sum}
    for batch in batches:
        seed_dropout(config.seed, batch.step, batch.position)
        found = probe(state.module, {**to_arguments(batch, state), **normalisers}, config)
        if found:
            return f"{found} (images {list(batch.image_ids)})"
    return ""


def probe(model: nn.Module, arguments: Mapping[str, Any], config: TrainConfig) -> str:
    """The first place of a forward and backward pass that is not finite; empty: all is finite."""
    model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the weights: {name}"
    if not torch.isfinite(arguments["pixel_values"]).all():
        return "the input: pixel_values"
    eager = torch.compiler.set_stance("force_eager")  # a compiled network has no modules to watch
    device = arguments["pixel_values"].device
    with eager, _watching(model) as (forward, backward), autocast(config, device):
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
def _watching(model: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """Names of modules whose output, or its gradient, is not finite, in the order in which they occur."""
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

    # Not only the leaves: what a module computes between them is its own output. Inner ones come first.
    handles = [watch(name, module) for name, module in model.named_modules()]
    try:
        yield forward, backward
    finally:
        for handle in handles:
            handle.remove()


def replay(config: TrainConfig) -> dict[str, Any]:
    """Do the step of a saved batch again on this machine; what `pipelines/train.py --replay FILE` does.

    Precision and dropout are those of the run.

    Raises:
        ConfigError: the file is none of `keep`.
    """
    try:
        data = io.BytesIO(storage.read_bytes(config.replay))
        content = torch.load(data, weights_only=True, map_location="cpu")
        batches = content["micro_batches"]
        config = dataclasses.replace(config, seed=content["seed"], precision=content["precision"])
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--replay {config.replay}: not a batch saved by a training run ({error})."
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        storage.download_folder(storage.join(os.path.dirname(config.replay), "model"), folder)
        kind = DetrForSegmentation if "masks" in batches[0]["labels"][0] else DetrForObjectDetection
        model: DetrForObjectDetection | DetrForSegmentation = kind.from_pretrained(folder)
    module: nn.Module = model
    if "query_groups" in content:
        groups = content["query_groups"]
        module = QueryGroups(model, groups["groups"], groups["cell_loss"])
        module.load_training_state(groups["state"])
    module.train()
    if config.precision == "float64":
        module.double()
    found = {}
    for batch in batches:
        seed_dropout(config.seed, content["step"], batch["position"])
        arguments = {name: batch[name] for name in ("pixel_values", "pixel_mask", "labels", "image_weights")}
        normalisers = {name: content[name] for name in ("num_boxes", "class_weight_sum")}
        where = probe(module, {**arguments, **normalisers}, config)
        found[f"images {batch['image_ids']}"] = where or "finite"
    return {"step": content["step"], **found}
