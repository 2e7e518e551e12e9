import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException

from detr.inference.detector import ObjectDetector
from detr.model.detection import DetrForObjectDetection
from raydetr import storage
from raydetr.errors import ConfigError, RegistryError
from raydetr.registry import models
from raydetr.registry.models import files_digest, folder_digest, local_folder, register, resolve
from raydetr.registry.tracking import client, start_run
from tests.tiny_detr import png, save_tiny_detr

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

NAMES = ["disc", "square", "triangle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_detr(tmp_path_factory.mktemp("model") / "tiny", NAMES)


@pytest.fixture
def run_id(tracking_uri) -> str:
    return start_run(tracking_uri, "training", "run of a test", {}, {})


def test_a_registered_version_contains_the_model_files_and_a_card_and_no_pickle(tracking_uri, run_id, folder):
    version = register(tracking_uri, run_id, str(folder), tags={"data.digest": "abc"})
    assert version == 1

    model = resolve("models:/raydetr@challenger", tracking_uri)
    assert (model.name, model.version, model.model_uri) == ("raydetr", 1, "models:/raydetr/1")
    assert model.label == "raydetr-1"
    assert model.digest == folder_digest(str(folder))
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert Path(model.folder, name).read_bytes() == (folder / name).read_bytes()
    card = Path(model.folder, "README.md").read_text()
    assert "run of a test" in card
    assert "disc, square, triangle" in card
    assert "data.digest: abc" in card
    root = Path(model.folder).parents[1]
    assert (root / "MLmodel").is_file()
    assert not [p for p in root.rglob("*") if p.suffix in (".pkl", ".pickle", ".pt", ".pth", ".bin")]
    assert "pickle" not in (root / "MLmodel").read_text().replace("cloudpickle_version", "")

    entity = client(tracking_uri).get_model_version("raydetr", "1")
    assert entity.run_id == run_id
    assert entity.tags["data.digest"] == "abc"


def test_the_card_has_data_metrics_revision_and_intended_use(tracking_uri, folder):
    run_id = start_run(tracking_uri, "training", "run", {}, {"mlflow.source.git.commit": "0abc"})
    tags = {"data_digest": "d" * 64, "chosen_on_digest": "e" * 64}
    metrics = {"steps": 300, "last_loss": 1.25, "val_AP": 0.4375}
    register(tracking_uri, run_id, str(folder), tags=tags, metrics=metrics)
    card = Path(resolve("models:/raydetr/1", tracking_uri).folder, "README.md").read_text()
    for line in (
        f"- training data (digest of the shards): {'d' * 64}",
        f"- validation data that selected the checkpoint or stopped training (digest of the shards): {'e' * 64}",
        "- code revision: 0abc",
        "| steps | 300 |",
        "| last_loss | 1.25 |",
        "| val_AP | 0.4375 |",
        "## Intended use and limits",
        "from detr import DetrForObjectDetection, DetrImageProcessor",
    ):
        assert line in card, card


def test_registration_is_idempotent(tracking_uri, run_id, folder, monkeypatch):
    """A rerun returns the same version, whether the driver was stopped before or after the alias moved."""
    mlflow_client = type(client(tracking_uri))
    with monkeypatch.context() as broken:

        def refuse(*_):
            raise MlflowException("temporarily unavailable")

        broken.setattr(mlflow_client, "set_registered_model_alias", refuse)
        with pytest.raises(RegistryError, match="temporarily unavailable"):
            register(tracking_uri, run_id, str(folder))
    assert register(tracking_uri, run_id, str(folder)) == 1
    assert register(tracking_uri, run_id, str(folder)) == 1
    assert resolve("models:/raydetr@challenger", tracking_uri).version == 1
    other = start_run(tracking_uri, "training", "another run", {}, {})
    assert register(tracking_uri, other, str(folder)) == 2
    assert register(tracking_uri, run_id, str(folder)) == 1
    assert resolve("models:/raydetr@challenger", tracking_uri).version == 2, (
        "the alias does not move backward"
    )


def test_a_second_version_moves_the_alias_and_keeps_the_first_version(tracking_uri, run_id, folder, tmp_path):
    register(tracking_uri, run_id, str(folder))
    other = save_tiny_detr(tmp_path / "other", NAMES, seed=1)
    (other / "README.md").write_text("my own card")
    assert register(tracking_uri, run_id, str(other)) == 2
    challenger = resolve("models:/raydetr@challenger", tracking_uri)
    assert challenger.version == 2
    assert Path(challenger.folder, "README.md").read_text() == "my own card"
    first = resolve("models:/raydetr/1", tracking_uri)
    assert first.digest == folder_digest(str(folder)) != challenger.digest


def test_a_version_loads_as_pyfunc_and_predicts_like_the_detector(
    tracking_uri, run_id, folder, tmp_path, monkeypatch
):
    register(tracking_uri, run_id, str(folder))
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    loaded = mlflow.pyfunc.load_model("models:/raydetr/1")
    images = [png(64, 96, seed=0), png(80, 50, seed=1)]
    answers = loaded.predict(images)

    detector = ObjectDetector.from_pretrained(folder)
    for data, answer in zip(images, answers, strict=True):
        expected = detector.detect([detector.prepare(data)])[0]
        assert [d["score"] for d in answer] == expected.scores.tolist()
        assert [d["label"] for d in answer] == [NAMES[i] for i in expected.labels]
        assert [list(d["box"].values()) for d in answer] == expected.boxes_xyxy.tolist()
    assert len({round(d["score"], 6) for d in answers[0]}) > 6
    assert loaded.predict(pd.DataFrame({"image": images})) == answers


def test_a_version_loads_in_detr_and_in_transformers(tracking_uri, run_id, folder):
    transformers = pytest.importorskip("transformers")
    register(tracking_uri, run_id, str(folder))
    version = resolve("models:/raydetr/1", tracking_uri).folder
    ours = DetrForObjectDetection.from_pretrained(version).eval()
    theirs = transformers.DetrForObjectDetection.from_pretrained(version).eval()
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels).logits, theirs(pixels).logits, atol=1e-4, rtol=1e-4)
    assert transformers.DetrImageProcessor.from_pretrained(version).size["shortest_edge"] == 96


