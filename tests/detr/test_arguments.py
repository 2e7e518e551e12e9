"""Every accepted argument has an effect; an argument that would have none is rejected by name."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import detr
from detr.checkpoint.load_save import load_model
from detr.model_files import FILE_ARGUMENTS
from tests.detr.conftest import SMALL

BASE = SMALL | {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
PIXELS = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
LABELS = [
    {
        "class_labels": torch.tensor([0, 1, 2, 3]),
        "boxes": torch.tensor(
            [[0.5, 0.4, 0.3, 0.2], [0.2, 0.2, 0.1, 0.3], [0.8, 0.3, 0.1, 0.1], [0.5, 0.7, 0.9, 0.5]]
        ),
        "masks": torch.ones(4, 64, 64, dtype=torch.bool),
    }
]
RESNET = {"model_type": "resnet", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 16, 24]}
RESNET |= {"embedding_size": 8, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
AS_TRANSFORMERS = {"compat": "transformers"}

# For each keyword: a value that differs from that of `BASE`, and other settings that it requires.
CONFIG: dict[str, tuple[Any, dict[str, Any]]] = {
    "backbone": ("resnet10t", {}),
    "backbone_config": (RESNET, {}),
    "backbone_kwargs": ({"output_stride": 16}, {"backbone": "test_resnet"}),
    "num_channels": (1, {}),
    "num_queries": (7, {}),
    "encoder_layers": (1, {}),
    "encoder_ffn_dim": (32, {}),
    "encoder_attention_heads": (16, {}),
    "encoder_layerdrop": (1.0, {}),
    "decoder_layers": (1, {}),
    "decoder_ffn_dim": (32, {}),
    "decoder_attention_heads": (16, {}),
    "decoder_layerdrop": (1.0, {}),
    "num_layers": (1, {}),
    "num_hidden_layers": (1, {}),
    "num_attention_heads": (16, {}),
    "activation_function": ("gelu", {}),
    "d_model": (32, {}),
    "hidden_size": (32, {}),
    "dropout": (0.5, {}),
    "attention_dropout": (0.5, {}),
    "activation_dropout": (0.5, {}),
    "init_std": (0.5, AS_TRANSFORMERS),
    "init_xavier_std": (3.0, AS_TRANSFORMERS),
    "auxiliary_loss": (True, {}),
    "position_embedding_type": ("learned", {}),
    "dilation": (True, {}),
    "class_cost": (1e6, {"bbox_cost": 0, "giou_cost": 0}),
    "bbox_cost": (1e6, {"class_cost": 0, "giou_cost": 0}),
    "giou_cost": (1e6, {"class_cost": 0, "bbox_cost": 0}),
    "mask_loss_coefficient": (9, {}),
    "dice_loss_coefficient": (9, {}),
    "bbox_loss_coefficient": (9, {}),
    "giou_loss_coefficient": (9, {}),
    "eos_coefficient": (0.9, {}),
    "return_dict": (False, {}),
    "output_attentions": (True, {}),
    "output_hidden_states": (True, {}),
    "attn_implementation": ("eager", {}),
    "num_labels": (9, {}),
    "trainable_backbone_stages": (0, {}),
    "compat": ("transformers", {}),
}
NAMES = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}, "architectures": ["DetrModel"]}
DTYPES = ("dtype", "torch_dtype")
TESTED_ELSEWHERE = {"multi_scale", "use_pretrained_backbone", "use_timm_backbone", "is_encoder_decoder"}


def behavior(config: detr.DetrConfig, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return values that characterize a model of this configuration: parameters, outputs and losses."""
    torch.manual_seed(0)
    model = detr.DetrForSegmentation(config)
    values: list[Any] = [[tuple(p.shape), p.requires_grad, p.sum().item()] for p in model.parameters()]
    fused = []
    attend = F.scaled_dot_product_attention
    pixels = PIXELS[:, : config.num_channels]
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(
            F, "scaled_dot_product_attention", lambda *a, **k: [fused.append(1), attend(*a, **k)][1]
        )
        outputs = model.eval()(pixels)
    parts = outputs if isinstance(outputs, tuple) else outputs.to_tuple()
    values += [type(outputs), len(parts), float(parts[0].sum()), len(fused)]
    losses = []
    for seed in range(3):  # the losses depend on which queries are matched, and thus on the costs
        torch.manual_seed(seed)
        out = model.train()(pixels, labels=LABELS)
        losses.append((out[0] if isinstance(out, tuple) else out.loss).item())
    return [*values, losses]


