"""Every ResNet that transformers can configure can be built, and has the same outputs and files."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import detr
from detr.checkpoint.load_save import load_weights
from detr.model.backbone import ConvEncoder, load_pretrained_backbone
from tests.detr.conftest import SMALL, randomize_weights
from tests.tiers import rest_slow

TRANSFORMER = {key: value for key, value in SMALL.items() if key != "backbone"}


def random_resnet(seed: int) -> transformers.ResNetConfig:
    """Draw a ResNet of random depths, widths, type of blocks, strides, activation and feature maps."""
    draw = random.Random(seed)
    stages = draw.choice([2, 3, 4, 4, 5])
    maps = sorted(draw.sample(range(stages + 1), draw.randint(1, stages)))
    return transformers.ResNetConfig(
        num_channels=draw.choice([1, 3, 4]),
        embedding_size=draw.choice([8, 16, 64]),
        hidden_sizes=[4 * draw.randint(1, 8) for _ in range(stages)],
        depths=[draw.randint(1, 3) for _ in range(stages)],
        layer_type=draw.choice(["basic", "bottleneck"]),
        hidden_act=draw.choice(["relu", "relu", "gelu", "silu"]),
        downsample_in_first_stage=draw.random() < 0.3,
        downsample_in_bottleneck=draw.random() < 0.3,
        out_indices=maps,
    )


@pytest.mark.parametrize("seed", rest_slow(range(12), fast=6))
def test_a_random_resnet_predicts_as_in_transformers_and_both_load_its_files(seed, tmp_path: Path):
    backbone = random_resnet(seed)
    config = detr.DetrConfig(**TRANSFORMER, backbone_config=backbone)
    ours = detr.DetrForObjectDetection(config).eval()
    randomize_weights(ours, seed)
    ours.save_pretrained(tmp_path / "ours")
    theirs, report = transformers.DetrForObjectDetection.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("unexpected_keys", "mismatched_keys"))
    last = backbone.out_indices[-1]  # transformers builds the stages after it, but does not use them
    unused = tuple(f"encoder.stages.{stage}." for stage in range(last, 9))
    assert all(any(part in name for part in unused) for name in report["missing_keys"])
    size = 256 if len(backbone.depths) > 4 else 96
    pixels = torch.randn(2, backbone.num_channels, size, size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = theirs(pixels)
        for model in (ours, ours.optimize()):
            outputs = model(pixels)
            torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = detr.DetrForObjectDetection.from_pretrained(tmp_path / "theirs").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in ours.state_dict().items())


def test_losses_equal_transformers():
    backbone = transformers.ResNetConfig(
        depths=[1, 2, 1, 1], hidden_sizes=[16, 32, 48, 64], embedding_size=16
    )
    config = detr.DetrConfig(**TRANSFORMER, backbone_config=backbone)
    ours = detr.DetrForObjectDetection(config).train()
    randomize_weights(ours, 0)
    theirs = transformers.DetrForObjectDetection(transformers.DetrConfig.from_dict(config.to_dict())).train()
    load_weights(ours, theirs.state_dict(), "transformers")
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.4, 0.3, 0.2]])}]
    losses = [model(pixels, labels=labels).loss for model in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


def test_the_deepest_stages_are_trainable():
    config = detr.DetrConfig(
        **{**TRANSFORMER, "trainable_backbone_stages": 2},
        backbone_config={"model_type": "resnet", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8]},
    )
    net = ConvEncoder(config).model
    assert {n.split(".")[0] for n, p in net.named_parameters() if p.requires_grad} == {"layer3", "layer4"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a classifier with transformers, like `microsoft/resnet-50`."""
    folder = tmp_path_factory.mktemp("models") / "resnet"
    config = transformers.ResNetConfig(depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 48, 64], embedding_size=16)
    torch.manual_seed(0)
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    return folder


OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_timm_backbone": False},
    {"backbone_kwargs": {"out_indices": [2, 4]}},
]


@pytest.mark.parametrize("values", OPTIONS, ids=str)
def test_a_transformers_backbone_can_be_given_by_name(values, saved):
    config = detr.DetrConfig(**TRANSFORMER, backbone=str(saved), **values)
    assert config.backbone_config["depths"] == [1, 1, 2, 1]
    expected = values.get("backbone_kwargs", {}).get("out_indices", [4])
    theirs = transformers.ResNetBackbone.from_pretrained(saved, out_indices=expected).eval()
    named = detr.DetrConfig(**TRANSFORMER, backbone=str(saved), use_pretrained_backbone=True, **values)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = ConvEncoder(named).eval()(pixels)
        for ours, expected_map in zip(maps, theirs(pixels).feature_maps, strict=True):
            torch.testing.assert_close(ours, expected_map, rtol=1e-4, atol=1e-4)


