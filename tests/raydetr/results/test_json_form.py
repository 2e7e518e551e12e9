"""The JSON form of results: stored files can be read, and what is written has their keys and values."""

import copy
import json

import pytest

from raydetr.promotion.ledger import Entry, to_tag
from raydetr.results.analysis import Analysis, CalibrationBin
from raydetr.results.decision import DecisionRecord, Rule
from raydetr.results.json_form import from_json, to_json
from raydetr.results.record import EvaluatedModel, EvaluationData, EvaluationRecord
from raydetr.results.summary import TrainingSummary

RECORD = """{
  "analysis": "/runs/evaluations/raydetr-1-9f1c/analysis.json",
  "data": {"address": "/data/val", "digest": "9f1c27ab"},
  "figures": {"AP": 0.25, "AP50": 0.5, "AP_large": -1.0},
  "images": 23,
  "key": "0123456789abcdef0123456789abcdef",
  "model": {"address": "models:/raydetr/1", "digest": "5d41402a", "name": "raydetr", "version": 1},
  "num_undecodable": 2,
  "padding_share": 0.125,
  "predictions": "/runs/evaluations/raydetr-1-9f1c/predictions.parquet",
  "report": "/runs/evaluations/raydetr-1-9f1c/report.html",
  "run_id": "fedcba9876543210fedcba9876543210",
  "schema_version": 2,
  "settings": {
    "engine": "torch", "max_detections": 100, "precision": "float32", "segment_threshold": 0.5, "task": "detection"
  },
  "undecodable": {"1021": "cut short", "1035": "the record has no image bytes"}
}"""
"""A metrics.json of raydetr 0.2.0, which is also the value of the version's tag."""
OF_A_FOLDER = {"address": "/models/last", "digest": "5d41402a", "name": None, "version": None}
ANALYSIS = """{
  "calibration": {
    "bins": [{"accuracy": 0.5, "confidence": 0.75, "count": 4, "high": 0.8, "low": 0.7}], "ece": 0.25, "mce": 0.25
  },
  "classes": [
    {
      "AP": 0.25, "AP50": 0.5, "AP75": 0.25, "AP_large": -1.0, "AP_medium": 0.25, "AP_small": 0.0, "AR_100": 0.5,
      "PQ": 0.125, "RQ": 0.25, "SQ": 0.5, "best_f1": 0.5, "best_threshold": 0.75, "id": 3, "images": 2, "isthing": false,
      "mask_AP": 0.125, "mask_AP50": 0.25, "name": "ant", "objects": 5
    }
  ],
  "confidence": 0.95,
  "confusion": {"counts": [[3, 2], [1, 0]], "iou": 0.5, "min_score": 0.3, "names": ["ant", "background"]},
  "curves": {
    "all": {"0.50": [1.0, 0.5], "0.75": [0.5, 0.0], "mean": [0.75, 0.25]},
    "classes": {"3": [1.0, 0.5]},
    "recall": [0.0, 1.0]
  },
  "duplicates": 0.125,
  "errors": {"AP50": 0.5, "cost": {"missed": 0.25}, "counts": {"missed": 2}, "min_score": 0.3},
  "figures": {"AP": 0.25, "PQ": 0.125, "mask_AP": 0.125},
  "images": 23,
  "intervals": {"AP": [0.125, 0.375], "PQ": [-1.0, -1.0]},
  "resamples": 1000,
  "slices": {"shorter side": [{"AP": 0.25, "AP50": 0.5, "images": 23, "name": "under 256", "objects": 5}]},
  "undecodable": 2,
  "worst": {"background": [], "missed": [1000, 1021]}
}"""
"""An analysis.json of raydetr 0.2.0, shortened."""
DECISION = (
    '{"alias": "champion", "old": null, "new": 2, "data": "", "at": "2026-11-25T10:00:00Z", "by": "me@host", "page": null, '
    '"promoted": false, "rules": [{"rule": "the challenger is evaluated", "passed": false, "found": "version 2 on nothing", '
    '"limit": "an evaluation"}], "reason": "the challenger is evaluated: version 2 on nothing"}'
)
"""The tag `decision` of a run of raydetr 0.2.0, copied to the versions."""
ENTRY = '{"kind": "promotion", "previous": null, "version": 1, "run_id": "fedcba98", "at": "2026-11-25T10:00:00Z"}'
"""A parameter of the ledger of raydetr 0.2.0."""
TRAINING = """{
  "data_digest": "9f1c27ab", "first_loss": 5.5, "images": 640, "images_per_second": 12.5, "last_loss": null,
  "model": "models:/raydetr/1", "model_folder": "/runs/a/model", "model_step": 20, "model_version": 1, "non_finite": 1,
  "run_id": "fedcba98", "seconds": 64.0, "skipped_images": 2, "steps": 40, "val_AP": 0.25, "val_AP50": 0.5
}"""
"""A summary.json of a training run of raydetr 0.2.0."""


