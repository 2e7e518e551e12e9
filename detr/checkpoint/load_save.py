"""Load and save model folders: ``config.json`` and ``model.safetensors``, in the format of transformers."""

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
"""The default of transformers."""

CLASS_HEAD = "class_labels_classifier."
# Groups of heads that a model has or lacks together: a DetrModel has neither group, a detector has the first, a
# segmentation model has both.
_HEADS = ((CLASS_HEAD, "bbox_predictor."), ("mask_head.", "bbox_attention."))
_LABEL_ARGUMENTS = frozenset({"num_labels", "id2label", "label2id"})


class _PretrainedModel(Protocol):
    """The interface of a DETR model, a `torch.nn.Module`, that loading and saving use."""

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
    """Return the local folder of a model: ``source`` itself, or the download folder of a hub model.

    Args:
        source: a folder, or a hub id ``ORG/NAME`` or ``hub:ORG/NAME``, whose configuration, image processor and
            weights are downloaded.
        arguments: see `detr.model_files.ModelFiles`.

    Raises:
        FileNotFoundError: neither the folder nor a hub model of this name exists, or the hub can't be reached.
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
    """Load a model saved by this library or by transformers, in evaluation mode.

    If ``num_labels``, ``id2label`` or ``label2id`` changes the number of classes, the class head is newly initialized,
    with a warning. All other weights are loaded.

    Args:
        cls: the model class; it may be a different DETR class than the saved one.
        source: a folder or a hub id, see `ModelFiles`; or a ``.pth`` file of facebookresearch/detr, see
            `original_config`.
        config: replaces the configuration of the source.
        dtype: dtype of the parameters; "auto", the default, is the saved dtype.
        torch_dtype: alias of ``dtype``.
        device_map: a device, the index of a GPU, or "auto" for a GPU if one is available.
        ignore_mismatched_sizes: newly initialize every parameter whose shape differs from the file's, with a warning.
        arguments: those of `ModelFiles` (``revision``, ``cache_dir``, ``token``, ``local_files_only``,
            ``force_download``, ``subfolder``), and fields of the configuration, which override those of the source.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        TypeError: an argument is not a field of the configuration.
        ValueError: a file can't be read, or the weights do not fit the configuration; the message names the first
            difference.
        RuntimeError: the device does not exist.
    """
    device = resolve_device(device_map)
    requested_dtype = resolve_dtype(dtype, torch_dtype)
    unknown = arguments.keys() - DetrConfig.keywords() - FILE_ARGUMENTS
    if unknown:
        raise TypeError(
            f"neither from_pretrained nor DetrConfig has an argument {', '.join(sorted(unknown))}; check the spelling"
        )
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
        # A folder that transformers saved after loading it from ours still contains our compat="original", although its
        # model ran and may have been trained with the behavior of transformers.
        is_from_transformers = (
            "transformers_version" in values and "compat" not in overrides and config.compat == "original"
        )
        reason = _reason_for_compat(values, model) if is_from_transformers else ""
        if reason:
            logger.warning(
                "%s was saved by transformers, which %s; compat='transformers' is set to preserve its predictions "
                "(pass compat='original' to override)",
                files,
                reason,
            )
            config.compat = "transformers"
            config.auxiliary_loss = bool(values.get("auxiliary_loss"))  # as in the decoder of transformers
            model = cls(config)
    else:
        model = cls(config)
    if tensors is None:
        tensors = read_model_weights(files)
    model.to(requested_dtype or _saved_dtype(config, tensors))
    restart: str | None = ""
    if not ignore_mismatched_sizes:
        restart = CLASS_HEAD if new_classes else None
    load_weights(model, tensors, str(files), restart=restart)
    return model.to(device).eval()


def _saved_dtype(config: DetrConfig, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of the configuration, or that of the weights if it has none."""
    if config.dtype is not None:
        saved: torch.dtype = getattr(torch, config.dtype)
        return saved
    return next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)


def resolve_dtype(
    dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None = None
) -> torch.dtype | None:
    """Return the dtype requested by either argument; None means "auto".

    Raises:
        ValueError: the dtype is not a floating-point dtype, or the two arguments contradict each other.
    """
    requested = {name for name in (dtype, torch_dtype) if name not in (None, "auto")}
    if len({dtype_name(name) for name in requested}) > 1:
        raise ValueError(f"torch_dtype={torch_dtype} contradicts dtype={dtype}; they are the same argument")
    return getattr(torch, dtype_name(requested.pop())) if requested else None


def _reason_for_compat(values: Mapping[str, Any], model: _PretrainedModel) -> str:
    """Return what transformers does differently from the original in this model, or ""."""
    if values.get("auxiliary_loss"):
        return "feeds the normalized output of each decoder layer to the next one (auxiliary_loss)"
    if differs_from_transformers(model.modules()):
        return "drops the activations fused into the backbone's batch norm, and its eps"
    return ""


