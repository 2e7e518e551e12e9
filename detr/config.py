"""``DetrConfig``, the configuration of a DETR model, stored as transformers' ``config.json``.

Field names, defaults and file format are those of ``transformers.DetrConfig``, so each library reads folders that the
other has written. Fields of this library only: ``compat``, ``trainable_backbone_stages``, ``multi_scale`` and
``use_pretrained_backbone``. The last is never written: a saved model contains its backbone weights.
"""

from __future__ import annotations

import copy
import difflib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from detr.backbone_config import (
    is_transformers_name,
    keep_known_entries,
    normalize_backbone_config,
    replace_entries,
)
from detr.model_files import CONFIG_NAME, FILE_ARGUMENTS, ModelFiles, read_json
from detr.multiscale_config import MultiScaleConfig

EngineName = Literal["torch", "openvino"]
"""The library that computes an optimized model."""

MULTI_SCALE_TYPE = "detr_multi_scale"
"""``model_type`` in the ``config.json`` of a multi-scale model: transformers rejects it instead of misreading it."""

# Metadata of the library that wrote the file, not settings of the model: dropped.
_FILE_KEYS = frozenset({"_name_or_path", "_attn_implementation", "transformers_version"})
_ATTENTION = ("sdpa", "eager")
_DTYPES = {"half": "float16", "float": "float32", "double": "float64"}
_LOADING_ARGUMENTS = FILE_ARGUMENTS | {"config", "device_map", "ignore_mismatched_sizes"}
# Valid names that resemble a field. Every configuration of transformers 4 has tie_encoder_decoder.
_NOT_MISSPELLED = frozenset({"tie_encoder_decoder"})
_ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "encoder_attention_heads",
    "num_hidden_layers": "encoder_layers",
}
_LEGACY_BACKBONE_KEYS = ("backbone", "use_timm_backbone", "backbone_kwargs")


# The config.json of a model with auxiliary losses has this key set to true and auxiliary_loss set to false. With
# auxiliary_loss true, transformers would feed the normalized output of each decoder layer to the next layer and predict
# differently.
_AUXILIARY_LOSS = "auxiliary_loss_in_training"

_COSTS_AND_COEFFICIENTS = (
    *("class_cost", "bbox_cost", "giou_cost", "bbox_loss_coefficient", "giou_loss_coefficient"),
    *("mask_loss_coefficient", "dice_loss_coefficient"),
)


def default_labels(num_labels: int) -> dict[int, str]:
    """Return ``{0: "LABEL_0", ...}``, the names that transformers gives to unnamed labels."""
    return {i: f"LABEL_{i}" for i in range(num_labels)}


