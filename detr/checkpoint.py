"""Loading and saving model folders: ``config.json`` and ``model.safetensors``, as transformers writes them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from detr.checkpoint_names import BACKBONE_PREFIX, adapt_names, to_resnet_name
from detr.config import DetrConfig, read_config
from detr.fast import is_optimized
from detr.frozen_batch_norm import differs_from_transformers
from detr.original_checkpoint import original_config
from detr.state_dict import WEIGHTS_NAME, read_model_weights, read_state_dict

if TYPE_CHECKING:
    from detr.pretrained import DetrPreTrainedModel

    Model = TypeVar("Model", bound=DetrPreTrainedModel)

logger = logging.getLogger(__name__)

DEFAULT_MAX_SHARD_SIZE = "50GB"
"""That of transformers."""

CLASS_HEAD = "class_labels_classifier."
# Of what one model has and another lacks, as a whole: a bare DetrModel, a detector, a segmentation model.
_HEADS = ((CLASS_HEAD, "bbox_predictor."), ("mask_head.", "bbox_attention."))
_HUB_ID = re.compile(r"(hub:)?(?P<id>[\w.-]+/[\w.-]+)")
_HUB_FILES = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]


def model_folder(source: str | Path, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The folder of a model: ``source`` itself, or where the hub's files are kept on this machine.

    Args:
        source: a folder, or a hub id ``ORG/NAME`` or ``hub:ORG/NAME``, which asks for the network.
        revision: of a hub id.
        local_files_only: of a hub id: use what has been downloaded before.

    Raises:
        FileNotFoundError: there is no such folder and no such model on the hub, or the hub cannot be reached.
    """
    if Path(source).is_dir():
        return Path(source)
    hub_id = _HUB_ID.fullmatch(str(source))
    if hub_id is None:
        raise FileNotFoundError(f"model folder {source} does not exist")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            hub_id["id"], revision=revision, local_files_only=local_files_only, allow_patterns=_HUB_FILES
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no folder {source}, and it could not be fetched from the hub: {error}"
        ) from error
    return Path(folder)


def load_model(
    cls: type[Model],
    source: str | Path,
    *,
    config: DetrConfig | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: str | int | torch.device | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    ignore_mismatched_sizes: bool = False,
    **overrides: Any,
) -> Model:
    """Load a model written by this library or by transformers, in evaluation mode.

    With ``num_labels``, ``id2label`` or ``label2id`` among the overrides and another number of classes than the
    file's, the class head starts anew; that is logged, and nothing else starts anew.

    Args:
        cls: the model class; it may be another DETR class than the one that was saved.
        source: see `model_folder`; or a ``.pth`` file of facebookresearch/detr, see `original_config`.
        config: instead of the source's own.
        dtype: of the parameters; "auto" is the one that the folder was saved with.
        device_map: where to put the model: a device, a GPU's index, or "auto" for a GPU where there is one.
        revision: see `model_folder`.
        local_files_only: see `model_folder`.
        ignore_mismatched_sizes: let every parameter that has another shape than the file's start anew.
        overrides: fields of the configuration that replace the file's.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        TypeError: an override is no field of the configuration.
        ValueError: the weights do not fit the configuration; the first difference is named.
        RuntimeError: this machine has no such device.
    """
    unknown = overrides.keys() - DetrConfig.keywords()
    if unknown:
        raise TypeError(f"from_pretrained has no argument {', '.join(sorted(unknown))}, nor has DetrConfig")
    device = find_device(device_map)
    if config is not None and overrides:
        raise ValueError(f"give either config or {', '.join(sorted(overrides))}, not both")
    single_file = Path(source).is_file()
    folder = Path(source) if single_file else model_folder(source, revision, local_files_only)
    tensors = read_state_dict(folder) if single_file else None
    if config is None:
        values = read_config(folder) if tensors is None else original_config(tensors, str(folder))
        config = DetrConfig.from_dict(values, **overrides)
        model = cls(config)
        # A folder of ours that transformers has written again has our compat, but is trained by transformers' rules.
        decides = (
            "transformers_version" in values and "compat" not in overrides and config.compat == "original"
        )
        reason = _reason_for_compat(values, model) if decides else ""
        if reason:
            logger.warning(
                "%s was written by transformers, which %s; compat='transformers' is set so that the predictions "
                "stay the same (compat='original' overrules it)",
                folder,
                reason,
            )
            config.compat = "transformers"
            model = cls(config)
    else:
        model = cls(config)
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    restart: str | None = ""
    if not ignore_mismatched_sizes:
        new_classes = not {"num_labels", "id2label", "label2id"}.isdisjoint(overrides)
        restart = CLASS_HEAD if new_classes else None
    if tensors is None:
        tensors = read_model_weights(folder)
    load_weights(model, tensors, str(folder), restart=restart)
    return model.to(device).eval()


def _reason_for_compat(values: Mapping[str, Any], model: torch.nn.Module) -> str:
    """How the predictions of a model that transformers wrote would change under the original's rules."""
    if values.get("auxiliary_loss"):
        return "feeds the normed output of each decoder layer to the next one (auxiliary_loss)"
    if differs_from_transformers(model):
        return "drops the activations fused into the backbone's batch norm, and its eps"
    return ""


