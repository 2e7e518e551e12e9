"""Loading from a hub id gives the same as from a folder, and downloads only the required files."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file

import detr
from detr.checkpoint.load_save import model_folder
from detr.model_files import FILE_ARGUMENTS, ModelFiles
from tests.detr.conftest import small_config
from tests.hub_server import Hub, serve_hub

SIZE = {"shortest_edge": 64, "longest_edge": 96}
CONFIGS = (detr.DetrConfig, detr.AutoConfig)
PROCESSORS = (detr.DetrImageProcessor, detr.DetrImageProcessorPil, detr.AutoImageProcessor)
MODELS = (detr.DetrModel, detr.DetrForObjectDetection, detr.AutoModelForObjectDetection)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model folder with an image processor."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    detr.DetrForObjectDetection(small_config()).save_pretrained(folder)
    detr.DetrImageProcessor(size=SIZE).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serve_hub(tmp_path / "cache") as hub:
        yield hub


def in_format(saved: Path, folder: Path, form: str) -> Path:
    """Copy the model with its weights or its processor in another file format."""
    shutil.copytree(saved, folder)
    tensors = load_file(folder / "model.safetensors")
    if form != "processor_config.json" and form != "model.safetensors":
        (folder / "model.safetensors").unlink()
    if form == "pytorch_model.bin":
        torch.save(tensors, folder / form)
    elif form == "pytorch_model.bin.index.json":
        names = sorted(tensors)
        parts = {"a.bin": names[::2], "b.bin": names[1::2]}
        for file, part in parts.items():
            torch.save({name: tensors[name] for name in part}, folder / file)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / form).write_text(json.dumps(index))
    elif form == "model.safetensors.index.json":
        detr.DetrForObjectDetection.from_pretrained(saved).save_pretrained(folder, max_shard_size="500KB")
        assert (folder / form).is_file()
    elif form == "processor_config.json":
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").unlink()
        (folder / form).write_text(json.dumps({"image_processor": settings, "processor_class": "X"}))
    return folder


@pytest.mark.parametrize(
    "form",
    [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "processor_config.json",
    ],
)
def test_a_hub_id_and_a_folder_load_the_same_in_every_file_format(form, saved, hub, tmp_path):
    folder = in_format(saved, tmp_path / "model", form)
    shutil.copytree(folder, folder / "checkpoint-500")
    hub.models["acme/detr"] = {"main": folder}
    expected = detr.DetrForObjectDetection.from_pretrained(saved).state_dict()
    for source in (folder, "acme/detr"):
        state = detr.DetrForObjectDetection.from_pretrained(source).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        assert detr.AutoImageProcessor.from_pretrained(source).size == SIZE
    files = {file.name for file in folder.iterdir() if file.is_file()}
    assert sorted(hub.downloads) == sorted(files), "not each file once, or files of checkpoint-500"


def test_loading_a_configuration_or_a_processor_downloads_one_json_file(saved, hub):
    for number, load in enumerate((*CONFIGS, *PROCESSORS)):
        hub.models[f"acme/{number}"] = {"main": saved}
        load.from_pretrained(f"acme/{number}")
        expected = "config.json" if load in CONFIGS else "preprocessor_config.json"
        assert hub.downloads == [expected], load
        hub.downloads.clear()


def test_a_json_file_itself_can_be_loaded(saved):
    assert detr.DetrConfig.from_pretrained(saved / "config.json", num_labels=3).num_labels == 3
    for processor in PROCESSORS:
        assert processor.from_pretrained(saved / "preprocessor_config.json").size == SIZE


@pytest.mark.parametrize("load", [*CONFIGS, *PROCESSORS, *MODELS], ids=lambda load: load.__name__)
def test_every_from_pretrained_accepts_the_file_arguments(load, saved, hub, tmp_path):
    """Each argument has an effect on its own; for `pipeline` see test_arguments.py."""
    shutil.copytree(saved, tmp_path / "repository/inner")
    hub.models["acme/detr"] = {"main": tmp_path / "repository", "v2": saved}
    hub.models["acme/private"] = {"main": saved}
    hub.tokens["acme/private"] = "secret"
    with pytest.raises(FileNotFoundError):
        load.from_pretrained("acme/detr")
    load.from_pretrained("acme/detr", subfolder="inner")
    load.from_pretrained(tmp_path / "repository", subfolder="inner")
    load.from_pretrained("acme/detr", revision="v2")
    with pytest.raises(FileNotFoundError, match="could not be fetched from the hub"):
        load.from_pretrained("acme/private")
    load.from_pretrained("acme/private", token="secret", cache_dir=tmp_path / "other")
    assert (tmp_path / "other/models--acme--private").is_dir()
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        load.from_pretrained("acme/private", token="secret", local_files_only=True)
    hub.downloads.clear()
    load.from_pretrained("acme/detr", revision="v2")
    assert hub.downloads == []
    load.from_pretrained("acme/detr", revision="v2", local_files_only=True)
    load.from_pretrained("acme/detr", revision="v2", force_download=True)
    assert hub.downloads
    tested = {"subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download"}
    assert tested == FILE_ARGUMENTS - {"trust_remote_code"}  # which has no effect


@pytest.mark.parametrize("load", [*CONFIGS, *PROCESSORS, *MODELS], ids=lambda load: load.__name__)
def test_trust_remote_code_is_accepted_unless_true(load, saved):
    """Examples of transformers pass False to every `from_pretrained`."""
    plain = load.from_pretrained(saved)
    for value in (False, None):
        loaded = load.from_pretrained(saved, trust_remote_code=value)
        assert type(loaded) is type(plain)
        assert not hasattr(loaded, "trust_remote_code")
    with pytest.raises(TypeError, match="trust_remote_code=True"):
        load.from_pretrained(saved, trust_remote_code=True)


def test_all_files_come_from_the_commit_of_the_first_one(saved, hub, tmp_path):
    hub.models["acme/detr"] = {"main": saved}
    files = ModelFiles("acme/detr")
    commit = files.require("config.json").parent
    hub.models["acme/detr"] = {"main": in_format(saved, tmp_path / "new", "pytorch_model.bin"), "old": saved}
    assert files.require("model.safetensors").parent == commit


def test_a_downloaded_model_loads_without_the_hub(saved, hub, tmp_path, monkeypatch):
    """The file that is tried first does not exist, which is known only from the earlier answer of the hub."""
    hub.models["acme/detr"] = {"main": in_format(saved, tmp_path / "model", "pytorch_model.bin")}
    folder = model_folder("acme/detr")
    assert {file.name for file in folder.iterdir()} >= {"config.json", "pytorch_model.bin"}
    del hub.models["acme/detr"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for source in ("acme/detr", "hub:acme/detr"):
        assert detr.DetrForObjectDetection.from_pretrained(source).config.num_labels == 5
        assert detr.AutoImageProcessor.from_pretrained(source).size == SIZE


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_that_refers_to_files_outside_the_folder_is_rejected(name, saved, tmp_path):
    folder = in_format(saved, tmp_path / "model", "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="is not the name of a file next to it"):
        detr.DetrForObjectDetection.from_pretrained(folder)


def test_the_error_names_a_model_that_does_not_exist_or_lacks_a_file(saved, hub, tmp_path):
    (tmp_path / "empty").mkdir()
    hub.models["acme/empty"] = {"main": tmp_path / "empty"}
    hub.models["acme/detr"] = {"main": saved}
    for load in (*CONFIGS, *MODELS):
        with pytest.raises(FileNotFoundError, match=r"acme/empty has none of config\.json"):
            load.from_pretrained("acme/empty")
    for load in (*CONFIGS, *PROCESSORS, *MODELS):
        with pytest.raises(
            FileNotFoundError, match="folder acme/gone does not exist, and it could not be fetched"
        ):
            load.from_pretrained("acme/gone")
        with pytest.raises(FileNotFoundError, match="acme/detr does not exist, and it could not be fetched"):
            load.from_pretrained("acme/detr", revision="gone")
        with pytest.raises(FileNotFoundError, match="has no subfolder gone"):
            load.from_pretrained(saved, subfolder="gone")


def test_a_backbone_given_as_a_hub_id_is_loaded_from_the_hub(hub, tmp_path):
    values = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "embedding_size": 8}
    torch.manual_seed(0)
    theirs = transformers.ResNetForImageClassification(transformers.ResNetConfig(**values))
    theirs.save_pretrained(tmp_path / "resnet")
    hub.models["acme/resnet"] = {"main": tmp_path / "resnet"}
    config = small_config(backbone="acme/resnet", use_timm_backbone=False, use_pretrained_backbone=True)
    assert hub.downloads == ["config.json"]
    stem = detr.DetrModel(config).backbone.conv_encoder.model.conv1.weight
    assert torch.equal(stem, theirs.resnet.embedder.embedder.convolution.weight)
    with pytest.raises(
        FileNotFoundError, match="acme/gone does not exist, and it could not be fetched from the hub"
    ):
        small_config(backbone="acme/gone")
