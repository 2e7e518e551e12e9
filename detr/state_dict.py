"""Reading state dicts from files without running code from them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

WEIGHTS_NAME = "model.safetensors"
_PICKLED_WEIGHTS_NAME = "pytorch_model.bin"


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, or of a ``.pth``/``.bin`` file.

    A file with ``{"model": ...}`` or ``{"state_dict": ...}``, such as the original DETR's, gives what is inside.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of a .safetensors or .pth state dict")
    if path.suffix == ".safetensors":
        tensors: dict[str, Tensor] = load_file(str(path))
        return tensors
    with torch.serialization.safe_globals([argparse.Namespace]):  # in the original's training checkpoints
        content = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no state dict (names to tensors) but a {type(content).__name__}")
    return dict(content)


def read_model_weights(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a model folder: ``model.safetensors``, its sharded form or ``pytorch_model.bin``.

    Raises:
        FileNotFoundError: the folder has none of them, or a shard is missing.
        ValueError: the list of shards cannot be read.
    """
    folder = Path(folder)
    for name in (WEIGHTS_NAME, _PICKLED_WEIGHTS_NAME):
        if (folder / name).is_file():
            return read_state_dict(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (KeyError, AttributeError, TypeError, json.JSONDecodeError) as error:
                raise ValueError(f"{index} has no weight_map from tensor names to files") from error
            return {
                key: tensor for shard in shards for key, tensor in read_state_dict(folder / shard).items()
            }
    raise FileNotFoundError(f"{folder} holds neither {WEIGHTS_NAME} nor {_PICKLED_WEIGHTS_NAME}")
