"""What is kept of an evaluation, where, and that it is known again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from raydetr import storage
from raydetr.data.shards import Manifest
from raydetr.errors import RegistryError
from raydetr.evaluation import record as module
from raydetr.evaluation.record import EXPERIMENT, KEY_TAG, find, keep, make, tag_bound
from raydetr.registry.models import ResolvedModel, register, resolve
from raydetr.registry.promote import evaluations, promote
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
    assert run.data.metrics["AP/bee _b_"] == -1
    artifacts = {file.path for file in client(version.uri).list_artifacts(record["run_id"])}
    assert artifacts == {"analysis.json", "report.html"}

    assert find(version, manifest, SETTINGS, str(tmp_path / "elsewhere")) == record
    assert promote(version.uri, "models:/raydetr@challenger", "champion").version == 1


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
