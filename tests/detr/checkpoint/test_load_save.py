import argparse
import json
import logging
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from detr.checkpoint.load_save import load_weights, model_folder
from detr.config import DetrConfig
from detr.model.backbone import ConvEncoder
from detr.model.detection import DetrForObjectDetection, DetrModel
from detr.model.segmentation import DetrForSegmentation
from tests.detr.conftest import randomize_weights
from tests.tiers import rest_slow

KEYS = Path(__file__).parents[3] / "../shared/spec/keys"
CASES = {
    "resnet18": {"backbone": "resnet18"},
    "learned positions": {"position_embedding_type": "learned"},
    "mobilenet": {"backbone": "tf_mobilenetv3_small_075", "compat": "transformers"},
    "auxiliary": {"auxiliary_loss": True, "compat": "transformers"},
    "convnext": {
        "backbone_config": {
            "model_type": "timm_backbone",
            "backbone": "convnext_atto",
            "out_indices": [0, 1, 2, 3],
        }
    },
}


def no_timm(layer_type: str, depths: list[int]) -> dict:
    widths = [64, 128, 256, 512] if layer_type == "basic" else [256, 512, 1024, 2048]
    return {
        "model_type": "resnet",
        "layer_type": layer_type,
        "depths": depths,
        "hidden_sizes": widths,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }


CASES["resnet of transformers"] = {"backbone_config": no_timm("basic", [2, 2, 2, 2])}
CASES["bottleneck resnet of transformers"] = {"backbone_config": no_timm("bottleneck", [2, 2, 2, 2])}
for _case in ("resnet18", "learned positions", "auxiliary", "resnet of transformers"):
    CASES[f"segmentation, {_case}"] = {**CASES[_case], "segmentation": True}


def predict(model, batch):
    with torch.no_grad():
        return model(pixel_values=batch.pixel_values, pixel_mask=batch.pixel_mask)


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "files")
@pytest.mark.checklist("2. Backbone", "HF ResNet backbone (`no_timm`)")
@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "learned position keys")
@pytest.mark.parametrize("case", rest_slow(CASES, fast=4))
def test_transformers_loads_our_folder_and_we_load_theirs(case, make_twins, make_batch, tmp_path: Path):
    twins, batch = make_twins(**CASES[case]), make_batch()
    model_class = type(twins.ours)
    expected = predict(twins.ours, batch)
    twins.ours.save_pretrained(tmp_path / "ours")
    theirs, report = getattr(transformers, model_class.__name__).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(predict(theirs, batch).logits, expected.logits, rtol=0, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = model_class.from_pretrained(tmp_path / "theirs")
    assert not ours.training
    for name, tensor in twins.ours.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert torch.equal(predict(ours, batch).logits, expected.logits)
    ours.save_pretrained(tmp_path / "again")
    with (
        safe_open(tmp_path / "theirs/model.safetensors", "pt") as a,
        safe_open(tmp_path / "again/model.safetensors", "pt") as b,
    ):
        assert set(a.keys()) == set(b.keys())
        assert b.metadata() == {"format": "pt"}


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "keys on disk")
@pytest.mark.parametrize("model_class", [DetrForObjectDetection, DetrForSegmentation])
@pytest.mark.parametrize("depth", [50, 101])
def test_a_file_has_the_recorded_names_and_shapes(model_class, depth):
    file = KEYS / f"{model_class.__name__}.txt"
    if not file.is_file():
        pytest.skip(f"{file} does not exist")
    with torch.device("meta"):
        model = model_class(DetrConfig(backbone=f"resnet{depth}"))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    recorded = {
        name: tuple(int(n) for n in shape.strip("(),").split(",") if n)
        for name, shape, _ in (line.split("\t") for line in file.read_text().splitlines() if line)
    }
    if depth == 101:  # a resnet50 does not have the further blocks of layer3
        shapes = {n: s for n, s in shapes.items() if not re.search(r"\.layer3\.([6-9]|1\d|2\d)\.", n)}
    assert shapes == recorded


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.known_issue(7)
@pytest.mark.parametrize("overrides", [{"num_labels": 3}, {"id2label": {0: "a", 1: "b"}}])
def test_another_number_of_classes_reinitializes_only_the_class_head_and_warns(
    overrides, make_twins, tmp_path, caplog
):
    ours = make_twins().ours
    folder = save(ours, tmp_path)
    with caplog.at_level(logging.WARNING):
        model = DetrForObjectDetection.from_pretrained(folder, **overrides)
    assert "newly initialized" in caplog.text
    assert "class_labels_classifier.bias, class_labels_classifier.weight" in caplog.text
    assert model.class_labels_classifier.out_features == model.config.num_labels + 1 != 6
    for name, tensor in ours.state_dict().items():
        if "class_labels_classifier" not in name:
            assert torch.equal(model.state_dict()[name], tensor), name