def test_the_table_has_every_keyword_of_the_configuration():
    assert CONFIG.keys() | NAMES.keys() | {*DTYPES} | TESTED_ELSEWHERE == detr.DetrConfig.keywords()


@pytest.fixture(scope="module")
def base_behavior() -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        return behavior(detr.DetrConfig(**BASE), patch)


@pytest.mark.parametrize("name", CONFIG)
def test_a_keyword_of_the_configuration_changes_the_model(name, monkeypatch, base_behavior):
    value, needed = CONFIG[name]
    base = {key: v for key, v in BASE.items() if key not in replaced_by(name)}
    if name in (
        "class_cost",
        "bbox_cost",
        "giou_cost",
    ):  # compare matching by this cost only with another cost only
        other = {"class_cost": "bbox_cost", "bbox_cost": "giou_cost", "giou_cost": "class_cost"}[name]
        without = {**dict.fromkeys(("class_cost", "bbox_cost", "giou_cost"), 0), other: 1}
        before = behavior(detr.DetrConfig(**base, **without), monkeypatch)
    elif needed:
        before = behavior(detr.DetrConfig(**{**BASE, **needed}), monkeypatch)
    else:
        before = base_behavior
    after = detr.DetrConfig(**{**base, **needed, name: value})
    assert behavior(after, monkeypatch) != before


def replaced_by(name: str) -> set[str]:
    """Return the entries of `BASE` that a keyword replaces."""
    same = {
        "backbone_config": {"backbone"},
        "num_layers": {"encoder_layers", "decoder_layers"},
        "num_hidden_layers": {"encoder_layers"},
        "num_attention_heads": {"encoder_attention_heads"},
        "hidden_size": {"d_model"},
        "id2label": {"num_labels"},
        "label2id": {"num_labels"},
    }
    return same.get(name, set()) | {name}


def test_class_names_and_dtypes_are_stored_and_used(tmp_path: Path):
    for name, value in NAMES.items():
        base = {key: v for key, v in BASE.items() if key not in replaced_by(name)}
        assert getattr(detr.DetrConfig(**base, **{name: value}), name) == value
    for name in DTYPES:
        config = detr.DetrConfig(**BASE, **{name: torch.float64})
        assert config.dtype == "float64"
        detr.DetrForObjectDetection(detr.DetrConfig(**BASE)).save_pretrained(tmp_path)
        assert detr.DetrForObjectDetection.from_pretrained(tmp_path, config=config).dtype == torch.float64
    with pytest.raises(ValueError, match="contradicts"):
        detr.DetrConfig(dtype="float16", torch_dtype="float32")