@pytest.mark.parametrize("model", [json.loads(RECORD)["model"], OF_A_FOLDER])
def test_a_stored_record_is_read_and_written_unchanged(model):
    stored = {**json.loads(RECORD), "model": model}
    record = from_json(EvaluationRecord, stored)
    assert json.dumps(to_json(record), sort_keys=True) == json.dumps(stored, sort_keys=True)
    assert record.metrics == {"AP": 0.25, "AP50": 0.5, "AP_large": -1}
    assert record.model == EvaluatedModel(model["name"], model["version"], model["address"], model["digest"])
    assert record.data == EvaluationData("/data/val", "9f1c27ab")
    assert record.undecodable[1035] == "the record has no image bytes"


def test_a_stored_analysis_is_read_and_written_unchanged():
    stored = json.loads(ANALYSIS)
    analysis = from_json(Analysis, stored)
    assert json.dumps(to_json(analysis), sort_keys=True) == json.dumps(stored, sort_keys=True)
    (ant,) = analysis.classes
    assert (ant.id, ant.name, ant.isthing, ant.metrics["AP_small"]) == (3, "ant", False, 0)
    assert "best_f1" not in ant.metrics
    assert analysis.intervals["AP"] == (0.125, 0.375)
    assert analysis.curves.overall["mean"] == (0.75, 0.25)
    assert analysis.curves.classes == {3: (1, 0.5)}
    assert analysis.confusion.counts == ((3, 2), (1, 0))
    assert analysis.calibration.bins == (CalibrationBin(0.7, 0.8, 0.75, 0.5, 4),)
    assert analysis.errors.costs == {"missed": 0.25}
    assert analysis.slices["shorter side"][0].ap50 == 0.5
    assert analysis.worst["missed"] == (1000, 1021)


def test_a_stored_decision_is_read_and_written_unchanged():
    record = from_json(DecisionRecord, json.loads(DECISION))
    assert to_tag(record) == DECISION
    assert (record.old, record.new, record.page) == (None, 2, None)
    assert record.decision.rules == (
        Rule("the challenger is evaluated", False, "version 2 on nothing", "an evaluation"),
    )


def test_a_stored_move_of_an_alias_is_read_and_written_unchanged():
    stored = {"number": 1, **json.loads(ENTRY)}
    entry = from_json(Entry, {**stored, "later": ""})
    assert entry == Entry(1, "promotion", None, 1, "fedcba98", "2026-11-25T10:00:00Z")
    assert json.dumps(to_json(entry)) == json.dumps(stored)


def test_a_stored_summary_of_a_training_run_is_read_and_written_unchanged():
    stored = json.loads(TRAINING)
    summary = from_json(TrainingSummary, stored)
    assert json.dumps(to_json(summary), sort_keys=True) == json.dumps(stored, sort_keys=True)
    assert summary.validation == {"val_AP": 0.25, "val_AP50": 0.5}
    assert summary.last_loss is None
    unregistered = {key: value for key, value in stored.items() if not key.startswith(("model_v", "val_"))}
    del unregistered["model"]
    assert to_json(from_json(TrainingSummary, unregistered)) == unregistered


def test_fields_of_later_versions_are_ignored_and_absent_ones_have_their_defaults():
    stored = json.loads(RECORD)
    later = copy.deepcopy(stored) | {"later": [1], "date": None}
    later["model"]["later"] = {}
    assert from_json(EvaluationRecord, later) == from_json(EvaluationRecord, stored)
    record = from_json(EvaluationRecord, {"figures": {"AP": 0.5}})
    assert record == EvaluationRecord({"AP": 0.5})
    assert (record.report, record.run_id, record.model.version) == ("", None, None)


@pytest.mark.parametrize("content", [[], "text", None, {"figures": [0.5]}, {"model": "models:/raydetr/1"}])
def test_a_file_of_another_structure_is_an_error(content):
    with pytest.raises(ValueError, match="not the JSON form of"):
        from_json(EvaluationRecord, content)


@pytest.mark.parametrize("interval", [[0.1], [0.1, 0.2, 0.3], 0.1, {"low": 0.1, "high": 0.2}])
def test_an_interval_has_two_ends(interval):
    with pytest.raises(ValueError):
        from_json(Analysis, {"figures": {}, "images": 0, "intervals": {"AP": interval}})


def test_a_key_that_has_no_default_must_be_present():
    with pytest.raises(ValueError, match="Analysis: 'images' is absent"):
        from_json(Analysis, {"figures": {}})