def test_pretrained_weights_of_transformers_are_loaded_from_a_folder(saved, tmp_path):
    values = json.loads((saved / "config.json").read_text())
    model = detr.DetrModel(
        detr.DetrConfig(**TRANSFORMER, backbone_config=transformers.ResNetConfig(**values))
    )
    load_pretrained_backbone(model, saved)
    tensors = transformers.ResNetModel.from_pretrained(saved).state_dict()
    assert torch.equal(
        model.backbone.conv_encoder.model.conv1.weight, tensors["embedder.embedder.convolution.weight"]
    )
    other = detr.DetrModel(
        detr.DetrConfig(**TRANSFORMER, backbone_config={"model_type": "resnet", "depths": [1, 1, 1, 1]})
    )
    with pytest.raises(ValueError, match=r"layer3\.1\.conv1\.weight is not one of its tensors"):
        load_pretrained_backbone(other, saved)


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_resnet.r160_in1k"])
def test_a_timm_name_may_have_the_hub_prefix(name):
    config = detr.DetrConfig(**TRANSFORMER, backbone=name)
    assert config.backbone_config["backbone"] == name.removeprefix("timm/")
    ConvEncoder(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": "SAVED", "use_timm_backbone": True}, "is not a timm name"),
        ({"backbone": "resnet101", "use_timm_backbone": False}, "'resnet101' is a timm name"),
        (
            {"backbone": "SAVED", "backbone_kwargs": {"width": 2}},
            "a backbone of model_type 'resnet' has no width",
        ),
        ({"backbone": "resnet18", "backbone_kwargs": {"act_layer": "gelu"}}, "has no act_layer"),
        (
            {"backbone": "resnet18", "backbone_config": {"model_type": "resnet"}},
            "either backbone_config or backbone",
        ),
        ({"backbone_kwargs": {"depths": [1]}}, "'timm_backbone' has no depths"),
        (
            {"backbone_config": {"model_type": "resnet"}, "backbone_kwargs": {"depths": [1]}},
            "backbone_kwargs",
        ),
        ({"backbone_config": {"model_type": "resnet"}, "use_timm_backbone": True}, "use_timm_backbone=True"),
        ({"backbone_config": {"model_type": "resnet", "depth": [1]}}, "has no depth"),
        ({"backbone_config": {"model_type": "resnet", "depths": [1, 1]}}, "differ in length"),
        (
            {"backbone_config": {"model_type": "resnet", "out_features": ["stage9"]}},
            "out_features must be some of",
        ),
        (
            {"backbone_config": {"model_type": "resnet", "out_indices": [9]}},
            "out_indices must be some of 0..4",
        ),
        (
            {"backbone_config": {"model_type": "resnet", "out_indices": [3], "out_features": ["stage4"]}},
            "out_indices .* contradict out_features",
        ),
        ({"backbone_config": {"model_type": "resnet", "layer_type": "wide"}}, "'basic' or 'bottleneck'"),
        (
            {
                "backbone_config": {
                    "model_type": "timm_backbone",
                    "backbone": "resnet18",
                    "features_only": False,
                }
            },
            "features_only must be True",
        ),
        (
            {
                "backbone_config": {
                    "model_type": "timm_backbone",
                    "backbone": "resnet18",
                    "out_features": ["layer4"],
                }
            },
            "select the feature maps of a timm model by out_indices",
        ),
    ],
    ids=str,
)
def test_backbone_settings_that_would_be_ignored_are_rejected(values, message, saved):
    given = {key: str(saved) if value == "SAVED" else value for key, value in values.items()}
    with pytest.raises(ValueError, match=message):
        detr.DetrConfig(**given)


def test_the_error_names_a_backbone_of_another_type_or_that_does_not_exist(tmp_path):
    transformers.ConvNextConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="configuration of a 'convnext' model; give a ResNet"):
        detr.DetrConfig(backbone=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere/resnet"):
        detr.DetrConfig(backbone="./nowhere/resnet")
    with pytest.raises(TypeError, match="give an object as backbone_config"):
        detr.DetrConfig(backbone=transformers.ResNetConfig())


def test_overrides_change_the_backbone_of_a_file(tmp_path):
    base = {**TRANSFORMER, "backbone": "resnet18"}
    detr.DetrConfig(**base).save_pretrained(tmp_path)
    for values, expected in (
        ({"num_channels": 4}, {"num_channels": 4}),
        ({"dilation": True}, {"output_stride": 16}),
        ({"backbone_kwargs": {"out_indices": [3]}}, {"out_indices": [3]}),
        ({"use_timm_backbone": True}, {}),
    ):
        backbone = detr.DetrConfig.from_pretrained(tmp_path, **values).backbone_config
        assert backbone == detr.DetrConfig(**base).backbone_config | expected
    config = detr.DetrConfig.from_pretrained(tmp_path, dilation=True)
    config.save_pretrained(tmp_path)
    assert detr.DetrConfig.from_pretrained(tmp_path, dilation=False).backbone_config["output_stride"] is None
    config.num_channels = 1
    config.dilation = False
    assert (config.backbone_config["num_channels"], config.backbone_config["output_stride"]) == (1, None)