@dataclass(init=False)
class DetrConfig:
    """Configuration of a DETR model; ``DetrConfig()`` is DETR with a ResNet-50 backbone and 2 labels.

    Attributes:
        backbone_config: the CNN, a dict. ``{"model_type": "timm_backbone", "backbone": name, "num_channels",
            "out_indices", "output_stride"}`` builds any timm CNN. ``{"model_type": "resnet", "depths", ...}`` builds
            the ResNet of transformers. An object with ``to_dict`` is accepted. None means timm's ``resnet50`` with
            the feature maps of strides 4 to 32.
        num_channels: channels of the input image, used if ``backbone_config`` does not specify them.
        num_queries: number of object queries, the maximum number of objects detected in an image.
        encoder_layers, encoder_ffn_dim, encoder_attention_heads, encoder_layerdrop: the encoder.
        decoder_layers, decoder_ffn_dim, decoder_attention_heads, decoder_layerdrop: the decoder.
        activation_function: activation of the feed-forward layers: a name (``"relu"``, ``"gelu"``, ...) or a callable.
        d_model: width of the transformer, a multiple of both numbers of heads.
        dropout, attention_dropout, activation_dropout: probabilities in 0..1.
        init_std, init_xavier_std: scale of new weights; used only with ``compat="transformers"``.
        auxiliary_loss: also compute the loss of every decoder layer but the last.
        position_embedding_type: ``"sine"`` or ``"learned"``.
        dilation: DC5: dilate the last stage of the backbone instead of downsampling (``output_stride`` 16).
        class_cost, bbox_cost, giou_cost: weights of the matching cost.
        bbox_loss_coefficient, giou_loss_coefficient, mask_loss_coefficient, dice_loss_coefficient: weights of
            the loss terms; cross-entropy has weight 1.
        eos_coefficient: class weight of "no object" in the cross-entropy.
        id2label, label2id: class names; ``num_labels`` is their number.
        trainable_backbone_stages: number of trainable backbone stages, counted from the deepest of the four. 3, as in
            the paper, freezes the stem and the first stage; 0 freezes everything; 5 trains everything, stem included.
        use_pretrained_backbone: True loads timm's pretrained weights (from its cache or the network), a path loads
            them from that file, False initializes the backbone randomly.
        compat: which implementation to follow where facebookresearch/detr and transformers differ: the decoder's norm
            with ``auxiliary_loss``, activations fused into frozen batch norm, initialization, input dropout.
        multi_scale: settings of the multi-scale architecture (`detr.model.multiscale`), a `MultiScaleConfig` or a
            dict; None selects standard DETR. Only this library can load a multi-scale model.

    Args:
        backbone: replaces ``backbone_config``: a timm name, or a folder or hub id of a transformers ResNet such as
            ``"microsoft/resnet-50"``. With the latter, ``use_pretrained_backbone=True`` also loads its weights.
        backbone_kwargs: further entries of ``backbone_config``, together with ``backbone``.
        use_timm_backbone: False without a ``backbone`` selects the ResNet-50 of transformers.
        attn_implementation: ``"sdpa"``, the default, is torch's fused attention. ``"eager"`` always computes the
            attention weights; ``output_attentions`` computes them with either.
        num_labels, num_layers, hidden_size, num_attention_heads, num_hidden_layers, torch_dtype: aliases.
        kwargs: unknown keywords become attributes and are saved, as in transformers.

    Raises:
        TypeError: a value has the wrong type, or a keyword is misspelled or an argument of ``from_pretrained``.
        ValueError: a value is out of range, or two keywords contradict each other.
    """

    is_encoder_decoder: bool = True
    backbone_config: dict[str, Any] = field(default_factory=dict)
    num_channels: int = 3
    num_queries: int = 100
    encoder_layers: int = 6
    encoder_ffn_dim: int = 2048
    encoder_attention_heads: int = 8
    decoder_layers: int = 6
    decoder_ffn_dim: int = 2048
    decoder_attention_heads: int = 8
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0
    activation_function: str | Callable[..., Any] = "relu"
    d_model: int = 256
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02
    init_xavier_std: float = 1.0
    auxiliary_loss: bool = False
    position_embedding_type: str = "sine"
    dilation: bool = False
    class_cost: float = 1
    bbox_cost: float = 5
    giou_cost: float = 2
    mask_loss_coefficient: float = 1
    dice_loss_coefficient: float = 1
    bbox_loss_coefficient: float = 5
    giou_loss_coefficient: float = 2
    eos_coefficient: float = 0.1
    return_dict: bool = True
    output_attentions: bool = False
    output_hidden_states: bool = False
    dtype: str | None = None
    architectures: list[str] | None = None
    id2label: dict[int, str] = field(default_factory=lambda: default_labels(2))
    label2id: dict[str, int] = field(default_factory=dict)
    trainable_backbone_stages: int = 3
    use_pretrained_backbone: bool | str = False
    compat: Literal["original", "transformers"] = "original"
    multi_scale: MultiScaleConfig | None = None

    model_type = "detr"
    attn_implementation: ClassVar[str] = "sdpa"

    def __init__(self, **kwargs: Any) -> None:
        given = {name: value for name, value in kwargs.items() if name not in _FILE_KEYS}
        if given.pop(_AUXILIARY_LOSS, False):
            given["auxiliary_loss"] = True
        self._check_names(given)
        if given.pop("model_type", "detr") not in ("detr", MULTI_SCALE_TYPE):
            raise ValueError(f"model_type must be 'detr', got {kwargs['model_type']!r}")
        _apply_aliases(given)
        attention = given.pop("attn_implementation", None)
        if attention not in (None, *_ATTENTION):
            raise ValueError(f"attn_implementation must be one of {_ATTENTION}, got {attention!r}")
        labels = _resolve_labels(
            given.pop("num_labels", None), given.pop("id2label", None), given.pop("label2id", None)
        )
        legacy = {key: given.pop(key) for key in _LEGACY_BACKBONE_KEYS if key in given}
        backbone_config = given.pop("backbone_config", None)
        if given.get("use_pretrained_backbone", False) is None:  # some old files hold null
            del given["use_pretrained_backbone"]
        if isinstance(backbone_config, Mapping):
            if backbone_config.get("use_pretrained_backbone"):
                given.setdefault("use_pretrained_backbone", True)
            _check_channels(given, backbone_config)
        if given.get("use_pretrained_backbone") is True and is_transformers_name(
            str(legacy.get("backbone", ""))
        ):
            given["use_pretrained_backbone"] = legacy["backbone"]

        for f in fields(self):
            if f.name in ("backbone_config", "id2label", "label2id"):
                continue
            default = f.default if f.default is not MISSING else None
            object.__setattr__(self, f.name, _check_type(f.name, str(f.type), given.pop(f.name, default)))
        self.id2label, self.label2id = labels
        if attention is not None:
            object.__setattr__(self, "attn_implementation", attention)
        object.__setattr__(self, "backbone_config", self._normalize_backbone_config(backbone_config, legacy))
        for key, value in given.items():  # as in transformers, unknown keywords become attributes
            object.__setattr__(self, key, value)
        self._check_ranges()
        if self.compat == "original" and not {"init_std", "init_xavier_std"}.isdisjoint(kwargs):
            changed = [k for k, v in (("init_std", 0.02), ("init_xavier_std", 1.0)) if kwargs.get(k, v) != v]
            if changed:
                warnings.warn(
                    f"{', '.join(changed)} has an effect only with compat='transformers'", stacklevel=2
                )

    @classmethod
    def _check_names(cls, given: Mapping[str, Any]) -> None:
        """Reject misspelled keywords and arguments of ``from_pretrained``, which would have no effect."""
        known = cls.keywords() | {"model_type"}
        for name in sorted(given.keys() - known):
            if name in _LOADING_ARGUMENTS:
                raise TypeError(f"{name} is an argument of from_pretrained, not of DetrConfig")
            if name in _NOT_MISSPELLED:
                continue
            similar = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if similar:
                raise TypeError(f"DetrConfig has no {name}; did you mean {similar[0]}?")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; ``backbone``, ``num_channels`` and ``dilation`` also change ``backbone_config``."""
        if name == "backbone":
            name, value = "backbone_config", self._normalize_backbone_config(None, {"backbone": value})
        elif name == "backbone_config":
            value = self._normalize_backbone_config(value, {})
        elif name == "multi_scale":
            value = MultiScaleConfig.from_value(value)
        elif name in ("num_channels", "dilation"):
            object.__setattr__(self, name, value)
            changed = _override_backbone(self.backbone_config, {name: value})
            name, value = "backbone_config", self._normalize_backbone_config(changed, {})
        object.__setattr__(self, _ALIASES.get(name, name), value)

    @property
    def hidden_size(self) -> int:
        """Alias of ``d_model``."""
        return self.d_model

    @property
    def num_attention_heads(self) -> int:
        """Alias of ``encoder_attention_heads``."""
        return self.encoder_attention_heads

    @property
    def num_hidden_layers(self) -> int:
        """Alias of ``encoder_layers``."""
        return self.encoder_layers

    @property
    def num_labels(self) -> int:
        """Number of classes without "no object"; assigning a different number resets the class names."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, num_labels: int) -> None:
        if num_labels != len(self.id2label):
            self.id2label, self.label2id = _resolve_labels(num_labels, None, None)

    def _normalize_backbone_config(self, given: Any, legacy: Mapping[str, Any]) -> dict[str, Any]:
        return normalize_backbone_config(
            given, legacy, num_channels=self.num_channels, dilation=self.dilation
        )

    def _check_ranges(self) -> None:
        for name in (
            "num_channels",
            "num_queries",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "d_model",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("encoder_layers", "decoder_layers", "trainable_backbone_stages"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in (
            "dropout",
            "attention_dropout",
            "activation_dropout",
            "encoder_layerdrop",
            "decoder_layerdrop",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, name):
                raise ValueError(f"d_model {self.d_model} is not a multiple of {name} {getattr(self, name)}")
        if self.position_embedding_type not in ("sine", "learned"):
            raise ValueError(
                f"position_embedding_type must be 'sine' or 'learned', got {self.position_embedding_type!r}"
            )
        if self.d_model % 4 and self.position_embedding_type == "sine":
            raise ValueError(
                f"d_model must be a multiple of 4 for sine position embeddings, got {self.d_model}"
            )
        if self.auxiliary_loss and not self.decoder_layers:
            raise ValueError("auxiliary_loss needs at least one decoder layer, but decoder_layers is 0")
        if not self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder must be True: DETR has an encoder and a decoder")
        if self.compat not in ("original", "transformers"):
            raise ValueError(f"compat must be 'original' or 'transformers', got {self.compat!r}")
        if not (self.class_cost or self.bbox_cost or self.giou_cost):
            raise ValueError(
                "class_cost, bbox_cost and giou_cost can't all be 0: every matching would have cost 0"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``config.json``: JSON types only, readable by transformers.

        A callable ``activation_function`` cannot be written: it is omitted with a warning.
        """
        known = {f.name for f in fields(self)}
        out = {
            name: copy.deepcopy(value)
            for name, value in vars(self).items()
            if name in known or _is_json(value)
        }
        for name in ("use_pretrained_backbone", "attn_implementation"):
            out.pop(name, None)
        out["model_type"] = self.model_type
        if self.auxiliary_loss and self.compat == "original":
            out |= {"auxiliary_loss": False, _AUXILIARY_LOSS: True}
        del out["multi_scale"]
        if self.multi_scale is not None:
            out["model_type"], out["multi_scale"] = MULTI_SCALE_TYPE, asdict(self.multi_scale)
        out["backbone_config"]["use_pretrained_backbone"] = False
        if not isinstance(self.activation_function, str):
            warnings.warn(
                "activation_function is a callable and is not written to config.json; "
                "pass it again when you load the model",
                stacklevel=2,
            )
            del out["activation_function"]
        if self.id2label == default_labels(2):
            del out["id2label"], out["label2id"]
        else:
            out["id2label"] = {str(i): name for i, name in self.id2label.items()}
        for name in _COSTS_AND_COEFFICIENTS:  # transformers requires integers here and rejects 1.0
            if float(out[name]).is_integer():
                out[name] = int(out[name])
        for name in ("return_dict", "output_attentions", "output_hidden_states", "dtype", "architectures"):
            if out[name] == getattr(DetrConfig, name):
                del out[name]
        return out

    @classmethod
    def keywords(cls) -> set[str]:
        """Return the keywords that have an effect: fields, their aliases and the legacy keywords of a backbone."""
        names = {f.name for f in fields(cls)} | _ALIASES.keys() | {*_LEGACY_BACKBONE_KEYS}
        return names | {"attn_implementation", "num_labels", "num_layers", "torch_dtype"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> DetrConfig:
        """Create a configuration from the content of ``config.json``; ``overrides`` take precedence over the file.

        Unknown entries of the file become attributes. Overrides of ``backbone_kwargs``, ``num_channels`` and
        ``dilation`` modify the file's backbone; ``backbone`` and ``backbone_config`` replace it.

        Raises:
            TypeError: an override is not a keyword of `DetrConfig`.
            ValueError: a value is invalid, or the overrides contradict the file or each other.
        """
        unknown = overrides.keys() - cls.keywords()
        if unknown:
            raise TypeError(f"DetrConfig has no {', '.join(sorted(unknown))}")
        known = cls.keywords() | {"model_type", _AUXILIARY_LOSS}
        extra = {k: v for k, v in values.items() if k not in known | _FILE_KEYS}
        # null in an old file, such as dilation without timm, means the default of the field
        merged = {k: v for k, v in values.items() if k in known and k not in _FILE_KEYS and v is not None}
        merged.pop("attn_implementation", None)
        merged["backbone_config"] = keep_known_entries(merged.get("backbone_config"))
        if "dtype" in merged:
            merged.pop("torch_dtype", None)
        if not {"dtype", "torch_dtype"}.isdisjoint(overrides):
            merged = {k: v for k, v in merged.items() if k not in ("dtype", "torch_dtype")}
        names = merged.get("id2label")
        count = merged.get("num_labels", 2) if names is None else len(names)
        if overrides.get("num_labels", count) != count or not {"id2label", "label2id"}.isdisjoint(overrides):
            for key in ("id2label", "label2id", "num_labels"):
                merged.pop(key, None)
        if merged.get("id2label") is not None:  # the label2id of some files has different classes
            merged.pop("label2id", None)
        for alias, name in _ALIASES.items():
            if alias in overrides or name in overrides:
                merged.pop(name, None)
                merged.pop(alias, None)
        if "num_layers" in overrides:
            merged = {k: v for k, v in merged.items() if k not in ("encoder_layers", "decoder_layers")}
        if "auxiliary_loss" in overrides or overrides.get("compat") == "transformers":
            merged.pop(_AUXILIARY_LOSS, None)
        merged = _merge_backbone(merged, overrides)
        merged["use_pretrained_backbone"] = overrides.get("use_pretrained_backbone", False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*has an effect only with compat='transformers'")
            config = cls(**merged)
        for key, value in extra.items():
            object.__setattr__(config, key, value)
        return config

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` to ``folder``, which is created if missing."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (path / CONFIG_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs: Any) -> DetrConfig:
        """Read the configuration of a model.

        Args:
            source: a folder with ``config.json``, that file itself, or a hub id ``ORG/NAME``. From the hub, only this
                file is downloaded.
            kwargs: arguments of `detr.model_files.ModelFiles` (``revision``, ``cache_dir``, ``token``,
                ``local_files_only``, ``force_download``, ``subfolder``), and overrides: see `from_dict`.

        Raises:
            FileNotFoundError: the folder, file or model does not exist.
            TypeError: an override is not a keyword of `DetrConfig`.
            ValueError: the file is not a JSON object, is not a DETR configuration, or has an invalid value.
        """
        files, overrides = ModelFiles.open(source, **kwargs)
        return read_config(files, overrides)[0]


def read_config(files: ModelFiles, overrides: Mapping[str, Any]) -> tuple[DetrConfig, dict[str, Any]]:
    """Read the configuration of a model with ``overrides`` applied, and the raw content of its ``config.json``.

    See `DetrConfig.from_pretrained` for the arguments and errors.
    """
    hint = (
        "a model folder contains config.json and model.safetensors. transformers' Trainer writes no config.json: give "
        "config=model.config to from_pretrained, or write it there with model.config.save_pretrained(folder)"
    )
    path = files.require(CONFIG_NAME, hint=hint)
    values = read_json(path)
    if values.get("model_type", "detr") not in ("detr", MULTI_SCALE_TYPE):
        raise ValueError(f"{path} is the configuration of a {values['model_type']!r} model, not of DETR")
    try:
        return DetrConfig.from_dict(values, **overrides), values
    except (TypeError, ValueError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{path}: {error}") from error


def _check_channels(given: Mapping[str, Any], backbone_config: Mapping[str, Any]) -> None:
    own, of_backbone = given.get("num_channels"), backbone_config.get("num_channels")
    if None not in (own, of_backbone) and own != of_backbone:
        raise ValueError(f"num_channels={own} contradicts backbone_config, which has {of_backbone}")


def _override_backbone(backbone: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Apply ``num_channels``, ``dilation`` and ``backbone_kwargs`` of ``overrides`` to a ``backbone_config``."""
    changed = replace_entries(backbone, overrides.get("backbone_kwargs") or {})
    if overrides.get("num_channels") is not None:
        changed["num_channels"] = overrides["num_channels"]
    if overrides.get("dilation") is not None and changed.get("model_type") == "timm_backbone":
        dilated = changed.get("output_stride") if changed.get("output_stride") in (8, 16) else 16
        changed["output_stride"] = dilated if overrides["dilation"] else None
    return changed


def _merge_backbone(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Merge overrides into the values of a file; the file's backbone is modified or replaced, see `from_dict`."""
    legacy = {key: values.pop(key) for key in _LEGACY_BACKBONE_KEYS if key in values}
    backbone = values.pop("backbone_config", None)
    channels = values.get("num_channels", 3)
    if overrides.get("backbone") or overrides.get("backbone_config"):
        given = overrides.get("backbone_config")
        if isinstance(given, Mapping):
            values["num_channels"] = given.get("num_channels", channels)
        return {**values, **overrides}
    backbone = backbone or normalize_backbone_config(
        None, legacy, num_channels=channels, dilation=values.get("dilation", False)
    )
    if isinstance(backbone, Mapping):
        values["num_channels"] = backbone.get("num_channels", channels)
        backbone = _override_backbone(backbone, overrides)
    own = {key: value for key, value in overrides.items() if key not in ("backbone", "backbone_kwargs")}
    return values | own | {"backbone_config": backbone}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _apply_aliases(given: dict[str, Any]) -> None:
    """Replace aliases such as ``hidden_size`` by field names; ``num_layers`` sets the stacks that are not given."""
    for alias, name in _ALIASES.items():
        if alias in given:
            value = given.pop(alias)
            if given.setdefault(name, value) != value:
                raise ValueError(f"{alias}={value} contradicts {name}={given[name]}; they are the same field")
    dtype = given.pop("torch_dtype", None)
    if dtype is not None:
        if given.get("dtype") not in (None, dtype):
            raise ValueError(
                f"torch_dtype={dtype} contradicts dtype={given['dtype']}; they are the same field"
            )
        given["dtype"] = dtype
    if "num_layers" in given:
        layers = given.pop("num_layers")
        given.setdefault("encoder_layers", layers)
        given.setdefault("decoder_layers", layers)


def _check_type(name: str, annotation: str, value: Any) -> Any:
    """Return ``value`` if it has the annotated type. An int is accepted for a float; a bool is not a number."""
    if annotation == "bool":
        valid = isinstance(value, bool)
    elif annotation == "int":
        valid = isinstance(value, int) and not isinstance(value, bool)
    elif annotation == "float":
        valid = isinstance(value, int | float) and not isinstance(value, bool)
    elif annotation == "str" or annotation.startswith("Literal"):
        valid = isinstance(value, str)
    elif name == "activation_function":
        valid = isinstance(value, str) or callable(value)
    elif name == "use_pretrained_backbone":
        value = str(value) if isinstance(value, Path) else value
        valid = isinstance(value, bool | str)
    elif name == "multi_scale":
        value, valid = MultiScaleConfig.from_value(value), True
    elif name == "dtype":
        value = None if value is None else dtype_name(value)
        valid = True
    else:
        valid = value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    if not valid:
        raise TypeError(f"{name} must be {annotation}, got {value!r} of type {type(value).__name__}")
    return value


def _resolve_labels(
    num_labels: int | None, id2label: Mapping[Any, str] | None, label2id: Mapping[str, Any] | None
) -> tuple[dict[int, str], dict[str, int]]:
    """Return ``id2label`` and ``label2id``, derived from those of the three arguments that are given."""
    if label2id is not None and not isinstance(label2id, Mapping):
        raise TypeError(f"label2id must map names to class indices, got a {type(label2id).__name__}")
    if id2label is None and label2id is not None:
        id2label = {int(i): name for name, i in label2id.items()}
    if id2label is None:
        count = 2 if num_labels is None else num_labels
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"num_labels must be a positive int, got {num_labels!r}")
        names = default_labels(count)
    else:
        if not isinstance(id2label, Mapping):
            raise TypeError(
                f"id2label must map class indices to names, got a {type(id2label).__name__}; give {{0: 'cat', 1: ...}}"
            )
        try:
            names = {int(i): str(name) for i, name in id2label.items()}
        except ValueError as error:
            raise ValueError(f"id2label must have class indices as keys, got {[*id2label]}") from error
        if not names:
            raise ValueError("id2label is empty: it must name at least one class")
        if num_labels is not None and num_labels != len(names):
            raise ValueError(f"num_labels={num_labels} contradicts id2label, which has {len(names)} entries")
        if sorted(names) != list(range(len(names))):
            raise ValueError(
                f"id2label must have the keys 0..{len(names) - 1} without gaps, got {sorted(names)}; "
                "from_pretrained(..., id2label={0: ...}) overrides the class names of a file"
            )
    if label2id is None:
        return names, {name: i for i, name in names.items()}
    indices = {str(name): int(i) for name, i in label2id.items()}
    wrong = next((name for name, i in indices.items() if names.get(i) != name), None)
    if wrong is not None:
        raise ValueError(
            f"label2id maps {wrong!r} to {indices[wrong]}, but id2label names that class {names.get(indices[wrong])!r}"
        )
    return names, indices


def dtype_name(dtype: Any) -> str:
    """Return the name of a floating-point dtype: ``"float16"`` for ``torch.float16``, ``"torch.float16"``, ``"half"``.

    Raises:
        ValueError: the dtype is not float16, bfloat16, float32 or float64.
    """
    name = str(dtype).removeprefix("torch.")
    name = _DTYPES.get(name, name)
    if name not in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype!r}")
    return name
