import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch.nn.functional as F
import transformers

from detr.config import DetrConfig

OURS = {"compat", "trainable_backbone_stages", "use_pretrained_backbone", "multi_scale"}

OLD_HUB_CONFIG = {
    "_name_or_path": "",
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["DetrForObjectDetection"],
    "attention_dropout": 0.0,
    "auxiliary_loss": False,
    "backbone": "resnet50",
    "backbone_config": None,
    "backbone_kwargs": None,
    "bbox_cost": 5,
    "classifier_dropout": 0.0,
    "d_model": 256,
    "dilation": False,
    "encoder_layers": 6,
    "id2label": {str(i): f"name {i}" for i in range(91)},
    "label2id": {f"name {i}": i for i in range(91)},
    "max_position_embeddings": 1024,
    "model_type": "detr",
    "num_hidden_layers": 6,
    "scale_embedding": False,
    "torch_dtype": "float32",
    "transformers_version": "4.19.0.dev0",
    "use_pretrained_backbone": None,
    "use_timm_backbone": True,
}


@pytest.mark.checklist("1. DetrConfig", "fields and defaults")
def test_defaults_are_those_of_transformers():
    ours, theirs = DetrConfig(), transformers.DetrConfig()
    for field in dataclasses.fields(DetrConfig):
        if field.name in OURS | {"backbone_config", "architectures"}:
            continue
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    backbone = theirs.backbone_config.to_dict()
    assert {key: backbone[key] for key in ours.backbone_config} == ours.backbone_config
    assert (ours.compat, ours.trainable_backbone_stages, ours.use_pretrained_backbone) == (
        "original",
        3,
        False,
    )


@pytest.mark.checklist("1. DetrConfig", "attribute map")
@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("hidden_size", "d_model"),
        ("num_attention_heads", "encoder_attention_heads"),
        ("num_hidden_layers", "encoder_layers"),
    ],
)
def test_an_alias_reads_writes_and_constructs_its_field(alias, name):
    config = DetrConfig(**{alias: 16})
    assert getattr(config, name) == getattr(config, alias) == 16
    setattr(config, alias, 8)
    assert getattr(config, name) == getattr(config, alias) == 8
    assert alias not in config.to_dict()
    with pytest.raises(ValueError, match=f"{alias}=16 contradicts {name}=8"):
        DetrConfig(**{alias: 16, name: 8})
    assert getattr(DetrConfig.from_dict(DetrConfig().to_dict(), **{alias: 16}), name) == 16


def test_num_layers_sets_the_numbers_of_layers_that_are_not_given():
    config = DetrConfig(num_layers=2, decoder_layers=3)
    assert (config.encoder_layers, config.decoder_layers) == (2, 3)


@pytest.mark.checklist("1. DetrConfig", "strict types")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("d_model", "256"),
        ("d_model", 256.0),
        ("num_queries", True),
        ("auxiliary_loss", 1),
        ("dropout", "0.1"),
        ("dropout", True),
        ("position_embedding_type", 1),
        ("activation_function", 3),
        ("use_pretrained_backbone", 1),
        ("architectures", "DetrModel"),
        ("backbone_config", 7),
    ],
)
def test_a_value_of_the_wrong_type_is_rejected_by_name(name, value):
    with pytest.raises(TypeError, match=name):
        DetrConfig(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dropout": 1.5}, "dropout must be in 0..1"),
        ({"num_queries": 0}, "num_queries must be at least 1"),
        ({"encoder_layers": -1}, "encoder_layers must not be negative"),
        ({"d_model": 100}, "not a multiple of encoder_attention_heads"),
        ({"d_model": 6, "encoder_attention_heads": 1, "decoder_attention_heads": 1}, "multiple of 4"),
        ({"position_embedding_type": "rotary"}, "'sine' or 'learned'"),
        ({"auxiliary_loss": True, "decoder_layers": 0}, "needs at least one decoder layer"),
        ({"compat": "v4"}, "'original' or 'transformers'"),
        ({"class_cost": 0, "bbox_cost": 0, "giou_cost": 0}, "can't all be 0"),
        ({"num_labels": 3, "id2label": {0: "a"}}, "contradicts id2label"),
        ({"num_labels": 0}, "positive int"),
        ({"id2label": {0: "a", 2: "b"}}, "without gaps"),
        ({"backbone_config": {"model_type": "swin"}}, "'timm_backbone' or 'resnet'"),
        ({"backbone_config": {"model_type": "timm_backbone"}}, "name of a timm model"),
        ({"backbone_kwargs": {"out_indices": []}}, "out_indices must be a list of int"),
        ({"use_timm_backbone": False, "dilation": True}, "dilation=True needs a timm backbone"),
        (
            {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18"}, "dilation": True},
            "stride 16",
        ),
    ],
)
def test_a_value_out_of_range_is_rejected_with_the_reason(values, message):
    with pytest.raises(ValueError, match=message):
        DetrConfig(**values)