def test_errors_of_missing_models_versions_and_aliases_list_the_existing_ones(tracking_uri, run_id, folder):
    with pytest.raises(
        RegistryError, match=r"no registered model 'raydetr'; it has none: pipelines/train.py"
    ):
        resolve("models:/raydetr@champion", tracking_uri)
    register(tracking_uri, run_id, str(folder))
    with pytest.raises(RegistryError, match=r"no registered model 'other'; it has raydetr"):
        resolve("models:/other/1", tracking_uri)
    with pytest.raises(RegistryError, match=r"no alias 'champion'; its aliases: challenger → version 1"):
        resolve("models:/raydetr@champion", tracking_uri)
    with pytest.raises(RegistryError, match=r"no version 7; its versions: 1"):
        resolve("models:/raydetr/7", tracking_uri)


@pytest.mark.parametrize("address", ["models:/raydetr", "models:/raydetr/latest", ""])
def test_malformed_model_uris_are_errors(tracking_uri, address):
    with pytest.raises(ConfigError, match="models:/NAME@ALIAS"):
        resolve(address, tracking_uri)


def test_a_model_folder_resolves_and_another_folder_is_an_error(tmp_path, folder):
    model = resolve(str(folder), "")
    assert (model.folder, model.version) == (str(folder), None)
    assert model.label == f"tiny-{model.digest[:8]}"
    assert local_folder(model) == str(folder)
    with pytest.raises(RegistryError, match="no such folder"):
        resolve(str(tmp_path / "nowhere"), "")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(RegistryError, match=r"config.json.*missing; it contains notes.txt"):
        resolve(str(tmp_path), "")


def test_a_folder_without_a_model_is_not_registered(tracking_uri, run_id, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").unlink()
    with pytest.raises(RegistryError, match=r"model.safetensors missing"):
        register(tracking_uri, run_id, str(tmp_path / "broken"))
    assert client(tracking_uri).search_registered_models() == []


def test_the_digest_changes_with_each_file(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert folder_digest(str(copy)) == folder_digest(str(folder))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "eos_coefficient": 0.2}))
    assert folder_digest(str(copy)) != folder_digest(str(folder))


FILES = ("model.safetensors", "config.json", "preprocessor_config.json")


