"""Validation and normalization of ``DetrConfig.backbone_config``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from detr.model_files import CONFIG_NAME, ModelFiles, read_json

DEFAULT_BACKBONE = "resnet50"

_TIMM_FIELDS = (
    "backbone",
    "num_channels",
    "out_indices",
    "output_stride",
    "features_only",
    "freeze_batch_norm_2d",
    "use_pretrained_backbone",
)
_RESNET_DEFAULTS: dict[str, Any] = {
    "num_channels": 3,
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
_OUTPUT_FIELDS = ("out_features", "out_indices")
# Not settings of the backbone: a field that transformers derives from the others, and fields of all its configurations.
_DERIVED = frozenset({"stage_names"})
_COMMON_FIELDS = frozenset(
    {
        *("_name_or_path", "architectures", "attn_implementation", "chunk_size_feed_forward", "dtype"),
        *("id2label", "is_encoder_decoder", "label2id", "model_type", "output_attentions"),
        *("output_hidden_states", "problem_type", "return_dict", "torch_dtype", "transformers_version"),
    }
)


def keep_known_entries(given: Any) -> Any:
    """Drop the entries of a file's backbone that this version does not know; other values are returned unchanged."""
    if not isinstance(given, Mapping) or given.get("model_type") not in ("timm_backbone", "resnet"):
        return given
    known = {"model_type", *_OUTPUT_FIELDS}
    known |= set(_TIMM_FIELDS) if given["model_type"] == "timm_backbone" else _RESNET_DEFAULTS.keys()
    return {key: value for key, value in given.items() if key in known and value is not None}


