"""Loading and saving model folders: ``config.json`` and ``model.safetensors``, as transformers writes them.

Our parameter names are those of the files on disk, so saving renames nothing. Loading also accepts the names
that transformers 5 uses at run time and the two places of learned position embeddings.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from detr.backbone import has_fused_activations, read_state_dict
from detr.config import DetrConfig, read_config

if TYPE_CHECKING:
    from detr.model import DetrPreTrainedModel

    Model = TypeVar("Model", bound=DetrPreTrainedModel)

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "model.safetensors"
_HEADS = ("class_labels_classifier.", "bbox_predictor.")
_CLASS_HEAD = "class_labels_classifier."

# Run-time names of transformers 5 and old places, to the names on disk.
_RENAMES = (
    (r"(^|\.)backbone\.model\.", r"\1backbone.conv_encoder.model."),
    (r"\.(self_attn|encoder_attn)\.o_proj\.", r".\1.out_proj."),
    (r"\.layers\.(\d+)\.mlp\.(fc1|fc2)\.", r".layers.\1.\2."),
    (r"(^|\.)backbone\.position_embedding\.", r"\1position_embedding."),
)
# transformers' own ResNet to timm's; the same network under other names.
_RESNET_RENAMES = (
    (r"\.model\.embedder\.embedder\.convolution\.", r".model.conv1."),
    (r"\.model\.embedder\.embedder\.normalization\.", r".model.bn1."),
)
_RESNET_BLOCK = re.compile(
    r"\.model\.encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:(shortcut)|layer\.(\d+))\.(convolution|normalization)\."
)


def to_file_name(name: str) -> str:
    """The name of a tensor in our files, from any name that transformers gives it."""
    for pattern, replacement in (*_RENAMES, *_RESNET_RENAMES):
        name = re.sub(pattern, replacement, name)
    return _RESNET_BLOCK.sub(_timm_block, name)


def _timm_block(match: re.Match[str]) -> str:
    stage, block, shortcut, layer, kind = match.groups()
    prefix = f".model.layer{int(stage) + 1}.{block}."
    if shortcut:
        return prefix + ("downsample.0." if kind == "convolution" else "downsample.1.")
    return prefix + ("conv" if kind == "convolution" else "bn") + f"{int(layer) + 1}."


def _to_resnet_name(name: str) -> str:
    """The inverse of the ResNet part of `to_file_name`, for configurations of ``model_type`` "resnet"."""
    head, found, tail = name.partition("backbone.conv_encoder.model.")
    if not found:
        return name
    parts = tail.split(".")
    kind = "convolution" if "conv" in parts[-2] or tail.split(".")[-2] == "0" else "normalization"
    if not parts[0].startswith("layer"):
        return f"{head}{found}embedder.embedder.{kind}.{parts[-1]}"
    where = "shortcut" if parts[2] == "downsample" else f"layer.{int(parts[2][-1]) - 1}"
    return f"{head}{found}encoder.stages.{int(parts[0][5:]) - 1}.layers.{parts[1]}.{where}.{kind}.{parts[-1]}"


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a model folder: ``model.safetensors``, its sharded form or ``pytorch_model.bin``.

    Raises:
        FileNotFoundError: the folder has none of them.
    """
    folder = Path(folder)
    for name in (WEIGHTS_NAME, "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_state_dict(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return {
                key: tensor for shard in shards for key, tensor in read_state_dict(folder / shard).items()
            }
    raise FileNotFoundError(f"{folder} holds neither {WEIGHTS_NAME} nor pytorch_model.bin")


