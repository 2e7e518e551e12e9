import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raydetr import storage
from raydetr.config import EvaluateConfig
from raydetr.errors import ConfigError, RegistryError
from raydetr.evaluation.evaluate import evaluate
from raydetr.registry.models import register, resolve
from raydetr.registry.tracking import client, metric_history, start_run
from tests.awkward import write_awkward
from tests.call_concurrently import call_concurrently
from tests.empty_registry import empty_registry
from tests.raydetr.promotion.unchecked_move import move_alias_unchecked
from tests.tiny_detr import save_tiny_detr
from tests.to_coco import to_coco_ground_truth

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


def test_a_version_is_scored_once_and_can_then_be_promoted(ray_local, pipeline, tmp_path):
    uri = empty_registry(tmp_path / "runs")
    model = save_tiny_detr(tmp_path / "tiny", ["ant", "bee", "cat"], edge=64)
    register(uri, start_run(uri, "training", "run", {}, {}), str(model))
    manifest = write_awkward(tmp_path / "shards", shards=(17, 6))
    with pytest.raises(RegistryError, match="has no evaluation"):
        move_alias_unchecked(uri, "models:/raydetr@challenger", "champion")

    first = pipeline("evaluate", "--data", "shards", "--actors", "2", "--json", "first.json", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "actors = 2" in first.stdout
    assert "AP50" in first.stdout
    summary = json.loads((tmp_path / "first.json").read_text())
    assert summary["model"] == "models:/raydetr/1"
    assert summary["images"] == 23
    assert 0 < summary["padding_share"] < 1
    assert summary["undecodable"] == 2
    assert len(summary["figures"]) == 12
    assert summary["output"] == str(tmp_path / f"runs/evaluations/raydetr-1-{manifest.digest[:12]}")
    assert Path(summary["predictions"]).is_file()
    assert metric_history(uri, summary["run_id"], "AP") == [(0, summary["AP"])]

    second = pipeline(
        "evaluate", "--data", "shards", "--batch-size", "1", "--json", "second.json", cwd=tmp_path
    )
    assert second.returncode == 0, second.stderr
    assert "already scored" in second.stdout
    repeated = json.loads((tmp_path / "second.json").read_text())
    assert repeated == {**summary, "already_scored": True}
    page = Path(summary["report"]).read_text()
    assert "raydetr" in page
    assert "</html>" in page
    assert storage.read_json(summary["output"] + "/analysis.json")["images"] == 23

    runs = client(uri).search_runs([client(uri).get_experiment_by_name("evaluation").experiment_id])
    assert len(runs) == 1

    flags = ["--data", "shards", "--min-metric", "0.99", "--coco-json", "--json", "third.json"]
    third = pipeline("evaluate", *flags, cwd=tmp_path)
    assert third.returncode == 4
    assert "is below 0.99" in third.stderr
    assert json.loads((tmp_path / "third.json").read_text()) == repeated
    tags = client(uri).get_model_version("raydetr", "1").tags
    assert "is below 0.99" in tags[f"below.{manifest.digest[:12]}"]
    results = json.loads((Path(summary["output"]) / "results.json").read_text())
    ground_truth = COCO()
    ground_truth.dataset = to_coco_ground_truth(manifest)
    ground_truth.createIndex()
    reference = COCOeval(ground_truth, ground_truth.loadRes(results), "bbox")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    np.testing.assert_allclose(list(summary["figures"].values()), reference.stats, atol=1e-12)

    move_alias_unchecked(uri, "models:/raydetr@challenger", "champion")
    assert resolve("models:/raydetr@champion", uri).version == 1


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"model": "models:/raydetr@unknown"}, RegistryError, "no registered model 'raydetr'"),
        ({"model": "nowhere"}, RegistryError, "nowhere: no such folder"),
        ({"tracking_uri": "mlruns"}, ConfigError, "databases only"),
        ({"actors": 0}, ConfigError, "--actors is 0"),
    ],
)
def test_invalid_flags_are_clear_errors(tmp_path, monkeypatch, flags, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        evaluate(EvaluateConfig(**flags))


def test_the_command_reports_an_error_with_its_message_and_status_2(pipeline, tmp_path):
    done = pipeline("evaluate", "--model", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere: no such folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.nightly)])
def test_one_of_two_concurrent_evaluations_scores_and_the_other_reads_its_result(ray_local, tmp_path, rounds):
    model = str(save_tiny_detr(tmp_path / "tiny", ["ant", "bee", "cat"], edge=64))
    data = write_awkward(tmp_path / "shards", shards=(6,)).root
    for number in range(rounds):
        uri = empty_registry(tmp_path / f"runs-{number}")
        output = tmp_path / f"out-{number}"
        config = EvaluateConfig(
            data=data, model=model, output=str(output), tracking_uri=uri, coco_json=True, actors=1
        )
        done, refused = call_concurrently(lambda config=config: evaluate(config), 2)
        assert refused == []
        first, second = sorted(done, key=lambda summary: summary.already_scored)
        assert second == replace(first, already_scored=True)
        assert first.already_scored is False
        assert len(json.loads((output / "results.json").read_text())) == 12 * (6 - first.undecodable)
        runs = client(uri).search_runs([client(uri).get_experiment_by_name("evaluation").experiment_id])
        assert len(runs) == 1