def replace_entries(backbone: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Replace entries of a backbone; either of ``out_features`` and ``out_indices`` replaces both."""
    replaced = _OUTPUT_FIELDS if not entries.keys().isdisjoint(_OUTPUT_FIELDS) else ()
    return {**{key: value for key, value in backbone.items() if key not in replaced}, **entries}


def normalize_backbone_config(
    given: Any, legacy: Mapping[str, Any], *, num_channels: int, dilation: bool
) -> dict[str, Any]:
    """Normalize ``backbone_config``, given as a dict, as an object or by the legacy keywords.

    Only the fields that define the backbone remain. transformers also writes ``stage_names``, and for timm
    ``out_features``; it derives them from the other fields and rejects them if they are out of date.

    Args:
        given: a dict, an object with ``to_dict``, or None.
        legacy: ``backbone``, ``use_timm_backbone`` and ``backbone_kwargs``.
        num_channels: used if the backbone does not specify it.
        dilation: whether the last stage is dilated instead of downsampling.

    Raises:
        TypeError: ``given`` is neither a dict nor an object with ``to_dict``.
        ValueError: the entries do not describe a backbone, an entry would have no effect, or they contradict ``legacy``
            or ``dilation``.
        FileNotFoundError: ``legacy`` names a folder or hub model that can't be read.
    """
    if given is not None and not isinstance(given, Mapping):
        if not hasattr(given, "to_dict"):
            raise TypeError(f"backbone_config must be a dict or have to_dict(), got {type(given).__name__}")
        given = keep_known_entries(given.to_dict())
    if given:
        _check_agreement(given, legacy)
    else:
        given = _from_keywords(legacy, dilation)
    model_type = given.get("model_type")
    if dilation and given.get("output_stride") not in (8, 16):
        raise ValueError(
            "dilation=True needs a timm backbone whose backbone_config has output_stride 16 (or 8), got "
            f"model_type {model_type!r} with output_stride {given.get('output_stride')}"
        )
    given = {"num_channels": num_channels, **{k: v for k, v in given.items() if v is not None}}
    if model_type == "resnet":
        return _normalize_resnet(given)
    if model_type == "timm_backbone":
        return _normalize_timm(given)
    raise ValueError(f"backbone_config: model_type must be 'timm_backbone' or 'resnet', got {model_type!r}")


def _check_agreement(given: Mapping[str, Any], legacy: Mapping[str, Any]) -> None:
    """Reject legacy keywords together with a ``backbone_config``, where they would have no effect."""
    for key in ("backbone", "backbone_kwargs"):
        if legacy.get(key):
            raise ValueError(f"give either backbone_config or {key}={legacy[key]!r}, not both")
    uses_timm = legacy.get("use_timm_backbone")
    if uses_timm is not None and uses_timm != (given.get("model_type") == "timm_backbone"):
        raise ValueError(
            f"use_timm_backbone={uses_timm} contradicts backbone_config, which has model_type "
            f"{given.get('model_type')!r}"
        )


def _from_keywords(legacy: Mapping[str, Any], dilation: bool) -> dict[str, Any]:
    """Return the backbone described by ``backbone``, ``use_timm_backbone`` and ``backbone_kwargs``."""
    name, uses_timm = legacy.get("backbone"), legacy.get("use_timm_backbone")
    kwargs = dict(legacy.get("backbone_kwargs") or {})
    if name is not None and not isinstance(name, str):
        raise TypeError(
            f"backbone must be a timm name, a folder or a hub id, got {name!r}; give an object as backbone_config"
        )
    if uses_timm not in (None, True, False):
        raise TypeError(f"use_timm_backbone must be a bool, got {uses_timm!r}")
    if name is not None and is_transformers_name(name):
        if uses_timm:
            raise ValueError(
                f"use_timm_backbone=True, but backbone={name!r} is not a timm name; give use_timm_backbone=False"
            )
        return replace_entries(_read_backbone_config(name), kwargs)
    if uses_timm is False:
        # transformers 4 writes the default backbone name together with use_timm_backbone=False
        if name not in (None, DEFAULT_BACKBONE):
            raise ValueError(
                f"use_timm_backbone=False, but backbone={name!r} is a timm name; give a hub id such as "
                "'microsoft/resnet-50', a backbone_config with model_type 'resnet', or use_timm_backbone=True"
            )
        outputs = {} if kwargs.keys() & set(_OUTPUT_FIELDS) else {"out_features": ["stage4"]}
        return {"model_type": "resnet", **outputs, **kwargs}
    if "in_chans" in kwargs:  # timm's name of num_channels, which transformers 4 writes
        kwargs.setdefault("num_channels", kwargs.pop("in_chans"))
    if dilation:
        kwargs.setdefault("output_stride", 16)
    return {"model_type": "timm_backbone", "backbone": name or DEFAULT_BACKBONE, **kwargs}


def is_transformers_name(name: str) -> bool:
    """Return whether a backbone name is a folder or hub id of transformers, not a timm name."""
    return "/" in name and not name.startswith(("timm/", "hf-hub:", "hf_hub:", "local-dir:"))


def _read_backbone_config(name: str) -> dict[str, Any]:
    """Read the configuration of a backbone saved by transformers."""
    file = ModelFiles(name).require(CONFIG_NAME, hint="backbone must name a model saved by transformers")
    values = read_json(file)
    if values.get("model_type") != "resnet":
        raise ValueError(
            f"backbone={name!r}: {file} is the configuration of a {values.get('model_type')!r} model; give a ResNet, "
            "or the name of a timm model"
        )
    outputs = {"out_features": ["stage4"]} if values.keys().isdisjoint(_OUTPUT_FIELDS) else {}
    return keep_known_entries(values) | outputs


def _refuse_unknown(given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(given.keys() - known - _DERIVED - _COMMON_FIELDS)
    if unknown:
        raise ValueError(
            f"a backbone of model_type {given['model_type']!r} has no {', '.join(unknown)}; its entries are "
            f"{', '.join(sorted(known))}"
        )


def _normalize_timm(given: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_unknown(given, {*_TIMM_FIELDS, "out_features"})
    if not isinstance(given.get("backbone"), str):
        raise ValueError(
            f"backbone_config: backbone must be the name of a timm model, got {given.get('backbone')!r}"
        )
    if not given.get("features_only", True):
        raise ValueError("backbone_config: features_only must be True: DETR needs feature maps")
    if given.get("out_features") and not given.get("out_indices"):
        raise ValueError(
            f"backbone_config: select the feature maps of a timm model by out_indices, not by out_features="
            f"{given['out_features']!r}"
        )
    indices = given.get("out_indices", [1, 2, 3, 4])
    if not isinstance(indices, Sequence) or not indices or not all(type(i) is int for i in indices):
        raise ValueError(f"backbone_config: out_indices must be a list of int, got {indices!r}")
    out: dict[str, Any] = {
        "model_type": "timm_backbone",
        "num_channels": 3,
        "out_indices": None,
        "output_stride": None,
        "features_only": True,
    }
    out |= {key: copy.deepcopy(given[key]) for key in _TIMM_FIELDS if key in given}
    return out | {
        "backbone": given["backbone"].removeprefix("timm/"),
        "out_indices": list(indices),
        "use_pretrained_backbone": False,
    }


def _normalize_resnet(given: Mapping[str, Any]) -> dict[str, Any]:
    known = {*_RESNET_DEFAULTS, *_OUTPUT_FIELDS}
    _refuse_unknown(given, known)
    out = {
        key: copy.deepcopy(given[key])
        for key in ("model_type", *_RESNET_DEFAULTS, *_OUTPUT_FIELDS)
        if key in given
    }
    for key, value in out.items():
        if isinstance(value, tuple):
            out[key] = list(value)
    complete_resnet_config(out)  # for its checks
    return out


def complete_resnet_config(backbone_config: Mapping[str, Any]) -> dict[str, Any]:
    """Check the fields of a ``transformers.ResNetConfig`` and fill in the defaults.

    ``out_indices`` of the result selects the feature maps: 0 is the stem, i is stage i.

    Raises:
        ValueError: the fields do not describe a ResNet.
    """
    values = {**_RESNET_DEFAULTS, **{k: backbone_config[k] for k in _RESNET_DEFAULTS if k in backbone_config}}
    depths, sizes = values["depths"], values["hidden_sizes"]
    for name in ("depths", "hidden_sizes"):
        numbers = values[name]
        if (
            not isinstance(numbers, Sequence)
            or not numbers
            or not all(type(n) is int and n > 0 for n in numbers)
        ):
            raise ValueError(f"backbone_config: {name} must be a list of positive int, got {numbers!r}")
    if len(depths) != len(sizes):
        raise ValueError(f"backbone_config: depths {depths} and hidden_sizes {sizes} differ in length")
    if values["layer_type"] not in ("basic", "bottleneck"):
        raise ValueError(
            f"backbone_config: layer_type must be 'basic' or 'bottleneck', got {values['layer_type']!r}"
        )
    if values["layer_type"] == "bottleneck" and any(size % 4 for size in sizes):
        raise ValueError(f"backbone_config: hidden_sizes of bottlenecks must be multiples of 4, got {sizes}")
    for name in ("num_channels", "embedding_size"):
        if type(values[name]) is not int or values[name] < 1:
            raise ValueError(f"backbone_config: {name} must be a positive int, got {values[name]!r}")
    for name in ("downsample_in_first_stage", "downsample_in_bottleneck"):
        if not isinstance(values[name], bool):
            raise ValueError(f"backbone_config: {name} must be a bool, got {values[name]!r}")
    return values | {"out_indices": _resnet_out_indices(backbone_config, len(depths))}


def _resnet_out_indices(backbone_config: Mapping[str, Any], stages: int) -> list[int]:
    names = ["stem", *(f"stage{i}" for i in range(1, stages + 1))]
    features, indices = backbone_config.get("out_features"), backbone_config.get("out_indices")
    if features is None and indices is None:
        return [stages]
    if features is not None:
        if not isinstance(features, Sequence) or not features or not set(features) <= set(names):
            raise ValueError(f"backbone_config: out_features must be some of {names}, got {features!r}")
        selected = [names.index(name) for name in features]
        if indices is not None and [i % len(names) for i in indices] != selected:
            raise ValueError(f"backbone_config: out_indices {indices} contradict out_features {features}")
    else:
        if not isinstance(indices, Sequence) or not all(
            type(i) is int and -len(names) <= i < len(names) for i in indices
        ):
            raise ValueError(f"backbone_config: out_indices must be some of 0..{stages}, got {indices!r}")
        selected = [i % len(names) for i in indices]
    if not selected or selected != sorted(set(selected)):
        raise ValueError(
            f"backbone_config: feature maps must be in the order of {names}, got {features or indices}"
        )
    return selected