def find_device(device_map: str | int | torch.device | None) -> torch.device:
    """The device that is asked for: itself, a GPU's index, "auto" (a GPU where there is one), or None (the CPU).

    Raises:
        RuntimeError: this machine has no such device.
    """
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda", device_map) if isinstance(device_map, int) else torch.device(device_map)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"device_map={device_map!r}: this machine has {torch.cuda.device_count()} CUDA devices; use 'cpu' or 'auto'"
        )
    return device


def load_weights(
    model: DetrPreTrainedModel, tensors: Mapping[str, Tensor], source: str, *, restart: str | None = None
) -> None:
    """Copy the tensors of a file into a model, in place.

    What the model has no place for is left out only where it belongs to something the model is without: heads,
    or backbone blocks after the last map. Heads start anew only where the file has none of their kind: one of a
    bare `DetrModel`, or the masks' where it is a detector's (training in two steps). That is logged.

    Args:
        model: the model.
        tensors: the file's content, in any layout of `detr.checkpoint_names`.
        source: the file's name, for messages.
        restart: parameters with this in their names keep their new values where the file's have another shape,
            instead of that being an error; "" is all of them, `CLASS_HEAD` the class head.

    Raises:
        ValueError: a tensor is missing, has another shape or has no place.
    """
    own = model.state_dict()
    found = adapt_names(tensors, own.keys())
    fresh = []
    for heads in _HEADS:
        if not any(_is_of(name, heads) for name in found):
            fresh += [name for name in own if _is_of(name, heads)]
    for name in own:
        if name not in found or found[name].shape == own[name].shape:
            continue
        if restart is not None and restart in name:
            fresh.append(name)
            continue
        hint = "; num_labels=... makes a new class head" if CLASS_HEAD in name else ""
        raise ValueError(
            f"{source}: {name} has shape {tuple(found[name].shape)}, the model {tuple(own[name].shape)}{hint}"
        )
    missing = [name for name in own if name not in found and name not in fresh]
    if missing:
        raise ValueError(
            f"{source} has no {missing[0]} ({len(missing)} of the model's {len(own)} tensors missing)"
        )
    lacking = [heads for heads in _HEADS if not any(_is_of(name, heads) for name in own)]
    unknown = [
        name
        for name in found
        if name not in own
        and BACKBONE_PREFIX not in name
        and not any(_is_of(name, heads) for heads in lacking)
    ]
    if unknown:
        raise ValueError(f"{source}: {unknown[0]} has no place in the model ({len(unknown)} such tensors)")
    if fresh:
        logger.warning("%s: these start anew and have to be trained: %s", source, ", ".join(sorted(fresh)))
    model.load_state_dict({name: found[name] for name in own if name not in fresh}, strict=False)


def _is_of(name: str, heads: tuple[str, ...]) -> bool:
    return name.removeprefix("detr.").startswith(heads)


def save_model(
    model: DetrPreTrainedModel,
    folder: str | Path,
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``folder``, which is made where missing.

    Both are in the layout of transformers, which can load them and predicts the same; where it does not (activations
    fused into the backbone's batch norm), that is logged. Weights that were in the folder are replaced.

    Args:
        model: the model.
        folder: where to.
        max_shard_size: bytes, or text such as "5GB", from which on the weights are several files with an index.
        state_dict: instead of the model's own.

    Raises:
        ValueError: the model comes from `optimize`, whose weights are no longer those of the network; or ``state_dict``
            is not that of the model.
    """
    if is_optimized(model):
        raise ValueError(
            "this model comes from optimize() and cannot be saved: save the one it was made from"
        )
    own = model.state_dict()
    given = own if state_dict is None else state_dict
    if given.keys() != own.keys():
        name = sorted(given.keys() ^ own.keys())[0]
        raise ValueError(f"state_dict is not that of the model: {name} is in only one of the two")
    if model.config.compat == "original" and differs_from_transformers(model):
        _warn_about_transformers(str(model.config.backbone_config.get("backbone")))
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in given.items()}
    if model.config.backbone_config["model_type"] == "resnet":
        tensors = {to_resnet_name(name): tensor for name, tensor in tensors.items()}
    old = set(path.glob("model*.safetensors")) | set(path.glob("model.safetensors.index.json"))
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for name, keys in shards.filename_to_tensors.items():
        save_file({key: tensors[key] for key in keys}, str(path / name), metadata={"format": "pt"})
        old.discard(path / name)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (path / f"{WEIGHTS_NAME}.index.json").write_text(text, encoding="utf-8")
        old.discard(path / f"{WEIGHTS_NAME}.index.json")
    for file in old:
        file.unlink()
    model.config.save_pretrained(path)


@cache
def _warn_about_transformers(backbone: str) -> None:
    logger.warning(
        "a model with the backbone %s is saved: transformers can load it but predicts differently, since it drops the "
        "activations fused into the backbone's batch norm, and its eps; load it with detr",
        backbone,
    )