@pytest.mark.parametrize("name", [*CONFIG, *NAMES, *DTYPES])
def test_an_override_of_a_file_equals_the_same_argument_of_the_constructor(name, tmp_path: Path):
    value = CONFIG[name][0] if name in CONFIG else NAMES.get(name, "float16")
    needed = AS_TRANSFORMERS if name.startswith("init_") else {}
    detr.DetrConfig(**BASE, **needed).save_pretrained(tmp_path)
    base = {key: v for key, v in BASE.items() if key not in replaced_by(name)}
    base |= needed
    got = detr.DetrConfig.from_pretrained(tmp_path, **{name: value})
    expected = detr.DetrConfig(**{**base, name: value})
    assert got.to_dict() | {"trainable_backbone_stages": 0} == expected.to_dict() | {
        "trainable_backbone_stages": 0
    }
    assert got.attn_implementation == expected.attn_implementation


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"num_querys": 9}, TypeError, "no num_querys; did you mean num_queries"),
        ({"encoder_layer": 9}, TypeError, "did you mean encoder_layers"),
        ({"device_map": "cpu"}, TypeError, "device_map is an argument of from_pretrained"),
        ({"revision": "v2"}, TypeError, "revision is an argument of from_pretrained"),
        ({"model_type": "bert"}, ValueError, "model_type must be 'detr'"),
        ({"is_encoder_decoder": False}, ValueError, "is_encoder_decoder must be True"),
        ({"attn_implementation": "flash_attention_2"}, ValueError, "attn_implementation must be one of"),
        ({"dtype": "banana"}, ValueError, "dtype must be float16"),
        ({"dtype": torch.int64}, ValueError, "dtype must be float16"),
        ({"id2label": ["cat", "dog"]}, TypeError, "got a list; give {0: 'cat'"),
        ({"id2label": {}}, ValueError, "id2label is empty"),
        ({"id2label": {"cat": 0}}, ValueError, "class indices as keys"),
        ({"id2label": {1: "cat", 2: "dog"}}, ValueError, r"id2label={0: \.\.\.}"),
        ({"id2label": {0: "cat"}, "label2id": {"dog": 0}}, ValueError, "id2label names that class 'cat'"),
        ({"num_channels": 4, "backbone_config": {**RESNET, "num_channels": 3}}, ValueError, "num_channels=4"),
    ],
    ids=str,
)
def test_a_keyword_without_effect_is_rejected_by_name(values, error, message):
    with pytest.raises(error, match=message):
        detr.DetrConfig(**values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    detr.DetrForSegmentation(detr.DetrConfig(**BASE)).save_pretrained(folder)
    detr.DetrImageProcessor(size=64).save_pretrained(folder)
    return folder


LOADING: dict[str, dict[str, Any]] = {
    "config": {"config": detr.DetrConfig(**BASE, return_dict=False)},
    "dtype": {"dtype": "bfloat16"},
    "torch_dtype": {"torch_dtype": torch.bfloat16},
    "device_map": {"device_map": {"": "meta"}},
    "ignore_mismatched_sizes": {"ignore_mismatched_sizes": True, "num_queries": 3},
}


def test_the_table_has_every_argument_of_loading():
    assert LOADING.keys() == inspect.signature(load_model).parameters.keys() - {"cls", "source", "arguments"}


@pytest.mark.parametrize("name", LOADING)
def test_an_argument_of_loading_changes_the_model(name, folder):
    plain = detr.DetrForSegmentation.from_pretrained(folder)
    model = detr.DetrForSegmentation.from_pretrained(folder, **LOADING[name])
    values = [(m.dtype, m.device.type, m.config.return_dict, m.config.num_queries) for m in (plain, model)]
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"dtype": "banana"}, ValueError, "dtype must be"),
        ({"dtype": "float16", "torch_dtype": "float32"}, ValueError, "torch_dtype=float32 contradicts"),
        ({"device_map": "balanced"}, ValueError, "device_map='balanced'"),
        ({"device_map": {"model": "cpu"}}, ValueError, "give that device"),
        ({"attn_implementation": "flex_attention"}, ValueError, "attn_implementation"),
        ({"num_querys": 3}, TypeError, "num_querys"),
        ({"trust_remote_code": True}, TypeError, "trust_remote_code"),
        ({"use_timm_backbone": False}, ValueError, "use_timm_backbone=False contradicts"),
        ({"backbone_kwargs": {"act_layer": "gelu"}}, ValueError, "has no act_layer"),
        ({"transformers_version": "4"}, TypeError, "transformers_version"),
    ],
    ids=str,
)
def test_an_argument_of_loading_without_effect_is_rejected_by_name(values, error, message, folder):
    loaders = [detr.DetrForSegmentation, detr.AutoModelForImageSegmentation]
    if values.keys() <= detr.DetrConfig.keywords() - {"dtype", "torch_dtype"}:
        loaders += [detr.DetrConfig, detr.AutoConfig]
    for loader in loaders:
        with pytest.raises(error, match=message):
            loader.from_pretrained(folder, **values)


