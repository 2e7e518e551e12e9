import dataclasses
import json

import pytest

from raydetr.evaluation.record import EXPERIMENT, find, keep
from raydetr.evaluation.score import Score
from raydetr.registry.models import register, resolve
from raydetr.registry.promote import evaluations, promote
from raydetr.registry.tracking import client, metric_history, resolve_uri, start_run

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

SCORE = Score({"AP": 0.25, "AP_large": -1.0}, 61, {1021: "cut short"})


@pytest.fixture
def version(model, tmp_path):
    uri = resolve_uri(f"sqlite:///{tmp_path}/mlflow.db")
    register(uri, start_run(uri, "training", "run", {}, {}), model.folder)
    return resolve("models:/raydetr@challenger", uri)


def test_the_record_of_a_version_is_kept_in_three_places_and_lets_it_be_promoted(version, manifest, tmp_path):
    output = str(tmp_path / "out")
    assert find(version, manifest, output) is None
    record = keep(version.uri, version, manifest, SCORE, "p.parquet", output)
    assert record["figures"] == SCORE.figures
    assert record["undecodable"] == {"1021": "cut short"}

    assert json.loads((tmp_path / "out/metrics.json").read_text()) == record
    assert evaluations(version) == {manifest.digest: record}
    run = client(version.uri).get_run(record["run_id"])
    assert run.info.status == "FINISHED"
    assert client(version.uri).get_experiment(run.info.experiment_id).name == EXPERIMENT
    assert run.data.params["model.address"] == "models:/raydetr/1"
    assert run.data.params["data.digest"] == manifest.digest
    assert metric_history(version.uri, record["run_id"], "AP") == [(0, 0.25)]

    assert find(version, manifest, str(tmp_path / "elsewhere")) == record
    assert promote(version.uri, "models:/raydetr@challenger", "champion").version == 1


def test_other_data_another_model_and_other_settings_have_no_record(version, manifest, tmp_path, monkeypatch):
    output = str(tmp_path / "out")
    keep(version.uri, version, manifest, SCORE, "p.parquet", output)
    assert find(version, dataclasses.replace(manifest, digest="other"), output) is None
    assert find(dataclasses.replace(version, digest="other"), manifest, output) is None
    monkeypatch.setattr("raydetr.evaluation.record.SETTINGS", {"iou_type": "segm"})
    assert find(version, manifest, output) is None


def test_a_record_that_did_not_reach_the_version_is_put_on_file_without_scoring_again(
    version, manifest, tmp_path
):
    output = str(tmp_path / "out")
    record = keep(version.uri, version, manifest, SCORE, "p.parquet", output)
    client(version.uri).delete_model_version_tag("raydetr", "1", f"evaluation.{manifest.digest}")
    assert evaluations(version) == {}
    assert find(version, manifest, output) == record
    assert evaluations(version) == {manifest.digest: record}


def test_a_folder_is_known_again_by_its_digest(version, model, manifest, tmp_path):
    output = str(tmp_path / "out")
    record = keep(version.uri, model, manifest, SCORE, "p.parquet", output)
    assert record["model"]["digest"] == model.digest
    assert find(model, manifest, output) == record
    (tmp_path / "out/metrics.json").write_text("[]")
    assert find(model, manifest, output) is None
