"""Weights are read from all common file formats; for other files, the error names the file and what is expected."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import detr
from detr.checkpoint.state_dict import read_state_dict
from tests.detr.checkpoint.test_load_save import in_order_of_the_original, to_original
from tests.detr.conftest import small_config

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(1)}
HTML = b"<!DOCTYPE html><html><body>404: not found</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def equal(tensors: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[n], t) for n, t in TENSORS.items())


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_state_dict_is_found_under_its_usual_keys_and_prefixes(key, prefix, tmp_path: Path):
    named = {prefix + name: tensor for name, tensor in TENSORS.items()}
    for content in (named, {key: named, "epoch": 3}):
        torch.save(content, tmp_path / "x.pth")
        assert equal(read_state_dict(tmp_path / "x.pth"))
    save_file(named, str(tmp_path / "x.safetensors"))
    assert equal(read_state_dict(tmp_path / "x.safetensors"))


def test_a_prefix_of_only_some_names_is_not_removed(tmp_path: Path):
    torch.save({"module.a": TENSORS["b"], "b": TENSORS["b"]}, tmp_path / "x.pth")
    assert read_state_dict(tmp_path / "x.pth").keys() == {"module.a", "b"}


@pytest.mark.parametrize(
    "value",
    [
        np.int64(3),
        np.float32(0.5),
        np.float64(0.5),
        np.bool_(True),
        np.arange(3),
        np.ones((2, 2), np.float32),
        argparse.Namespace(lr=1e-4, device="cuda", betas=(np.float64(0.9), 0.95)),
    ],
    ids=repr,
)
def test_numbers_and_arguments_of_training_next_to_the_weights_are_read(value, tmp_path: Path):
    torch.save({"model": TENSORS, "value": value}, tmp_path / "x.pth")
    assert equal(read_state_dict(tmp_path / "x.pth"))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.pth"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (POINTER, "git-lfs pointer, not the file itself; run 'git lfs pull'"),
        (HTML, "an HTML or XML page"),
        (b"", "the file is empty"),
        (b"\x00" * 100, "incomplete or damaged"),
        ("half", "incomplete or damaged"),
        ("most", "incomplete or damaged"),
    ],
    ids=lambda v: v if isinstance(v, str) else v[:8].hex(),
)
def test_the_error_for_a_file_without_weights_names_the_file_and_its_content(
    name, content, expected, tmp_path: Path
):
    path = tmp_path / name
    if isinstance(content, str):
        if path.suffix == ".safetensors":
            save_file(TENSORS, str(path))
        else:
            torch.save(TENSORS, path)
        data = path.read_bytes()
        content = data[: len(data) // 2] if content == "half" else data[:-5]
    path.write_bytes(content)
    detr.DetrConfig(backbone="test_resnet").save_pretrained(tmp_path)
    source = path if name == "x.pth" else tmp_path
    with pytest.raises(ValueError, match=expected) as raised:
        detr.DetrForObjectDetection.from_pretrained(source)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (POINTER, "git-lfs pointer"),
        (HTML, "HTML or XML page"),
        (b"", "empty"),
        (b'{"a": ', "not valid JSON"),
        (b"\xff\xfe{\x00", "not valid JSON"),
        (b"[1]", "holds a list, not a JSON object"),
    ],
)
def test_the_error_for_an_invalid_json_file_names_the_file(name, content, expected, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    loaders = [detr.DetrConfig, detr.AutoConfig, detr.DetrForObjectDetection]
    if name != "config.json":
        loaders = [detr.DetrImageProcessor, detr.DetrImageProcessorPil, detr.AutoImageProcessor]
    for loader in loaders:
        with pytest.raises(ValueError, match=expected) as raised:
            loader.from_pretrained(tmp_path)
        assert str(tmp_path / name) in str(raised.value)


def test_the_error_for_an_invalid_value_names_its_file(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"id2label": {"1": "cat", "2": "dog"}}')
    (tmp_path / "preprocessor_config.json").write_text('{"size": "large"}')
    for loader in (detr.DetrConfig, detr.DetrForObjectDetection):
        with pytest.raises(ValueError, match=r"config\.json: id2label must have the keys 0\.\.1"):
            loader.from_pretrained(tmp_path)
    for loader in (detr.DetrImageProcessor, detr.AutoImageProcessor):
        with pytest.raises(ValueError, match=r"preprocessor_config\.json: size is 'large'"):
            loader.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"model": {"a": TENSORS["b"], "step": 3}}, r"'step' is a int; give a file of model\.state_dict\(\)"),
        ([TENSORS["b"]], "but a list"),
        ({"net": TENSORS}, "'net' is a dict"),
    ],
    ids=str,
)
def test_the_error_for_a_pickle_without_a_state_dict_says_what_it_contains(content, expected, tmp_path: Path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=expected):
        read_state_dict(tmp_path / "x.pth")


def test_a_pickled_model_is_rejected_by_its_class(tmp_path: Path):
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds a pickled torch\.nn\.modules\.linear\.Linear"):
        read_state_dict(tmp_path / "x.pth")


def original(**values) -> dict[str, torch.Tensor]:
    """Return the tensors of a model with the names of facebookresearch/detr."""
    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    model = detr.DetrForObjectDetection(small_config(backbone="resnet18", **heads, **values))
    return to_original(in_order_of_the_original(model))


@pytest.mark.parametrize("classes", [{"num_labels": 3}, {"id2label": {0: "balloon"}}, {"label2id": {"a": 0}}])
def test_an_original_without_a_class_head_gets_a_new_one_for_the_given_classes(
    classes, tmp_path: Path, caplog
):
    tensors = original()
    file = tmp_path / "no-class-head.pth"
    torch.save({"model": {n: t for n, t in tensors.items() if "class_embed" not in n}}, file)
    model = detr.DetrForObjectDetection.from_pretrained(file, **classes)
    assert model.class_labels_classifier.out_features == model.config.num_labels + 1
    assert model.config.num_labels == (3 if "num_labels" in classes else 1)
    assert "class_labels_classifier.weight" in caplog.text
    assert "bbox_predictor" not in caplog.text
    assert torch.equal(model.bbox_predictor.layers[0].weight, tensors["bbox_embed.layers.0.weight"])


def test_the_error_for_an_incomplete_original_says_what_is_missing(tmp_path: Path):
    tensors = original()
    for part, expected in (
        ("class_embed", r"no class head \(class_embed\).*give num_labels=\.\.\. or id2label"),
        ("query_embed", "has no model.query_position_embeddings.weight"),
        ("bbox_embed", "has no bbox_predictor"),
        ("transformer.encoder.layers.0.linear1", "has no model.encoder.layers.0.fc1"),
        ("backbone.0.body.conv1", "has no model.backbone.conv_encoder.model.conv1.weight"),
    ):
        torch.save({n: t for n, t in tensors.items() if not n.startswith(part)}, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=expected) as raised:
            detr.DetrForObjectDetection.from_pretrained(tmp_path / "x.pth")
        assert str(tmp_path / "x.pth") in str(raised.value)


def test_an_original_with_other_input_channels_is_loaded(tmp_path: Path):
    torch.save(original(num_channels=4), tmp_path / "x.pth")
    model = detr.DetrForObjectDetection.from_pretrained(tmp_path / "x.pth")
    assert model.config.num_channels == model.config.backbone_config["num_channels"] == 4


def test_the_dtype_is_that_of_the_weights_if_the_configuration_has_none(tmp_path: Path):
    model = detr.DetrForObjectDetection(small_config()).to(torch.float16)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert detr.DetrForObjectDetection.from_pretrained(tmp_path).dtype == torch.float16


def test_a_folder_without_a_class_head_gets_a_new_one_for_the_given_classes(tmp_path: Path):
    model = detr.DetrForObjectDetection(small_config())
    model.config.save_pretrained(tmp_path)
    tensors = {n: t for n, t in model.state_dict().items() if "class_labels_classifier" not in n}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"has no class_labels_classifier.*num_labels=\.\.\. to create a new class head"
    ):
        detr.DetrForObjectDetection.from_pretrained(tmp_path)
    loaded = detr.DetrForObjectDetection.from_pretrained(tmp_path, num_labels=3)
    assert loaded.class_labels_classifier.out_features == 4
    assert torch.equal(loaded.bbox_predictor.layers[0].weight, model.bbox_predictor.layers[0].weight)