PIPELINE: dict[str, tuple[dict[str, Any], str]] = {
    "task": ({"task": "image-segmentation"}, "type"),
    "device": ({"device": "meta"}, "device"),
    "device_map": ({"device_map": "meta"}, "device"),
    "dtype": ({"dtype": torch.float16}, "dtype"),
    "torch_dtype": ({"torch_dtype": "float16"}, "dtype"),
    "backend": ({"backend": "pil"}, "processor"),
    "use_fast": ({"use_fast": False}, "processor"),
    "image_processor": ({"image_processor": detr.DetrImageProcessor(size=32)}, "size"),
    "model_kwargs": ({"model_kwargs": {"torch_dtype": torch.float16}}, "dtype"),
    "pad": ({"pad": "canonical"}, "pad"),
    "batch_size": ({"batch_size": 3}, "batch_size"),
    "orientation": ({"orientation": "ignore"}, "orientation"),
}


@pytest.mark.parametrize("name", PIPELINE)
def test_an_argument_of_the_pipeline_changes_it(name, folder):
    def properties(**values: Any) -> dict[str, Any]:
        pipe = detr.pipeline(**({"task": "object-detection", "model": folder} | values))
        return {
            "type": type(pipe),
            "device": pipe.device,
            "dtype": pipe.model.dtype,
            "processor": type(pipe.image_processor),
            "size": pipe.image_processor.size,
            "pad": pipe.pad,
            "batch_size": pipe.batch_size,
            "orientation": pipe.orientation,
        }

    values, changed = PIPELINE[name]
    assert properties(**values)[changed] != properties()[changed]


def test_the_table_has_every_argument_of_the_pipeline(folder, monkeypatch):
    """File arguments apply to every file that is read, whether given directly or in `model_kwargs`."""
    known = inspect.signature(detr.pipeline).parameters.keys() - {"model", "options"}
    assert PIPELINE.keys() == known - FILE_ARGUMENTS
    calls = []
    original = detr.model_files.ModelFiles.__init__
    monkeypatch.setattr(
        "detr.model_files.ModelFiles.__init__",
        lambda self, source, **given: [calls.append(given), original(self, source, **given)][0],
    )
    given = {"revision": "v2", "token": "t", "local_files_only": True}
    detr.pipeline(model=folder, **given, model_kwargs={"cache_dir": "c"})
    assert len(calls) == 3
    assert all(each == given | {"cache_dir": "c"} for each in calls)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            {"dtype": "float16", "model_kwargs": {"dtype": "float32"}},
            ValueError,
            "dtype='float16' contradicts",
        ),
        (
            {"device": "cpu", "model_kwargs": {"device_map": "meta"}},
            ValueError,
            "device_map='cpu' contradicts",
        ),
        (
            {"image_processor": detr.DetrImageProcessor(), "backend": "pil"},
            ValueError,
            "backend='pil' applies only to",
        ),
        (
            {"image_processor": detr.DetrImageProcessor(), "use_fast": True},
            ValueError,
            "use_fast=True applies only to",
        ),
        ({"backend": "pil", "use_fast": True}, ValueError, "use_fast=True contradicts backend='pil'"),
        ({"model_kwargs": {"num_querys": 3}}, TypeError, "num_querys"),
        ({"framework": "pt"}, TypeError, "framework"),
    ],
    ids=str,
)
def test_an_argument_of_the_pipeline_without_effect_is_rejected(values, error, message, folder):
    with pytest.raises(error, match=message):
        detr.pipeline(model=folder, **values)


