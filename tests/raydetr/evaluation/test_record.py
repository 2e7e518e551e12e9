"""What is kept of an evaluation, where, and that it is known again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from raydetr import storage
from raydetr.data.shards import Manifest
from raydetr.errors import ConfigError, RegistryError
from raydetr.evaluation import record as module
from raydetr.evaluation.record import EXPERIMENT, KEY_TAG, check_room, find, keep, make, tag_bound
from raydetr.promotion.records import promote
from raydetr.registry.evaluations import evaluations, put_evaluation
from raydetr.registry.models import ResolvedModel, register, resolve
from raydetr.registry.tracking import client, metric_history, start_run
from tests.empty_registry import empty_registry
from tests.tiers import rest_slow

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

SETTINGS = {"task": "detection", "precision": "float32"}
FIGURES = {"AP": 0.25, "AP_large": -1.0}
ANALYSIS = {"classes": [{"name": "ant", "AP": 0.5}, {"name": "bee <b>", "AP": -1.0}]}


@pytest.fixture
def version(model: ResolvedModel, tmp_path: Path) -> ResolvedModel:
    uri = empty_registry(tmp_path)
    register(uri, start_run(uri, "training", "run", {}, {}), model.folder)
    return resolve("models:/raydetr@challenger", uri)


def evaluated(uri: str, model: ResolvedModel, manifest: Manifest, output: Path) -> dict[str, Any]:
    """The record of an evaluation, kept."""
    predictions = str(output / "predictions.parquet")
    record = make(model, manifest, SETTINGS, FIGURES, {1021: "cut short"}, predictions, str(output))
    storage.write_bytes(predictions, b"rows")
    storage.write_json(record["analysis"], ANALYSIS)
    storage.write_bytes(record["report"], b"<html>")
    return keep(uri, model, record, ANALYSIS, str(output))


def runs(uri: str) -> list[Any]:
    experiment = client(uri).get_experiment_by_name(EXPERIMENT)
    return list(client(uri).search_runs([experiment.experiment_id]))


def test_the_record_of_a_version_is_kept_in_three_places_and_lets_it_be_promoted(version, manifest, tmp_path):
    output = tmp_path / "out"
    assert find(version, manifest, SETTINGS, str(output)) is None
    record = evaluated(version.uri, version, manifest, output)
    assert record["figures"] == FIGURES
    assert record["undecodable"] == {"1021": "cut short"}

    assert json.loads((output / "metrics.json").read_text()) == record
    assert evaluations(version) == {manifest.digest: record}
    run = client(version.uri).get_run(record["run_id"])
    assert run.info.status == "FINISHED"
    assert client(version.uri).get_experiment(run.info.experiment_id).name == EXPERIMENT
    assert run.data.params["model.address"] == "models:/raydetr/1"
    assert run.data.params["data.digest"] == manifest.digest
    assert metric_history(version.uri, record["run_id"], "AP") == [(0, 0.25)]
    assert run.data.metrics["AP/ant"] == 0.5
    assert run.data.metrics["AP/bee _x3C_b_x3E_"] == -1
    artifacts = {file.path for file in client(version.uri).list_artifacts(record["run_id"])}
    assert artifacts == {"analysis.json", "report.html"}

    assert find(version, manifest, SETTINGS, str(tmp_path / "elsewhere")) == record
    assert promote(version.uri, "models:/raydetr@challenger", "champion").version == 1


def test_classes_of_any_name_have_a_metric_each(version, manifest, tmp_path):
    names = [
        ".",
        "/",
        "car/",
        "a//b",
        "",
        "..",
        "./x",
        "a:b",
        "a?b",
        "a/b",
        "c" * 400,
        "c" * 401,
        "é",
        "\n",
        "_x2F_",
    ]
    analysis = {"classes": [{"name": name, "AP": number / 100} for number, name in enumerate(names)]}
    record = make(version, manifest, SETTINGS, FIGURES, {}, "p", str(tmp_path))
    for place in ("report", "analysis"):
        storage.write_bytes(record[place], b"{}")
    run = client(version.uri).get_run(keep(version.uri, version, record, analysis, str(tmp_path))["run_id"])
    of_classes = {key: value for key, value in run.data.metrics.items() if key.startswith("AP/")}
    assert sorted(of_classes.values()) == [number / 100 for number in range(len(names))]


def test_a_record_with_many_undecodable_images_is_cut_to_fit(version, manifest, tmp_path):
    reasons = dict.fromkeys(range(10), "x" * 200)
    record = make(
        version,
        manifest,
        SETTINGS,
        dict.fromkeys(map(str, range(60)), 0.123456789012345),
        reasons,
        "p",
        "o" * 700,
    )
    put_evaluation(version, manifest.digest, record)
    on_file = evaluations(version)[manifest.digest]
    assert 0 < len(on_file["undecodable"]) < 10
    assert {**on_file, "undecodable": {}} == {**record, "undecodable": {}}


def test_a_record_that_cannot_fit_is_refused_before_anything_is_predicted(version, manifest, model):
    check_room(version, manifest, SETTINGS, ["AP"], "o" * 500)
    check_room(model, manifest, SETTINGS, ["AP"], "o" * 5000)  # of a folder none is put on file
    with pytest.raises(ConfigError, match=r"--output ooo.*characters more than MLflow keeps in a tag"):
        check_room(version, manifest, SETTINGS, ["AP"], "o" * 1600)


def test_other_data_another_model_and_other_settings_have_no_record(version, manifest, tmp_path):
    output = str(tmp_path / "out")
    evaluated(version.uri, version, manifest, tmp_path / "out")
    assert find(version, dataclasses.replace(manifest, digest="other"), SETTINGS, output) is None
    assert find(dataclasses.replace(version, digest="other"), manifest, SETTINGS, output) is None
    assert find(version, manifest, {**SETTINGS, "precision": "bf16"}, output) is None


def test_a_record_that_did_not_reach_the_version_is_put_on_file_without_scoring_again(
    version, manifest, tmp_path
):
    record = evaluated(version.uri, version, manifest, tmp_path / "out")
    client(version.uri).delete_model_version_tag("raydetr", "1", f"evaluation.{manifest.digest}")
    assert evaluations(version) == {}
    assert find(version, manifest, SETTINGS, str(tmp_path / "out")) == record
    assert evaluations(version) == {manifest.digest: record}


@pytest.mark.parametrize(
    "before", rest_slow(["log_metrics", "log_artifacts", "end_run", "put_evaluation"], fast=2)
)
def test_an_evaluation_that_ends_anywhere_while_it_is_kept_leaves_one_run(
    version, manifest, tmp_path, monkeypatch, before
):
    with monkeypatch.context() as patched:

        def gone(*arguments: Any) -> None:
            raise RegistryError("away")

        patched.setattr(module, before, gone)
        with pytest.raises(RegistryError, match="away"):
            evaluated(version.uri, version, manifest, tmp_path / "out")
    record = evaluated(version.uri, version, manifest, tmp_path / "out")
    (run,) = runs(version.uri)
    assert (run.info.run_id, run.info.status) == (record["run_id"], "FINISHED")
    assert run.data.tags[KEY_TAG] == record["key"]
    assert len(client(version.uri).get_metric_history(record["run_id"], "AP")) == 1
    assert evaluations(version) == {manifest.digest: record}


def test_an_evaluation_that_ends_right_after_it_began_its_run_goes_on_with_it(
    version, manifest, tmp_path, monkeypatch
):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with monkeypatch.context() as patched:

        def gone(*arguments: Any, **rest: Any) -> None:
            raise MlflowException("away")

        patched.setattr(MlflowClient, "log_batch", gone)
        with pytest.raises(RegistryError, match="away"):
            evaluated(version.uri, version, manifest, tmp_path / "out")
    record = evaluated(version.uri, version, manifest, tmp_path / "out")
    (run,) = runs(version.uri)
    assert (run.info.run_id, run.info.status) == (record["run_id"], "FINISHED")
    assert run.data.params["model.address"] == "models:/raydetr/1"


@pytest.mark.parametrize("name", rest_slow(["report.html", "predictions.parquet"]))
def test_what_a_record_refers_to_must_be_there(version, manifest, tmp_path, name):
    evaluated(version.uri, version, manifest, tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    assert find(version, manifest, SETTINGS, str(tmp_path / "out")) is None


def test_a_folder_is_known_again_by_its_digest(version, model, manifest, tmp_path):
    output = str(tmp_path / "out")
    record = evaluated(version.uri, model, manifest, tmp_path / "out")
    assert record["model"]["digest"] == model.digest
    assert find(model, manifest, SETTINGS, output) == record
    (tmp_path / "out/metrics.json").write_text("[]")
    assert find(model, manifest, SETTINGS, output) is None


def test_a_figure_below_its_bound_is_tagged_on_run_and_version_until_it_is_not(version, manifest, tmp_path):
    record = evaluated(version.uri, version, manifest, tmp_path / "out")
    for found in ("AP 0.25 is below 0.3", ""):
        tag_bound(version.uri, version, record, found)
        assert client(version.uri).get_run(record["run_id"]).data.tags["below"] == found
        tags = client(version.uri).get_model_version("raydetr", "1").tags
        assert tags[f"below.{manifest.digest[:12]}"] == found
