"""The normal form of ``DetrConfig.backbone_config``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

_BACKBONE_FIELDS = (
    "backbone",
    "num_channels",
    "out_indices",
    "output_stride",
    "features_only",
    "freeze_batch_norm_2d",
    "use_pretrained_backbone",
)


def normal_backbone_config(
    given: Any, legacy: Mapping[str, Any], *, num_channels: int, dilation: bool
) -> dict[str, Any]:
    """``backbone_config`` in its one normal form, from a dict, an object or the legacy keywords.

    Of a timm backbone only the fields that build it are kept: transformers also writes ``stage_names`` and
    ``out_features``, which it derives from them and refuses when they are out of date.

    Args:
        given: a dict or an object with ``to_dict``, None for none.
        legacy: ``backbone``, ``use_timm_backbone`` and ``backbone_kwargs``, read where nothing is given.
        num_channels: where the backbone does not say it.
        dilation: whether the last stage keeps its resolution.

    Raises:
        TypeError: ``given`` is neither a dict nor an object with ``to_dict``.
        ValueError: it describes no backbone, or one that contradicts ``dilation``.
    """
    if given is not None and not isinstance(given, Mapping):
        if not hasattr(given, "to_dict"):
            raise TypeError(f"backbone_config must be a dict or have to_dict(), got {type(given).__name__}")
        given = given.to_dict()
    kwargs = dict(legacy.get("backbone_kwargs") or {})
    if given is None or not given:
        if legacy.get("use_timm_backbone", True) is False:
            given = {"model_type": "resnet", "out_features": ["stage4"], **kwargs}
        else:
            given = {
                "model_type": "timm_backbone",
                "backbone": legacy.get("backbone") or "resnet50",
                **kwargs,
            }
            if dilation:
                given.setdefault("output_stride", 16)
    model_type = given.get("model_type")
    if dilation and given.get("output_stride") not in (8, 16):
        raise ValueError(
            "dilation=True needs a timm backbone whose backbone_config has output_stride 16 (or 8), got "
            f"model_type {model_type!r} with output_stride {given.get('output_stride')}"
        )
    if model_type == "resnet":
        return {"num_channels": num_channels, **copy.deepcopy(dict(given))}
    if model_type != "timm_backbone":
        raise ValueError(
            f"backbone_config: model_type must be 'timm_backbone' or 'resnet', got {model_type!r}"
        )
    if not isinstance(given.get("backbone"), str):
        raise ValueError(
            f"backbone_config: backbone must be the name of a timm model, got {given.get('backbone')!r}"
        )
    out: dict[str, Any] = {
        "model_type": "timm_backbone",
        "num_channels": num_channels,
        "out_indices": None,
        "output_stride": None,
        "features_only": True,
        "use_pretrained_backbone": False,
    }
    out.update({key: copy.deepcopy(given[key]) for key in _BACKBONE_FIELDS if given.get(key) is not None})
    if out["out_indices"] is None:
        out["out_indices"] = [1, 2, 3, 4]
    indices = out["out_indices"]
    if not isinstance(indices, Sequence) or not indices or not all(isinstance(i, int) for i in indices):
        raise ValueError(f"backbone_config: out_indices must be a list of int, got {indices!r}")
    out["out_indices"] = list(indices)
    return out