def test_ints_are_accepted_for_floats_and_floats_for_costs():
    config = DetrConfig(dropout=0, bbox_cost=2.5)
    assert (config.dropout, config.bbox_cost) == (0, 2.5)


@pytest.mark.checklist("1. DetrConfig", "strict types")
def test_unknown_keywords_become_attributes_and_are_saved():
    config = DetrConfig(max_position_embeddings=1024)
    assert config.max_position_embeddings == 1024
    assert DetrConfig.from_dict(config.to_dict()).max_position_embeddings == 1024


@pytest.mark.checklist("1. DetrConfig", "legacy keywords")
@pytest.mark.checklist("1. DetrConfig", "what the docs do not name")
@pytest.mark.parametrize(
    "values",
    [
        {"backbone": "resnet18"},
        {"backbone": "resnet101", "dilation": True},
        {"dilation": True},
        {"use_timm_backbone": True, "use_pretrained_backbone": True, "backbone": "resnet50"},
        {"num_channels": 1},
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet34", "out_indices": [2, 4]}},
    ],
)
def test_legacy_keywords_give_the_backbone_config_of_transformers(values):
    theirs = transformers.DetrConfig(**copy.deepcopy(values)).backbone_config.to_dict()
    ours = DetrConfig(**values).backbone_config
    del ours["use_pretrained_backbone"]  # always False
    assert {key: theirs[key] for key in ours} == ours


@pytest.mark.checklist("1. DetrConfig", "legacy keywords")
@pytest.mark.known_issue(15)
def test_backbone_kwargs_with_a_timm_name_need_no_network_access():
    config = DetrConfig(backbone="convnext_atto", backbone_kwargs={"out_indices": (0, 1, 2, 3)})
    assert config.backbone_config["backbone"] == "convnext_atto"
    assert config.backbone_config["out_indices"] == [0, 1, 2, 3]


@pytest.mark.checklist("1. DetrConfig", "legacy keywords")
def test_use_timm_backbone_false_selects_the_resnet_of_transformers():
    backbone = DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False).backbone_config
    assert (backbone["model_type"], backbone["out_features"]) == ("resnet", ["stage4"])


@pytest.mark.checklist("1. DetrConfig", "backbone_config forms")
def test_a_backbone_config_object_is_accepted():
    theirs = transformers.TimmBackboneConfig(backbone="resnet18", out_indices=[1, 4])
    assert DetrConfig(backbone_config=theirs).backbone_config["out_indices"] == [1, 4]


def test_assigning_backbone_selects_another_timm_network():
    config = DetrConfig()
    config.backbone = "tf_mobilenetv3_small_075"
    assert config.backbone_config["backbone"] == "tf_mobilenetv3_small_075"
    assert not hasattr(config, "backbone")
    assert "backbone" not in config.to_dict()
    assert (
        DetrConfig.from_dict(config.to_dict(), backbone="resnet18").backbone_config["backbone"] == "resnet18"
    )


@pytest.mark.checklist("1. DetrConfig", "base fields that matter")
def test_class_names_and_their_number_stay_consistent():
    config = DetrConfig(id2label={"0": "cat", "1": "dog", "2": "cow"})
    assert (config.num_labels, config.label2id) == (3, {"cat": 0, "dog": 1, "cow": 2})
    config.num_labels = 3
    assert config.id2label[0] == "cat"
    config.num_labels = 2
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert DetrConfig(label2id={"cat": 0, "dog": 1}).id2label == {0: "cat", 1: "dog"}


def test_num_labels_overrides_the_class_names_of_a_file_only_if_the_number_differs():
    values = DetrConfig(id2label={0: "cat", 1: "dog", 2: "cow"}).to_dict()
    assert DetrConfig.from_dict(values, num_labels=3).id2label[2] == "cow"
    assert DetrConfig.from_dict(values, num_labels=4).id2label[3] == "LABEL_3"
    assert DetrConfig.from_dict(values, id2label={0: "x"}).label2id == {"x": 0}