def test_the_same_number_of_classes_loads_the_class_head_without_a_warning(make_twins, tmp_path, caplog):
    ours = make_twins().ours
    model = DetrForObjectDetection.from_pretrained(save(ours, tmp_path), num_labels=5)
    assert torch.equal(model.class_labels_classifier.weight, ours.class_labels_classifier.weight)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"auxiliary_loss": True}, "feeds the normalized output"),
        ({"backbone": "tf_mobilenetv3_small_075"}, "drops the activations"),
    ],
)
def test_a_folder_of_transformers_that_predicts_differently_sets_compat_and_warns_once(
    values, reason, make_twins, make_batch, tmp_path, caplog
):
    twins, batch = make_twins(compat="transformers", **values), make_batch()
    twins.theirs.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        ours = DetrForObjectDetection.from_pretrained(tmp_path)
    assert caplog.text.count(reason) == 1
    assert ours.config.compat == "transformers"
    expected = predict(twins.theirs, batch).logits
    torch.testing.assert_close(predict(ours, batch).logits, expected, rtol=0, atol=1e-4)
    original = DetrForObjectDetection.from_pretrained(tmp_path, compat="original")
    assert original.config.compat == "original"
    assert not torch.allclose(predict(original, batch).logits, expected, atol=1e-2)
    caplog.clear()
    reloaded = DetrForObjectDetection.from_pretrained(save(ours, tmp_path / "ours"))
    assert (reloaded.config.compat, caplog.text) == ("transformers", "")


def test_a_folder_of_transformers_that_predicts_the_same_keeps_compat_original(make_twins, tmp_path, caplog):
    make_twins().theirs.save_pretrained(tmp_path)
    assert DetrForObjectDetection.from_pretrained(tmp_path).config.compat == "original"
    assert DetrForObjectDetection.from_pretrained(tmp_path, auxiliary_loss=True).config.compat == "original"
    assert caplog.text == ""


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "learned position keys")
@pytest.mark.known_issue(16)
def test_run_time_names_version_4_names_and_num_batches_tracked_are_accepted(make_twins):
    twins = make_twins(position_embedding_type="learned")
    tensors = twins.theirs.state_dict()
    assert "model.encoder.layers.0.mlp.fc1.weight" in tensors
    for name in ("row", "column"):
        key = f"position_embedding.{name}_embeddings.weight"
        tensors[f"model.backbone.{key}"] = tensors.pop(f"model.{key}")
    tensors["model.backbone.model.layer1.0.bn1.num_batches_tracked"] = torch.tensor(3)
    model = DetrForObjectDetection(twins.ours.config)
    load_weights(model, tensors, "a file")
    for name, tensor in twins.ours.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "files")
