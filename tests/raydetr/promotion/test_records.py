"""Evaluations of versions as tags, and alias moves that require them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from raydetr.errors import RegistryError
from raydetr.registry.evaluations import evaluations, put_evaluation
from raydetr.registry.models import register, resolve
from raydetr.registry.tracking import client, start_run
from raydetr.results.json_form import to_json
from raydetr.results.record import EvaluationRecord
from tests.raydetr.promotion.unchecked_move import move_alias_unchecked
from tests.tiny_detr import save_tiny_detr

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

RECORD = EvaluationRecord(metrics={"AP": 0.5}, images=3)


@pytest.fixture
def two_versions(tracking_uri, tmp_path) -> str:
    run_id = start_run(tracking_uri, "training", "run", {}, {})
    for seed in (0, 1):
        register(tracking_uri, run_id, str(save_tiny_detr(tmp_path / str(seed), ["disc"], seed=seed)))
    return tracking_uri


def test_a_version_without_an_evaluation_is_refused_and_the_alias_does_not_move(two_versions):
    with pytest.raises(RegistryError, match=r"version 2 has no evaluation"):
        move_alias_unchecked(two_versions, "models:/raydetr@challenger", "champion")
    assert "champion" not in client(two_versions).get_registered_model("raydetr").aliases


def test_a_promotion_returns_the_previous_and_the_new_version(two_versions):
    for version in (1, 2):
        put_evaluation(resolve(f"models:/raydetr/{version}", two_versions), "d1", RECORD)
    first = move_alias_unchecked(two_versions, "models:/raydetr/1", "champion")
    assert (first.previous, first.version) == (None, 1)
    second = move_alias_unchecked(two_versions, "models:/raydetr@challenger", "champion")
    assert (second.previous, second.version) == (1, 2)
    assert second.evaluations == {"d1": RECORD}
    assert resolve("models:/raydetr@champion", two_versions).version == 2


def test_a_version_has_one_evaluation_per_data_set(two_versions, tmp_path):
    model = resolve("models:/raydetr/1", two_versions)
    put_evaluation(model, "d1", RECORD)
    put_evaluation(model, "d2", replace(RECORD, images=4))
    put_evaluation(model, "d2", replace(RECORD, images=5))
    assert {digest: record.images for digest, record in evaluations(model).items()} == {"d1": 3, "d2": 5}
    assert evaluations(resolve("models:/raydetr/2", two_versions)) == {}
    assert evaluations(resolve(str(tmp_path / "0"), "")) == {}


def test_a_record_that_is_too_long_for_a_tag_is_an_error_that_names_its_longest_field(two_versions):
    model = resolve("models:/raydetr/1", two_versions)
    record = replace(RECORD, settings={str(i): "cut short" for i in range(400)})
    with pytest.raises(RegistryError, match=r"on d1 has \d+ characters as JSON.* 5000 .*shorten 'settings'"):
        put_evaluation(model, "d1", record)
    assert evaluations(model) == {}
    length = 5000 - len(json.dumps(to_json(replace(RECORD, settings={"": ""}))))
    fits = replace(RECORD, settings={"": "x" * length})
    with pytest.raises(RegistryError, match="5001 characters"):
        put_evaluation(model, "d1", replace(RECORD, settings={"": "x" * (length + 1)}))
    put_evaluation(model, "d1", fits)
    assert evaluations(model) == {"d1": fits}


def test_the_report_is_copied_to_the_version_and_its_uri_is_a_tag(two_versions, tmp_path):
    page = tmp_path / "output" / "report.html"
    page.parent.mkdir()
    page.write_text("<p>metrics</p>")
    digest = "0123456789abcdef" * 4
    model = resolve("models:/raydetr/1", two_versions)
    put_evaluation(model, digest, replace(RECORD, report=str(page)))
    page.unlink()
    version = client(two_versions).get_model_version("raydetr", "1")
    assert version.tags["report.0123456789ab"] == str(page)
    directory = Path(resolve("models:/raydetr/1", two_versions).folder).parents[1]
    assert (directory / "reports" / "0123456789ab.html").read_text() == "<p>metrics</p>"
    put_evaluation(model, "d2", replace(RECORD, report=str(tmp_path / "nowhere.html")))
    assert set(evaluations(model)) == {digest, "d2"}, "a missing report is only an error of the gate"


def test_a_folder_cannot_be_promoted(two_versions, tmp_path):
    with pytest.raises(RegistryError, match="only a registered version has aliases"):
        move_alias_unchecked(two_versions, str(tmp_path / "0"), "champion")