def test_loading_arguments_are_rejected_if_the_model_is_already_loaded(folder):
    pipe = detr.pipeline(model=folder)
    given = {"model": pipe.model, "image_processor": pipe.image_processor}
    for values in ({"revision": "v2"}, {"local_files_only": True}, {"model_kwargs": {"num_labels": 3}}):
        with pytest.raises(ValueError, match=next(iter(values))):
            detr.pipeline(**given, **values)


IMAGE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
OBJECTS = {
    "image_id": 1,
    "annotations": [
        {"category_id": 1, "bbox": [5, 6, 30, 20], "area": 600, "iscrowd": 0, "keypoints": [9, 9, 2]}
    ],
}
PROCESSOR: dict[str, Any] = {
    "do_resize": False,
    "size": {"height": 40, "width": 50},
    "max_size": 70,
    "resample": 0,
    "do_rescale": False,
    "rescale_factor": 1.0,
    "do_normalize": False,
    "image_mean": 0.5,
    "image_std": 0.5,
    "do_convert_annotations": False,
    "do_pad": False,
    "pad_and_return_pixel_mask": False,
    "pad_size": {"height": 96, "width": 128},
    "boxes_relative_to": "padded_batch",
    "scale_keypoints": True,
}
OTHER_IMAGES = {"do_convert_rgb": (False, IMAGE[:, :, 0])}


@pytest.mark.parametrize("kind", [detr.DetrImageProcessor, detr.DetrImageProcessorPil])
def test_every_attribute_of_a_processor_changes_what_it_returns(kind, tmp_path):
    def result(processor: Any, image: Any = IMAGE, **call: Any) -> str:
        try:
            inputs = processor(image, OBJECTS, **call)
        except (ValueError, TypeError) as error:
            return str(error)
        return str(dict(sorted(inputs.items()))) + str(inputs["pixel_values"][0].shape)

    base = {"size": {"shortest_edge": 64, "longest_edge": 128}}
    kind(**base).save_pretrained(tmp_path)
    known = {field.name for field in dataclasses.fields(kind)} | {"max_size", "pad_and_return_pixel_mask"}
    assert PROCESSOR.keys() | OTHER_IMAGES.keys() | {"format"} == known
    with pytest.raises(ValueError, match="format"):
        kind(format="coco")
    for name, value in PROCESSOR.items():
        extra = {"pad_size": {"height": 128, "width": 128}} if name == "boxes_relative_to" else {}
        before = result(kind(**base, **extra))
        size = {} if name == "size" else {"size": 64} if name == "max_size" else base
        assert result(kind(**{**size, **extra, name: value})) != before, name
        assert result(kind.from_pretrained(tmp_path, **extra, **{name: value})) != before, name
        if name == "max_size":  # contradicts the longest_edge of `base`
            with pytest.raises(ValueError, match="max_size=70 contradicts"):
                kind(**base, max_size=70)
        else:
            assert result(kind(**base, **extra), **{name: value}) != before, name
    for name, (value, image) in OTHER_IMAGES.items():
        assert result(kind(**base, **{name: value}), image) != result(kind(**base), image)


def test_an_argument_of_a_processor_without_effect_is_rejected(folder):
    fast, pil = detr.DetrImageProcessor, detr.DetrImageProcessorPil
    for kind, value in ((fast, True), (pil, False)):
        assert kind.from_pretrained(folder, use_fast=value).size["shortest_edge"] == 64
        with pytest.raises(ValueError, match=f"use_fast={not value} is not {kind.__name__}"):
            kind.from_pretrained(folder, use_fast=not value)
    for kind in (fast, pil, detr.AutoImageProcessor):
        with pytest.raises(TypeError, match="do_crop"):
            kind.from_pretrained(folder, do_crop=True)
    with pytest.raises(ValueError, match="contradicts do_pad"):
        fast(do_pad=True, pad_and_return_pixel_mask=False)
    with pytest.raises(ValueError, match="max_size=7 goes with a shortest edge"):
        fast(size=(3, 4), max_size=7)