@pytest.mark.parametrize("form", ["sharded", "pytorch_model.bin"])
def test_other_formats_of_weights_files_are_loaded(form, make_twins, tmp_path: Path):
    ours = make_twins().ours
    folder = save(ours, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if form == "sharded":
        names = sorted(tensors)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in parts.items():
            save_file({name: tensors[name] for name in part}, str(folder / file))
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        torch.save(tensors, folder / form)
    loaded = DetrForObjectDetection.from_pretrained(folder)
    assert torch.equal(loaded.bbox_predictor.layers[2].weight, ours.bbox_predictor.layers[2].weight)


def test_a_bare_model_and_a_detector_load_each_other(make_twins, tmp_path: Path, caplog):
    ours = make_twins().ours
    bare = DetrModel.from_pretrained(save(ours, tmp_path / "detector"))
    assert torch.equal(bare.decoder.layernorm.weight, ours.model.decoder.layernorm.weight)
    assert caplog.text == ""
    detector = DetrForObjectDetection.from_pretrained(save(bare, tmp_path / "bare"))
    assert "bbox_predictor.layers.0.bias" in caplog.text
    assert torch.equal(detector.model.decoder.layernorm.weight, bare.decoder.layernorm.weight)
    theirs = transformers.DetrModel.from_pretrained(tmp_path / "bare")
    assert torch.equal(theirs.decoder.layernorm.weight, bare.decoder.layernorm.weight)


def test_backbone_blocks_that_the_model_does_not_have_are_ignored(make_twins, tmp_path: Path):
    whole = make_twins(backbone="efficientnet_lite0").ours
    folder = save(whole, tmp_path)
    backbone = {**whole.config.backbone_config, "out_indices": [1, 2, 4]}
    same = DetrForObjectDetection.from_pretrained(folder, backbone_config=backbone)
    assert same.state_dict().keys() == whole.state_dict().keys()
    cut = {**whole.config.backbone_config, "out_indices": [1, 2, 3]}
    with pytest.raises(ValueError, match=r"input_projection.weight has shape"):
        DetrForObjectDetection.from_pretrained(folder, backbone_config=cut)
    encoder = ConvEncoder(DetrConfig(backbone_config=cut))
    assert len(encoder.state_dict()) < len(whole.model.backbone.conv_encoder.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.decoder.layernorm.weight"), "has no model.decoder.layernorm.weight"),
        (lambda t: t.update(other=torch.zeros(1)), "other is not part of the model"),
        (lambda t: t.update({"model.decoder.layernorm.weight": torch.zeros(3)}), r"has shape \(3,\), the model \(64,\)"),
        (lambda t: t.update({"class_labels_classifier.bias": torch.zeros(92)}), "pass num_labels=... to create a new class head"),
        (lambda t: t.pop("bbox_predictor.layers.0.bias"), "has no bbox_predictor.layers.0.bias"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_rejected_with_the_first_difference(
    change, message, make_twins, tmp_path
):
    folder = save(make_twins().ours, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, str(folder / "model.safetensors"))
    with pytest.raises(ValueError, match=message) as error:
        DetrForObjectDetection.from_pretrained(folder)
    assert str(folder) in str(error.value)


def test_the_error_names_a_missing_folder_file_or_model(make_twins, tmp_path: Path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"model folder .*gone does not exist"):
        DetrForObjectDetection.from_pretrained(tmp_path / "gone")
    make_twins().ours.config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has none of model\.safetensors.*pytorch_model\.bin"):
        DetrForObjectDetection.from_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("facebook/detr-resnet-50", "hub:facebook/detr-resnet-50"):
        with pytest.raises(FileNotFoundError, match=f"folder {name} does not exist"):
            model_folder(name)


def test_the_saved_dtype_is_the_default_and_can_be_overridden(make_twins, tmp_path: Path):
    ours = make_twins().to(torch.float64).ours
    folder = save(ours, tmp_path)
    assert DetrForObjectDetection.from_pretrained(folder).dtype == torch.float64
    assert transformers.DetrForObjectDetection.from_pretrained(folder).dtype == torch.float64
    for dtype in (torch.float32, "float32"):
        assert DetrForObjectDetection.from_pretrained(folder, dtype=dtype).dtype == torch.float32


def test_a_device_that_does_not_exist_is_an_error_and_auto_selects_an_available_one(
    make_twins, tmp_path: Path
):
    folder = save(make_twins().ours, tmp_path)
    assert DetrForObjectDetection.from_pretrained(folder, device_map="cpu").device.type == "cpu"
    assert DetrForObjectDetection.from_pretrained(folder, device_map="auto").device.type in ("cpu", "cuda")
    with pytest.raises(RuntimeError, match=r"device_map=99: this machine has \d+ CUDA devices"):
        DetrForObjectDetection.from_pretrained(folder, device_map=99)


def test_config_replaces_that_of_the_folder_and_excludes_overrides(make_twins, tmp_path: Path):
    ours = make_twins().ours
    folder = save(ours, tmp_path)
    config = DetrConfig.from_dict(ours.config.to_dict(), trainable_backbone_stages=0)
    model = DetrForObjectDetection.from_pretrained(folder, config=config)
    assert not any(p.requires_grad for p in model.model.backbone.parameters())
    with pytest.raises(ValueError, match="either config or dropout"):
        DetrForObjectDetection.from_pretrained(folder, config=config, dropout=0.5)


def test_ignore_mismatched_sizes_reinitializes_parameters_of_other_shapes(make_twins, tmp_path: Path, caplog):
    ours = make_twins().ours
    folder = save(ours, tmp_path)
    with pytest.raises(ValueError, match=r"query_position_embeddings.weight has shape \(12, 64\)"):
        DetrForObjectDetection.from_pretrained(folder, num_queries=7, num_labels=2)
    model = DetrForObjectDetection.from_pretrained(folder, num_queries=7, ignore_mismatched_sizes=True)
    assert "model.query_position_embeddings.weight" in caplog.text
    assert model.model.query_position_embeddings.num_embeddings == 7


def test_an_unknown_argument_is_rejected(make_twins, tmp_path: Path):
    folder = save(make_twins().ours, tmp_path)
    with pytest.raises(TypeError, match="neither from_pretrained nor DetrConfig has an argument num_label"):
        DetrForObjectDetection.from_pretrained(folder, num_label=3)


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "original .pth")
def test_a_training_checkpoint_of_the_original_with_its_arguments_can_be_read(tmp_path: Path):
    from detr.checkpoint.state_dict import read_state_dict

    torch.save(
        {"model": {"w": torch.ones(1)}, "args": argparse.Namespace(lr=1e-4), "epoch": 3}, tmp_path / "x.pth"
    )
    assert read_state_dict(tmp_path / "x.pth")["w"].tolist() == [1.0]


def to_original(model) -> dict[str, torch.Tensor]:
    """Convert the tensors of a model to the layout of facebookresearch/detr."""
    names = {
        r"model\.backbone\.conv_encoder\.model\.": "backbone.0.body.",
        r"model\.position_embedding\.row_embeddings\.": "backbone.1.row_embed.",
        r"model\.position_embedding\.column_embeddings\.": "backbone.1.col_embed.",
        r"model\.input_projection\.": "input_proj.",
        r"model\.query_position_embeddings\.": "query_embed.",
        r"class_labels_classifier\.": "class_embed.",
        r"bbox_predictor\.": "bbox_embed.",
        r"model\.decoder\.layernorm\.": "transformer.decoder.norm.",
        r"model\.(encoder|decoder)\.": r"transformer.\1.",
        r"\.fc(\d)\.": r".linear\1.",
        r"\.self_attn_layer_norm\.": ".norm1.",
        r"(encoder\.layers\.\d+)\.final_layer_norm\.": r"\1.norm2.",
        r"\.encoder_attn_layer_norm\.": ".norm2.",
        r"\.final_layer_norm\.": ".norm3.",
        r"\.encoder_attn\.": ".multihead_attn.",
    }
    out: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if "backbone.conv_encoder" in name:
            out[re.sub(r"model\.backbone\.conv_encoder\.model\.", "backbone.0.body.", name)] = tensor
            continue
        for pattern, replacement in names.items():
            if not name.startswith(("mask_head.", "bbox_attention.")):
                name = re.sub(pattern, replacement, name)
        if re.search(r"\.[qkv]_proj\.", name):
            joint = re.sub(r"\.[qkv]_proj\.", ".in_proj_", name)
            out[joint] = torch.cat((out[joint], tensor)) if joint in out else tensor
        else:
            out[name] = tensor
    return out


def in_order_of_the_original(model):
    """Order q, k, v as in the joint matrix of the original."""
    state = model.state_dict()
    order = sorted(state, key=lambda name: [r"qkv".find(c) for c in re.findall(r"\.([qkv])_proj", name)])
    return type("Ordered", (), {"state_dict": lambda self: {name: state[name] for name in order}})()


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "original .pth")
@pytest.mark.parametrize(
    "values",
    rest_slow(
        [
            {"segmentation": True},
            {"dilation": True, "backbone": "resnet50"},
            {},
            {"position_embedding_type": "learned"},
        ]
    ),
    ids=str,
)
def test_a_pth_of_the_original_is_loaded_without_a_configuration(
    values, make_twins, make_batch, tmp_path: Path
):
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    ours, batch = make_twins(**{"backbone": "resnet18"} | heads | values).ours, make_batch()
    file = tmp_path / "detr.pth"
    torch.save(
        {
            "model": to_original(in_order_of_the_original(ours)),
            "args": argparse.Namespace(lr=1e-4),
            "epoch": 3,
        },
        file,
    )
    overrides = {"dilation": True} if values.get("dilation") else {}
    loaded = type(ours).from_pretrained(file, **overrides)
    assert torch.equal(predict(loaded, batch).logits, predict(ours, batch).logits)
    assert loaded.config.num_labels == 5
    fine_tuned = type(ours).from_pretrained(file, num_labels=3, **overrides)
    assert predict(fine_tuned, batch).logits.shape[-1] == 4


def test_other_pth_files_and_pickled_code_are_rejected(make_twins, tmp_path: Path):
    torch.save({"w": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth is not a checkpoint of facebookresearch/detr"):
        DetrForObjectDetection.from_pretrained(tmp_path / "other.pth")
    ran = tmp_path / "ran"
    payload = type("Payload", (), {"__reduce__": lambda self: (Path.touch, (ran,))})()
    torch.save({"model": payload}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth holds a pickled getattr, which is not loaded"):
        DetrForObjectDetection.from_pretrained(tmp_path / "evil.pth")
    assert not ran.exists()


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "files")
def test_weights_saved_in_shards_can_be_loaded_by_both_libraries(make_twins, make_batch, tmp_path: Path):
    ours, batch = make_twins().ours, make_batch()
    expected = predict(ours, batch).logits
    ours.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(predict(DetrForObjectDetection.from_pretrained(tmp_path), batch).logits, expected)
    theirs = transformers.DetrForObjectDetection.from_pretrained(tmp_path)
    torch.testing.assert_close(predict(theirs, batch).logits, expected, rtol=0, atol=1e-4)
    ours.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_hub_id_is_loaded_from_the_local_cache(make_twins, make_batch, tmp_path: Path, monkeypatch):
    """The cache has the layout of huggingface_hub; the network is not used."""
    ours, batch = make_twins().ours, make_batch()
    cache = tmp_path / "models--someone--detr"
    save(ours, cache / "snapshots/0123abcd")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0123abcd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for source in ("someone/detr", "hub:someone/detr"):
        loaded = DetrForObjectDetection.from_pretrained(source, local_files_only=True)
        assert torch.equal(predict(loaded, batch).logits, predict(ours, batch).logits)
    with pytest.raises(FileNotFoundError, match="someone/other"):
        DetrForObjectDetection.from_pretrained("someone/other", local_files_only=True)
    with pytest.raises(FileNotFoundError, match="someone/detr"):
        DetrForObjectDetection.from_pretrained("someone/detr", revision="v2", local_files_only=True)


@pytest.mark.slow
@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "files")
@pytest.mark.parametrize("model_class", [DetrForObjectDetection, DetrForSegmentation])
@pytest.mark.parametrize(
    "values",
    [
        {"backbone": "resnet50"},
        {"backbone": "resnet101", "position_embedding_type": "learned"},
        {"backbone": "resnet50", "dilation": True},
        {"backbone_config": no_timm("bottleneck", [3, 4, 6, 3])},
        {"backbone_config": no_timm("bottleneck", [3, 4, 23, 3])},
    ],
    ids=str,
)
def test_models_of_the_published_sizes_are_loaded_by_transformers_and_back(
    model_class, values, make_batch, tmp_path: Path, difference
):
    config = DetrConfig(**values)
    ours = model_class(config).eval()
    randomize_weights(ours, 0, backbone_gain=1.0)
    batch = make_batch(sizes=((128, 160), (96, 128)))
    ours.save_pretrained(tmp_path / "ours")
    theirs, report = getattr(transformers, model_class.__name__).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.save_pretrained(tmp_path / "theirs")
    torch.save({"model": to_original(in_order_of_the_original(ours))}, tmp_path / "detr.pth")
    sources = [(tmp_path / "theirs", {})]
    if "backbone" in values:
        sources.append((tmp_path / "detr.pth", {"dilation": True} if values.get("dilation") else {}))
    with torch.no_grad():
        expected = theirs(pixel_values=batch.pixel_values, pixel_mask=batch.pixel_mask)
        for source, overrides in sources:
            loaded = predict(model_class.from_pretrained(source, **overrides), batch)
            for name in [n for n in ("logits", "pred_boxes", "pred_masks") if n in expected]:
                difference(float((loaded[name] - expected[name]).abs().max()))
                torch.testing.assert_close(loaded[name], expected[name], rtol=1e-3, atol=1e-4)