@pytest.mark.checklist("1. DetrConfig", "config.json")
def test_config_json_is_sorted_and_contains_neither_num_labels_nor_default_names(tmp_path: Path):
    DetrConfig(num_labels=2).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    values = json.loads(text)
    assert text == json.dumps(values, indent=2, sort_keys=True) + "\n"
    assert {"num_labels", "id2label", "label2id", "use_pretrained_backbone"}.isdisjoint(values)
    assert values["compat"] == "original"


def test_a_saved_configuration_loads_equal(tmp_path: Path):
    config = DetrConfig(
        backbone="resnet18", id2label={0: "cat"}, auxiliary_loss=True, compat="transformers", init_std=0.5
    )
    config.save_pretrained(tmp_path)
    assert DetrConfig.from_pretrained(tmp_path) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


@pytest.mark.checklist("1. DetrConfig", "config.json")
def test_transformers_reads_our_config_json(tmp_path: Path):
    config = DetrConfig(backbone="resnet18", num_labels=7, num_queries=9, dilation=True, eos_coefficient=0.25)
    config.save_pretrained(tmp_path)
    theirs = transformers.DetrConfig.from_pretrained(tmp_path)
    for field in dataclasses.fields(DetrConfig):
        if field.name not in OURS | {"backbone_config", "architectures"}:
            assert getattr(theirs, field.name) == getattr(config, field.name), field.name
    backbone = theirs.backbone_config.to_dict()
    assert {key: backbone[key] for key in config.backbone_config} == config.backbone_config


@pytest.mark.checklist("1. DetrConfig", "config.json")
def test_we_read_the_config_json_of_transformers(tmp_path: Path):
    theirs = transformers.DetrConfig(backbone="resnet34", id2label={0: "a", 1: "b", 2: "c"}, d_model=128)
    theirs.save_pretrained(tmp_path)
    ours = DetrConfig.from_pretrained(tmp_path)
    assert (ours.d_model, ours.id2label) == (128, {0: "a", 1: "b", 2: "c"})
    assert ours.backbone_config["backbone"] == "resnet34"
    assert not hasattr(ours, "transformers_version")


@pytest.mark.checklist("1. DetrConfig", "strict types")
@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "label ids")
def test_an_old_config_of_the_hub_can_be_read():
    config = DetrConfig.from_dict(OLD_HUB_CONFIG)
    assert config.num_labels == 91
    assert config.dtype == "float32"
    assert config.backbone_config["backbone"] == "resnet50"
    assert config.use_pretrained_backbone is False


@pytest.mark.parametrize(
    "values", [{}, {"use_timm_backbone": False}, {"backbone": "resnet18", "dilation": True}]
)
def test_all_entries_of_a_transformers_config_are_valid_keywords(values):
    theirs = transformers.DetrConfig(**values).to_dict()
    config = DetrConfig(**theirs)
    assert config.d_model == theirs["d_model"]
    assert config.backbone_config["model_type"] == theirs["backbone_config"]["model_type"]
    assert DetrConfig(**OLD_HUB_CONFIG, tie_encoder_decoder=False).num_labels == 91


def test_a_callable_activation_is_not_written_and_warns():
    with pytest.warns(UserWarning, match="activation_function is a callable"):
        values = DetrConfig(activation_function=F.gelu).to_dict()
    assert "activation_function" not in values


@pytest.mark.checklist("1. DetrConfig", "documented but unread")
def test_init_std_without_effect_warns():
    with pytest.warns(UserWarning, match="init_std has an effect only with compat='transformers'"):
        DetrConfig(init_std=0.1)
    DetrConfig(init_std=0.1, compat="transformers")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "does not exist"),
        ("{", ValueError, "not valid JSON"),
        ("[]", ValueError, "not a JSON object"),
        ('{"model_type": "bert"}', ValueError, "'bert' model, not of DETR"),
    ],
)
def test_an_invalid_configuration_file_is_rejected_with_its_path(tmp_path: Path, content, error, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=message) as raised:
        DetrConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_whole_costs_and_coefficients_are_written_as_integers_for_transformers(tmp_path: Path) -> None:
    import transformers

    DetrConfig(class_cost=1.0, bbox_cost=5.0, dice_loss_coefficient=2.0).save_pretrained(tmp_path)
    theirs = transformers.DetrConfig.from_pretrained(tmp_path)
    assert (theirs.class_cost, theirs.bbox_cost, theirs.dice_loss_coefficient) == (1, 5, 2)