def resolve_device(device_map: str | int | torch.device | Mapping[str, Any] | None) -> torch.device:
    """Return the requested device.

    Args:
        device_map: a device, the index of a GPU, "auto" (a GPU if one is available, else the CPU), or None (the CPU).

    Raises:
        ValueError: this is not a device, or the map splits the model over several devices.
        RuntimeError: the device does not exist.
    """
    if isinstance(device_map, Mapping):
        if device_map.keys() != {""}:
            raise ValueError(
                f"device_map={dict(device_map)!r} splits the model, but it runs on one device only; give that device"
            )
        return resolve_device(device_map[""])
    if device_map is None:
        return torch.device("cpu")
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda", device_map) if isinstance(device_map, int) else torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map={device_map!r} is not a device; give one such as 'cpu' or 'cuda:0', or 'auto'"
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

    Tensors of the file are ignored only if they belong to heads or backbone blocks that the model does not have. Heads
    are newly initialized, with a warning, only if the file has no head of their kind: a file of a `DetrModel` has no
    heads, and one of a detector has no mask head (training in two steps). The class head alone may be missing if
    ``restart`` is `CLASS_HEAD`.

    Args:
        model: the model.
        tensors: the content of the file, in any layout of `detr.checkpoint.key_maps`.
        source: name of the file, for messages.
        restart: parameters whose names contain this string are newly initialized if their shape differs from the
            file's; for other parameters that is an error. "" means all parameters, `CLASS_HEAD` the class head.

    Raises:
        ValueError: a tensor is missing, has the wrong shape or is not part of the model.
    """
    own = model.state_dict()
    loaded = adapt_names(tensors, own.keys())
    new = []
    for heads in _HEADS:
        if not any(_belongs_to(name, heads) for name in loaded):
            new += [name for name in own if _belongs_to(name, heads)]
    if restart == CLASS_HEAD and not any(CLASS_HEAD in name for name in loaded):
        new += [name for name in own if CLASS_HEAD in name and name not in new]
    for name in own:
        if name not in loaded or loaded[name].shape == own[name].shape:
            continue
        if restart is not None and restart in name:
            new.append(name)
            continue
        hint = "; pass num_labels=... to create a new class head" if CLASS_HEAD in name else ""
        raise ValueError(
            f"{source}: {name} has shape {tuple(loaded[name].shape)}, the model {tuple(own[name].shape)}{hint}"
        )
    missing = [name for name in own if name not in loaded and name not in new]
    if missing:
        hint = "; pass num_labels=... to create a new class head" if CLASS_HEAD in missing[0] else ""
        raise ValueError(
            f"{source} has no {missing[0]} ({len(missing)} of the model's {len(own)} tensors are missing){hint}"
        )
    absent_heads = [heads for heads in _HEADS if not any(_belongs_to(name, heads) for name in own)]
    unknown = [
        name
        for name in loaded
        if name not in own
        and BACKBONE_PREFIX not in name
        and not any(_belongs_to(name, heads) for heads in absent_heads)
    ]
    if unknown:
        raise ValueError(
            f"{source}: {unknown[0]} is not part of the model ({len(unknown)} such tensors); check the model class"
        )
    if new:
        logger.warning(
            "%s: these parameters are newly initialized and must be trained: %s",
            source,
            ", ".join(sorted(new)),
        )
    model.load_state_dict({name: loaded[name] for name in own if name not in new}, strict=False)


def _belongs_to(name: str, heads: tuple[str, ...]) -> bool:
    return name.removeprefix("detr.").startswith(heads)


def save_model(
    model: _PretrainedModel,
    folder: str | Path,
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` to ``folder``, which is created if missing.

    Both have the format of transformers, which can load them and predicts the same, unless activations are fused into
    the batch norm of the backbone (see `warn_about_transformers`). Weights that are already in the folder are replaced.

    Args:
        model: the model.
        folder: the destination.
        max_shard_size: maximum size of a weights file, in bytes or as text such as "5GB". Larger weights are split into
            several files with an index.
        state_dict: replaces the state dict of the model.

    Raises:
        ValueError: the model was returned by `optimize`, which converts weights; or ``state_dict`` is not that of the
            model.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    if model.is_optimized:
        raise ValueError(
            "this model was returned by optimize() and cannot be saved: save the model that was optimized"
        )
    own = model.state_dict()
    given = own if state_dict is None else state_dict
    if given.keys() != own.keys():
        name = sorted(given.keys() ^ own.keys())[0]
        raise ValueError(
            f"state_dict is not that of the model: {name} is in only one of them; pass all tensors of "
            "model.state_dict()"
        )
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
    """Log a warning, once per backbone, if transformers can load this model but predicts differently."""
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
        "a model with the backbone %s is saved: transformers can load it but predicts differently, because it drops "
        "the activations fused into the backbone's batch norm, and its eps; load the model with detr",
        backbone,
    )