def adapt_names(tensors: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Rename the tensors of a file to those of a model, which may be another of the three DETR classes.

    ``num_batches_tracked`` is dropped: frozen batch norm has none.
    """
    named = {to_file_name(k): v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    best: dict[str, Tensor] = named
    for old, new in (
        ("", ""),
        ("model.", ""),
        ("", "model."),
        ("detr.", ""),
        ("detr.model.", ""),
        ("", "detr."),
    ):
        changed = {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in named.items()}
        if len(wanted & changed.keys()) > len(wanted & best.keys()):
            best = changed
    return best


def load_model(
    cls: type[Model],
    folder: str | Path,
    *,
    config: DetrConfig | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> Model:
    """Load a model folder written by this library or by transformers.

    The model is in evaluation mode. With ``num_labels``, ``id2label`` or ``label2id`` among the overrides and
    another number of classes than the file's, the class head starts anew; that is logged, and nothing else does.

    Args:
        cls: the model class.
        folder: holds ``config.json`` and ``model.safetensors``.
        config: instead of the folder's own.
        dtype: of the parameters; default float32 whatever the file holds.
        overrides: fields of the configuration that replace the file's.

    Raises:
        FileNotFoundError: the folder or a file is missing.
        ValueError: the weights do not fit the configuration; the first difference is named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    written_by_transformers = False
    if config is None:
        values = read_config(folder)
        written_by_transformers = "transformers_version" in values and "compat" not in values
        config = DetrConfig.from_dict(values, **overrides)
        written_by_transformers = written_by_transformers and "compat" not in overrides
    elif overrides:
        raise ValueError(f"give either config or {sorted(overrides)}, not both")
    model = cls(config)
    if written_by_transformers and (config.auxiliary_loss or has_fused_activations(model)):
        logger.warning(
            "%s was written by transformers, whose %s differs from the original DETR: following it "
            "(compat='transformers'; pass compat='original' to change that)",
            folder,
            "decoder with auxiliary_loss"
            if config.auxiliary_loss
            else "frozen batch norm without its activation",
        )
        config.compat = "transformers"
        model = cls(config)
    model = model.to(dtype or torch.float32)
    load_weights(
        model, read_weights(folder), str(folder), bool({"num_labels", "id2label", "label2id"} & {*overrides})
    )
    return model.eval()


def load_weights(
    model: DetrPreTrainedModel, tensors: Mapping[str, Tensor], source: str, new_classes: bool = False
) -> None:
    """Copy the tensors of a file into a model.

    Args:
        model: changed in place.
        tensors: the file's content, in any of the known layouts.
        source: the file's name, for messages.
        new_classes: a class head of another size is replaced by a new one instead of being an error.

    Raises:
        ValueError: a tensor is missing, has another shape or has no place.
    """
    own = model.state_dict()
    found = adapt_names(tensors, set(own))
    head = _CLASS_HEAD + "weight"
    fresh = []
    for name in list(found):
        if name in own and found[name].shape != own[name].shape:
            if new_classes and _CLASS_HEAD in name:
                fresh.append(name)
                del found[name]
                continue
            hint = " (num_labels=... makes a new class head)" if name.endswith(head) else ""
            raise ValueError(
                f"{source}: {name} has shape {tuple(found[name].shape)}, the model {tuple(own[name].shape)}{hint}"
            )
    missing = [name for name in own if name not in found]
    if not any(_CLASS_HEAD in name or _HEADS[1] in name for name in found):  # a bare DetrModel's file
        fresh += [name for name in missing if name.startswith(_HEADS) and name not in fresh]
    missing = [name for name in missing if name not in fresh]
    if missing:
        raise ValueError(
            f"{source} has no {missing[0]} ({len(missing)} of the model's {len(own)} tensors missing)"
        )
    heads_only = [name for name in found if name not in own]
    unknown = [name for name in heads_only if not name.startswith(_HEADS) and "backbone." not in name]
    if unknown:
        raise ValueError(f"{source}: {unknown[0]} has no place in the model ({len(unknown)} such tensors)")
    if fresh:
        logger.warning("%s: newly initialised, to be trained: %s", source, ", ".join(sorted(fresh)))
    model.load_state_dict({name: found[name] for name in own if name in found}, strict=False)


def save_model(model: DetrPreTrainedModel, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``folder``, which is made where missing.

    Both are in the layout of transformers, which can load them.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.backbone_config["model_type"] == "resnet":
        tensors = {_to_resnet_name(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, str(path / WEIGHTS_NAME), metadata={"format": "pt"})
    model.config.save_pretrained(path)