def change(file: Path) -> None:
    """Change one byte in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("name", FILES)
def test_a_version_whose_files_were_changed_is_not_loaded(tracking_uri, run_id, folder, name):
    register(tracking_uri, run_id, str(folder))
    model = resolve("models:/raydetr/1", tracking_uri)
    assert local_folder(model) == model.folder
    change(Path(model.folder, name))
    for load in (lambda: resolve("models:/raydetr@challenger", tracking_uri), lambda: local_folder(model)):
        with pytest.raises(
            RegistryError, match=r"models:/raydetr/1: the files in .* are not those of this model"
        ):
            load()
    assert files_digest(tracking_uri, "raydetr", 1) != model.digest
    change(Path(model.folder, name))
    assert resolve("models:/raydetr/1", tracking_uri) == model


def test_another_model_at_the_same_path_is_an_error(folder, tmp_path):
    """As on a machine that has another folder at that path."""
    shutil.copytree(folder, tmp_path / "model")
    model = resolve(str(tmp_path / "model"), "")
    assert local_folder(model) == model.folder
    shutil.rmtree(tmp_path / "model")
    save_tiny_detr(tmp_path / "model", NAMES, seed=1)
    with pytest.raises(RegistryError, match="are not those of this model"):
        local_folder(model)


def test_unchanged_files_are_hashed_once(tracking_uri, run_id, folder, monkeypatch):
    register(tracking_uri, run_id, str(folder))
    resolve("models:/raydetr/1", tracking_uri)
    read = []
    monkeypatch.setattr(models, "folder_digest", lambda folder: read.append(folder) or folder_digest(folder))
    model = resolve("models:/raydetr/1", tracking_uri)
    local_folder(model)
    assert read == []
    Path(model.folder, "config.json").touch()
    local_folder(model)
    assert len(read) == 1


@pytest.mark.parametrize(
    ("name", "alias"),
    [("a/b", "x"), ("a:b", "x"), ("a@b", "x"), ("it's", "x"), ("..", "x"), (" ", "x"), ("n" * 300, "x")]
    + [("n", alias) for alias in ("", "latest", "v3", "a b", "a/b", "x" * 300)],
)
def test_an_invalid_name_or_alias_is_an_error_before_anything_is_written(
    tracking_uri, run_id, folder, name, alias
):
    with pytest.raises(ConfigError, match=r"--(name|alias)"):
        register(tracking_uri, run_id, str(folder), name, alias)
    assert client(tracking_uri).search_registered_models() == []
    assert client(tracking_uri).search_logged_models(["0", "1"]) == []


@pytest.mark.slow
def test_a_model_on_storage_is_downloaded_and_downloaded_again_after_a_change(
    s3, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address = s3.uri("models/tiny")
    storage.upload_folder(str(folder), address)
    model = resolve(address, "")
    assert (model.model_uri, model.digest) == (address, folder_digest(str(folder)))
    assert DetrForObjectDetection.from_pretrained(model.folder).config.num_labels == 3
    other = save_tiny_detr(tmp_path / "other", NAMES, seed=5)
    storage.upload_folder(str(other), address)
    assert resolve(address, "").digest == folder_digest(str(other)) != model.digest
    assert folder_digest(model.folder) == model.digest, "an earlier resolution keeps its files"
    change(Path(model.folder, "model.safetensors"))
    storage.upload_folder(str(folder), address)
    assert resolve(address, "") == model, "a cached copy that is damaged is downloaded again"
    assert folder_digest(model.folder) == model.digest
    assert not [file for file in Path(model.folder).parent.iterdir() if "partial" in file.name]
    with pytest.raises(RegistryError, match="not a folder with config"):
        resolve(s3.uri("models/nothing"), "")


def test_a_hub_model_is_read_from_the_hub_cache_and_a_missing_one_is_an_error_that_names_it(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = tmp_path / "models--someone--detr"
    shutil.copytree(folder, cache / "snapshots/0123abcd")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0123abcd")
    model = resolve("hub:someone/detr", "")
    assert (model.model_uri, model.digest) == ("hub:someone/detr", folder_digest(str(folder)))
    with pytest.raises(RegistryError, match="hub:someone/else"):
        resolve("hub:someone/else", "")
