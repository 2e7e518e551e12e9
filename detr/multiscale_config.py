"""Settings of the multi-scale architecture that are not fields of ``transformers.DetrConfig``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiScaleConfig:
    """Settings of the multi-scale architecture, in addition to those of `DetrConfig`.

    The fields of `DetrConfig` keep their meaning: ``backbone_config.out_indices`` selects the strides, ``d_model`` is
    the number of channels of every feature map, ``encoder_layers`` run on the coarsest feature map, ``num_queries`` and
    ``decoder_layers`` describe the decoder, and the cost and loss coefficients weight its set loss.

    Attributes:
        head_convolutions: number of separable convolutions in each of the two towers of the dense head.
        candidates_per_query: number of tokens that enter non-maximum suppression, for each of the ``num_queries``.
        nms_threshold: a token is a duplicate of a better token of its class if their IoU is above this threshold.
        assigned_tokens: maximum number of tokens assigned to an object (the k of TOOD).
        score_exponent, iou_exponent: exponents of the score and of the IoU in the alignment metric of TOOD.
        dense_loss_coefficient: weight of the losses of the tokens relative to those of a decoder layer.

    Raises:
        TypeError: a value is not a number of the field's type.
        ValueError: a value is out of range.
    """

    head_convolutions: int = 2
    candidates_per_query: int = 3
    nms_threshold: float = 0.5
    assigned_tokens: int = 9
    score_exponent: float = 0.5
    iou_exponent: float = 3.0
    dense_loss_coefficient: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, whole = getattr(self, field.name), field.type == "int"
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise TypeError(
                    f"multi_scale.{field.name} must be {field.type}, got {value!r} of type {type(value).__name__}"
                )
            minimum = 1 if field.name in ("candidates_per_query", "assigned_tokens") else 0
            if not minimum <= value < float("inf"):
                raise ValueError(
                    f"multi_scale.{field.name} must be at least {minimum} and finite, got {value}"
                )
        if not 0 < self.nms_threshold <= 1:
            raise ValueError(
                f"multi_scale.nms_threshold must be above 0 and at most 1, got {self.nms_threshold}"
            )

    @classmethod
    def from_value(cls, value: MultiScaleConfig | Mapping[str, Any] | None) -> MultiScaleConfig | None:
        """Create the settings from a mapping; settings and None are returned unchanged.

        Raises:
            TypeError: the value has another type, or a key is not a setting.
        """
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(
                f"multi_scale must be a MultiScaleConfig, a dict of its settings ({{}} for the defaults) or None, "
                f"got {value!r}"
            )
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(value.keys() - set(names))
        if unknown:
            raise TypeError(f"multi_scale has no setting {unknown[0]!r}; its settings are {', '.join(names)}")
        return cls(**value)
