"""The record of an evaluation: where it is stored, and how a rerun finds it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from raydetr import storage
from raydetr.data.shards import Manifest
from raydetr.errors import ConfigError, RegistryError
from raydetr.evaluation import record as module
from raydetr.evaluation.record import (
    EXPERIMENT,
    KEY_TAG,
    build_record,
    check_record_fits,
    find_record,
    keep,
    tag_below_minimum,
)
from raydetr.registry.evaluations import evaluations, put_evaluation
from raydetr.registry.models import ResolvedModel, register, resolve
from raydetr.registry.tracking import client, metric_history, start_run
from raydetr.results.analysis import Analysis, ClassMetrics
from raydetr.results.json_form import to_json
from raydetr.results.record import EvaluationRecord
from tests.empty_registry import empty_registry
from tests.raydetr.promotion.unchecked_move import move_alias_unchecked
from tests.tiers import rest_slow

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

SETTINGS = {"task": "detection", "precision": "float32"}
METRICS = {"AP": 0.25, "AP_large": -1.0}


def analysis_of(aps: dict[str, float]) -> Analysis:
    """Return an analysis with these classes and their AP."""
    classes = [ClassMetrics(number, name, 1, 1, {"AP": ap}) for number, (name, ap) in enumerate(aps.items())]
    return Analysis(METRICS, images=61, classes=tuple(classes))


ANALYSIS = analysis_of({"ant": 0.5, "bee <b>": -1.0})


@pytest.fixture
def version(model: ResolvedModel, tmp_path: Path) -> ResolvedModel:
    uri = empty_registry(tmp_path)
    register(uri, start_run(uri, "training", "run", {}, {}), model.folder)
    return resolve("models:/raydetr@challenger", uri)


def store_evaluation(uri: str, model: ResolvedModel, manifest: Manifest, output: Path) -> EvaluationRecord:
    """Store the record of an evaluation, and return it."""
    predictions = str(output / "predictions.parquet")
    record = build_record(model, manifest, SETTINGS, METRICS, {1021: "cut short"}, predictions, str(output))
    storage.write_bytes(predictions, b"rows")
    storage.write_json(record.analysis, to_json(ANALYSIS))
    storage.write_bytes(record.report, b"<html>")
    return keep(uri, model, record, ANALYSIS, str(output))


def runs(uri: str) -> list[Any]:
    experiment = client(uri).get_experiment_by_name(EXPERIMENT)
    return list(client(uri).search_runs([experiment.experiment_id]))


def test_the_record_of_a_version_is_stored_in_three_places_and_allows_promotion(version, manifest, tmp_path):
    output = tmp_path / "out"
    assert find_record(version, manifest, SETTINGS, str(output)) is None
    record = store_evaluation(version.tracking_uri, version, manifest, output)
    assert record.metrics == METRICS
    assert record.undecodable == {1021: "cut short"}

    assert json.loads((output / "metrics.json").read_text()) == to_json(record)
    assert evaluations(version) == {manifest.digest: record}
    run = client(version.tracking_uri).get_run(record.run_id)
    assert run.info.status == "FINISHED"
    assert client(version.tracking_uri).get_experiment(run.info.experiment_id).name == EXPERIMENT
    assert run.data.params["model.address"] == "models:/raydetr/1"
    assert run.data.params["data.digest"] == manifest.digest
    assert metric_history(version.tracking_uri, record.run_id, "AP") == [(0, 0.25)]
    assert run.data.metrics["AP/ant"] == 0.5
    assert run.data.metrics["AP/bee _x3C_b_x3E_"] == -1
    artifacts = {file.path for file in client(version.tracking_uri).list_artifacts(record.run_id)}
    assert artifacts == {"analysis.json", "report.html"}

    assert find_record(version, manifest, SETTINGS, str(tmp_path / "elsewhere")) == record
    assert move_alias_unchecked(version.tracking_uri, "models:/raydetr@challenger", "champion").version == 1


def test_each_class_has_its_own_metric_whatever_its_name(version, manifest, tmp_path):
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
    analysis = analysis_of({name: number / 100 for number, name in enumerate(names)})
    record = build_record(version, manifest, SETTINGS, METRICS, {}, "p", str(tmp_path))
    for uri in (record.report, record.analysis):
        storage.write_bytes(uri, b"{}")
    run = client(version.tracking_uri).get_run(
        keep(version.tracking_uri, version, record, analysis, str(tmp_path)).run_id
    )
    class_metrics = {key: value for key, value in run.data.metrics.items() if key.startswith("AP/")}
    assert sorted(class_metrics.values()) == [number / 100 for number in range(len(names))]


def test_a_record_with_many_undecodable_images_is_shortened_to_fit_a_tag(version, manifest, tmp_path):
    reasons = dict.fromkeys(range(10), "x" * 200)
    record = build_record(
        version,
        manifest,
        SETTINGS,
        dict.fromkeys(map(str, range(60)), 0.123456789012345),
        reasons,
        "p",
        "o" * 700,
    )
    put_evaluation(version, manifest.digest, record)
    stored = evaluations(version)[manifest.digest]
    assert 0 < len(stored.undecodable) < 10
    assert dataclasses.replace(stored, undecodable={}) == dataclasses.replace(record, undecodable={})


def test_a_record_that_cannot_fit_a_tag_is_an_error_before_prediction(version, manifest, model):
    check_record_fits(version, manifest, SETTINGS, ["AP"], "o" * 500)
    check_record_fits(model, manifest, SETTINGS, ["AP"], "o" * 5000)  # a folder has no tags
    with pytest.raises(ConfigError, match=r"--output ooo.*exceed MLflow's limit for a tag by \d+ characters"):
        check_record_fits(version, manifest, SETTINGS, ["AP"], "o" * 1600)


def test_other_data_another_model_and_other_settings_have_no_record(version, manifest, tmp_path):
    output = str(tmp_path / "out")
    store_evaluation(version.tracking_uri, version, manifest, tmp_path / "out")
    assert find_record(version, dataclasses.replace(manifest, digest="other"), SETTINGS, output) is None
    assert find_record(dataclasses.replace(version, digest="other"), manifest, SETTINGS, output) is None
    assert find_record(version, manifest, {**SETTINGS, "precision": "bf16"}, output) is None


def test_a_record_that_did_not_reach_the_version_is_completed_without_scoring_again(
    version, manifest, tmp_path
):
    record = store_evaluation(version.tracking_uri, version, manifest, tmp_path / "out")
    client(version.tracking_uri).delete_model_version_tag("raydetr", "1", f"evaluation.{manifest.digest}")
    assert evaluations(version) == {}
    assert find_record(version, manifest, SETTINGS, str(tmp_path / "out")) == record
    assert evaluations(version) == {manifest.digest: record}


@pytest.mark.parametrize(
    "before", rest_slow(["log_metrics", "log_artifacts", "end_run", "put_evaluation"], fast=2)
)
def test_an_evaluation_that_is_interrupted_while_its_record_is_stored_leaves_one_run(
    version, manifest, tmp_path, monkeypatch, before
):
    with monkeypatch.context() as patched:

        def fail(*arguments: Any) -> None:
            raise RegistryError("unavailable")

        patched.setattr(module, before, fail)
        with pytest.raises(RegistryError, match="unavailable"):
            store_evaluation(version.tracking_uri, version, manifest, tmp_path / "out")
    record = store_evaluation(version.tracking_uri, version, manifest, tmp_path / "out")
    (run,) = runs(version.tracking_uri)
    assert (run.info.run_id, run.info.status) == (record.run_id, "FINISHED")
    assert run.data.tags[KEY_TAG] == record.key
    assert len(client(version.tracking_uri).get_metric_history(record.run_id, "AP")) == 1
    assert evaluations(version) == {manifest.digest: record}


def test_an_evaluation_that_is_interrupted_right_after_its_run_started_resumes_that_run(
    version, manifest, tmp_path, monkeypatch
):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    with monkeypatch.context() as patched:

        def fail(*arguments: Any, **rest: Any) -> None:
            raise MlflowException("unavailable")

        patched.setattr(MlflowClient, "log_batch", fail)
        with pytest.raises(RegistryError, match="unavailable"):
            store_evaluation(version.tracking_uri, version, manifest, tmp_path / "out")
    record = store_evaluation(version.tracking_uri, version, manifest, tmp_path / "out")
    (run,) = runs(version.tracking_uri)
    assert (run.info.run_id, run.info.status) == (record.run_id, "FINISHED")
    assert run.data.params["model.address"] == "models:/raydetr/1"


@pytest.mark.parametrize("name", rest_slow(["report.html", "predictions.parquet"]))
def test_a_record_without_its_report_or_predictions_is_not_used(version, manifest, tmp_path, name):
    store_evaluation(version.tracking_uri, version, manifest, tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    assert find_record(version, manifest, SETTINGS, str(tmp_path / "out")) is None


def test_the_record_of_a_model_folder_is_found_by_its_digest(version, model, manifest, tmp_path):
    output = str(tmp_path / "out")
    record = store_evaluation(version.tracking_uri, model, manifest, tmp_path / "out")
    assert record.model.digest == model.digest
    assert find_record(model, manifest, SETTINGS, output) == record
    (tmp_path / "out/metrics.json").write_text("[]")
    assert find_record(model, manifest, SETTINGS, output) is None


def test_a_metric_below_its_minimum_is_tagged_on_run_and_version_until_it_recovers(
    version, manifest, tmp_path
):
    record = store_evaluation(version.tracking_uri, version, manifest, tmp_path / "out")
    for problem in ("AP 0.25 is below 0.3", ""):
        tag_below_minimum(version.tracking_uri, version, record, problem)
        assert client(version.tracking_uri).get_run(record.run_id).data.tags["below"] == problem
        tags = client(version.tracking_uri).get_model_version("raydetr", "1").tags
        assert tags[f"below.{manifest.digest[:12]}"] == problem
