"""Loading and saving model folders: ``config.json`` and ``model.safetensors``, as transformers writes them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from detr.checkpoint.key_maps import BACKBONE_PREFIX, adapt_names, to_resnet_name
from detr.checkpoint.original import original_config
from detr.checkpoint.state_dict import list_weights, read_model_weights, read_state_dict
from detr.config import DetrConfig, dtype_name, read_config
from detr.model.frozen_batch_norm import differs_from_transformers
from detr.model_files import CONFIG_NAME, FILE_ARGUMENTS, PROCESSOR_NAMES, WEIGHTS_NAMES, ModelFiles

logger = logging.getLogger(__name__)

DEFAULT_MAX_SHARD_SIZE = "50GB"
"""That of transformers."""

CLASS_HEAD = "class_labels_classifier."
# Of what one model has and another lacks, as a whole: a bare DetrModel, a detector, a segmentation model.
_HEADS = ((CLASS_HEAD, "bbox_predictor."), ("mask_head.", "bbox_attention."))
_LABEL_ARGUMENTS = frozenset({"num_labels", "id2label", "label2id"})


class _PretrainedModel(Protocol):
    """What loading and saving need of a DETR model, which is a `torch.nn.Module`."""

    config: DetrConfig
    is_optimized: bool

    def __init__(self, config: DetrConfig) -> None: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> object: ...

    def to(self, target: Any) -> Self: ...

    def eval(self) -> Self: ...


Model = TypeVar("Model", bound=_PretrainedModel)


def model_folder(source: str | Path, **arguments: Any) -> Path:
    """The folder of a model: ``source`` itself, or where all files of a model of the hub are on this machine.

    Args:
        source: a folder, or a hub id ``ORG/NAME`` or ``hub:ORG/NAME``, whose configuration, image processor and
            weights are downloaded.
        arguments: see `detr.model_files.ModelFiles`.

    Raises:
        FileNotFoundError: there is no such folder and no such model on the hub, or the hub can't be reached.
    """
    files = ModelFiles(source, **arguments)
    if files.path is not None:
        if not files.path.is_dir():
            raise FileNotFoundError(f"{source} is a file, not a model folder")
        return files.path
    config = files.require(CONFIG_NAME)
    files.find(*PROCESSOR_NAMES)
    list_weights(files)
    return config.parent


def load_model(
    cls: type[Model],
    source: str | Path,
    *,
    config: DetrConfig | None = None,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device_map: str | int | torch.device | Mapping[str, Any] | None = None,
    ignore_mismatched_sizes: bool = False,
    **arguments: Any,
) -> Model:
    """Load a model written by this library or by transformers, in evaluation mode.

    With ``num_labels``, ``id2label`` or ``label2id`` among the overrides and another number of classes than the
    file's, the class head starts anew; that is logged, and nothing else starts anew.

    Args:
        cls: the model class; it may be another DETR class than the one that was saved.
        source: a folder or a hub id, see `ModelFiles`; or a ``.pth`` file of facebookresearch/detr, see
            `original_config`.
        config: instead of the source's own.
        dtype: of the parameters; "auto", the default, is the one that the model was saved with.
        torch_dtype: another name of ``dtype``.
        device_map: where to put the model: a device, a GPU's index, or "auto" for a GPU where there is one.
        ignore_mismatched_sizes: let every parameter that has another shape than the file's start anew.
        arguments: those of `ModelFiles` (``revision``, ``cache_dir``, ``token``, ``local_files_only``,
            ``force_download``, ``subfolder``), and fields of the configuration that replace the file's.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        TypeError: an override is no field of the configuration.
        ValueError: a file can't be read, or the weights do not fit the configuration; the first difference is named.
        RuntimeError: this machine has no such device.
    """
    device = find_device(device_map)
    chosen = find_dtype(dtype, torch_dtype)
    unknown = arguments.keys() - DetrConfig.keywords() - FILE_ARGUMENTS
    if unknown:
        raise TypeError(f"from_pretrained has no argument {', '.join(sorted(unknown))}, nor has DetrConfig")
    overrides = {name: value for name, value in arguments.items() if name not in FILE_ARGUMENTS}
    if config is not None and overrides:
        raise ValueError(f"give either config or {', '.join(sorted(overrides))}, not both")
    files, _ = ModelFiles.open(source, **arguments)
    new_classes = not _LABEL_ARGUMENTS.isdisjoint(overrides)
    tensors = None
    if files.path is not None and files.path.is_file():
        tensors = read_state_dict(files.path)
    if config is None:
        if tensors is None:
            config, values = read_config(files, overrides)
        else:
            values = original_config(tensors, str(files), classes_given=new_classes)
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
                files,
                reason,
            )
            config.compat = "transformers"
            config.auxiliary_loss = bool(values.get("auxiliary_loss"))  # as its decoder ran there
            model = cls(config)
    else:
        model = cls(config)
    if tensors is None:
        tensors = read_model_weights(files)
    model.to(chosen or _saved_dtype(config, tensors))
    restart: str | None = ""
    if not ignore_mismatched_sizes:
        restart = CLASS_HEAD if new_classes else None
    load_weights(model, tensors, str(files), restart=restart)
    return model.to(device).eval()


def _saved_dtype(config: DetrConfig, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that a configuration names, else that of the weights."""
    if config.dtype is not None:
        saved: torch.dtype = getattr(torch, config.dtype)
        return saved
    return next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)


