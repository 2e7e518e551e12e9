"""Read state dicts from files without running code from them."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detr.model_files import WEIGHTS_NAMES, ModelFiles, foreign_content

_NESTED = ("model", "state_dict", "model_state_dict")
_WRAPPERS = re.compile(r"((module|_orig_mod)\.)+")
"""Prefixes that DistributedDataParallel and torch.compile add to names."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors``, ``.pth`` or ``.bin`` file.

    A state dict nested under ``"model"``, ``"state_dict"`` or ``"model_state_dict"`` is unpacked; checkpoints of
    facebookresearch/detr have the first. The prefixes ``module.`` and ``_orig_mod.`` of wrapped models are removed.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or incomplete, has another format, or contains no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of a .safetensors or .pth state dict")
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickled(path)
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no state dict (names to tensors), but a {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path} holds no state dict (names to tensors): {name!r} is a {type(value).__name__}; give a file "
                f"of model.state_dict(), alone or under one of {', '.join(_NESTED)}"
            )
    if content and all(_WRAPPERS.match(name) for name in content):
        return {_WRAPPERS.sub("", name, count=1): tensor for name, tensor in content.items()}
    return dict(content)


def read_model_weights(files: ModelFiles | str | Path) -> dict[str, Tensor]:
    """Read all tensors of a model, from ``model.safetensors``, ``pytorch_model.bin`` or their shards.

    Raises:
        FileNotFoundError: the model has none of these files, or a shard is missing.
        ValueError: a file is damaged, or the index of shards can't be read or refers to files outside the folder.
    """
    files = files if isinstance(files, ModelFiles) else ModelFiles(files)
    tensors: dict[str, Tensor] = {}
    for path in list_weights(files):
        tensors |= read_state_dict(path)
    return tensors


def list_weights(files: ModelFiles) -> list[Path]:
    """Return the local paths of the weights files of a model, downloaded if it is on the hub.

    Raises:
        FileNotFoundError, ValueError: as `read_model_weights`.
    """
    path = files.require(*WEIGHTS_NAMES)
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        reason = foreign_content(path)
        raise ValueError(
            f"{path} has no weight_map from tensor names to files{reason and ': '}{reason}"
        ) from error
    for shard in shards:
        if shard in ("", "..") or PurePosixPath(shard).name != shard or "\\" in shard:
            raise ValueError(f"{path} lists {shard!r}, which is not the name of a file next to it")
    return [files.require(shard, hint=f"{path.name} lists it") for shard in shards]


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(str(path))
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise _unreadable(path, error) from error
    return tensors


def _load_pickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_plain_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise _unreadable(path, error) from error
        raise ValueError(
            f"{path} holds a pickled {refused[1]}, which is not loaded, because that could run code from the file; "
            "save model.state_dict() without other objects"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    size = path.stat().st_size
    reason = foreign_content(path) or (
        f"the file of {size} bytes is incomplete or damaged; copy or download it again"
    )
    detail = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return ValueError(f"{path} can't be read as weights: {reason} ({detail})")


def _plain_types() -> list[Any]:
    """Return types that training scripts save together with tensors and that run no code: arguments, NumPy values."""
    from numpy._core import multiarray  # the module to which pickles of NumPy refer

    dtypes = [type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "?efdg"]
    functions = [
        (getattr(multiarray, name), f"numpy.{core}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for core in ("core", "_core")
    ]
    return [argparse.Namespace, np.ndarray, np.dtype, *dtypes, *functions]