def find_dtype(
    dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None = None
) -> torch.dtype | None:
    """The dtype requested under either name; None is "auto".

    Raises:
        ValueError: it is no floating-point dtype, or the two names contradict each other.
    """
    found = {name for name in (dtype, torch_dtype) if name not in (None, "auto")}
    if len({dtype_name(name) for name in found}) > 1:
        raise ValueError(f"torch_dtype={torch_dtype} contradicts dtype={dtype}; they are the same argument")
    return getattr(torch, dtype_name(found.pop())) if found else None


def _reason_for_compat(values: Mapping[str, Any], model: _PretrainedModel) -> str:
    """How the predictions of a model that transformers wrote would change under the original's rules."""
    if values.get("auxiliary_loss"):
        return "feeds the normed output of each decoder layer to the next one (auxiliary_loss)"
    if differs_from_transformers(model.modules()):
        return "drops the activations fused into the backbone's batch norm, and its eps"
    return ""


def find_device(device_map: str | int | torch.device | Mapping[str, Any] | None) -> torch.device:
    """The device that is asked for: itself, a GPU's index, "auto" (a GPU where there is one), or None (the CPU).

    Raises:
        ValueError: this is no device, or the model is to be spread over several.
        RuntimeError: this machine has no such device.
    """
    if isinstance(device_map, Mapping):
        if device_map.keys() != {""}:
            raise ValueError(
                f"device_map={dict(device_map)!r} spreads the model, which runs on one device; give that device"
            )
        return find_device(device_map[""])
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda", device_map) if isinstance(device_map, int) else torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map={device_map!r} is no device; give one such as 'cpu' or 'cuda:0', or 'auto'"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"device_map={device_map!r}: this machine has {torch.cuda.device_count()} CUDA devices; use 'cpu' or 'auto'"
        )
    return device


def load_weights(
    model: _PretrainedModel, tensors: Mapping[str, Tensor], source: str, *, restart: str | None = None
) -> None:
    """Copy the tensors of a file into a model, in place.

    What the model has no place for is left out only where it belongs to something the model is without: heads,
    or backbone blocks after the last map. Heads start anew only where the file has none of their kind: one of a
    bare `DetrModel`, or the masks' where it is a detector's (training in two steps). The class head alone may be
    missing where new classes are given. That is logged.

    Args:
        model: the model.
        tensors: the file's content, in any layout of `detr.checkpoint.key_maps`.
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
    if restart == CLASS_HEAD and not any(CLASS_HEAD in name for name in found):
        fresh += [name for name in own if CLASS_HEAD in name and name not in fresh]
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
        hint = "; num_labels=... makes a new class head" if CLASS_HEAD in missing[0] else ""
        raise ValueError(
            f"{source} has no {missing[0]} ({len(missing)} of the model's {len(own)} tensors missing){hint}"
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
    model: _PretrainedModel,
    folder: str | Path,
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``folder``, which is made where missing.

    Both are in the layout of transformers, which can load them and predicts the same, except where activations are
    fused into the backbone's batch norm (see `warn_about_transformers`). Weights that were in the folder are replaced.

    Args:
        model: the model.
        folder: where to.
        max_shard_size: bytes, or text such as "5GB", from which on the weights are several files with an index.
        state_dict: instead of the model's own.

    Raises:
        ValueError: the model comes from `optimize`, whose weights are no longer those of the network; or ``state_dict``
            is not that of the model.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    if model.is_optimized:
        raise ValueError(
            "this model comes from optimize() and cannot be saved: save the one it was made from"
        )
    own = model.state_dict()
    given = own if state_dict is None else state_dict
    if given.keys() != own.keys():
        name = sorted(given.keys() ^ own.keys())[0]
        raise ValueError(f"state_dict is not that of the model: {name} is in only one of the two")
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
        (path / WEIGHTS_NAMES[1]).write_text(text, encoding="utf-8")
        old.discard(path / WEIGHTS_NAMES[1])
    for file in old:
        file.unlink()
    model.config.save_pretrained(path)


def warn_about_transformers(model: _PretrainedModel) -> None:
    """Log, once for each backbone, that transformers reads the file of this model but predicts differently."""
    config = model.config
    if (
        config.compat == "original"
        and config.multi_scale is None
        and differs_from_transformers(model.modules())
    ):
        _warn_about_backbone(str(config.backbone_config.get("backbone")))


@cache
def _warn_about_backbone(backbone: str) -> None:
    logger.warning(
        "a model with the backbone %s is saved: transformers can load it but predicts differently, since it drops the "
        "activations fused into the backbone's batch norm, and its eps; load it with detr",
        backbone,
    )
