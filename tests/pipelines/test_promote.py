"""Promotions from the command to the alias on SQLite, with comparisons computed from stored predictions."""

import json
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.promote import main
from raydetr.config import PromoteConfig
from raydetr.data.shards import Manifest
from raydetr.errors import ConfigError, PromotionRefused, RegistryError
from raydetr.promotion import promote
from raydetr.registry.models import register
from raydetr.registry.tracking import client, start_run
from tests.awkward import write_awkward
from tests.empty_registry import empty_registry
from tests.pipelines.promotions import champion, put, refused, tags
from tests.raydetr.promotion.judged import guesses, put_on_file
from tests.tiny_detr import save_tiny_detr

BLUR = 0.12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_awkward(tmp_path_factory.mktemp("shards"), shards=(50, 31))


def test_a_better_version_becomes_champion_with_page_and_reason_on_both_versions(
    config, data, tmp_path, capsys
):
    put(config, tmp_path, 1, data, guesses(data, BLUR))
    put(config, tmp_path, 2, data, guesses(data, BLUR / 2))
    page = tmp_path / "page.html"
    summary = main(replace(config, report=str(page), reason="night images"))
    assert champion(config) == 2
    printed = capsys.readouterr().out
    assert "raydetr@champion moved from version 1 to version 2: AP 0." in printed
    assert "ok    AP is better beyond chance: 95 % of resamples between" in printed
    assert summary["reason"].endswith("(night images)")
    assert summary["figures"]["AP"]["delta"] > 0.05
    assert (summary["from_version"], summary["version"], summary["data_digest"]) == (1, 2, data.digest)
    for version in (1, 2):
        decision = tags(config, version)["promotion.champion.0001"]
        assert decision["promoted"]
        assert decision["reason"] == summary["reason"]
        assert decision["page"] == summary["page"]
        assert decision["rules"] == summary["rules"]
        assert (decision["old"], decision["new"], decision["data"]) == (1, 2, data.digest)
        assert "@" in decision["by"]
    mlflow = client(config.tracking_uri)
    artifact = mlflow.download_artifacts(summary["run_id"], "comparison.html")
    assert Path(artifact).read_bytes() == page.read_bytes()
    assert "night images" in page.read_text()
    run = mlflow.get_run(summary["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["promoted"] == "True"
    print("\nREASON", summary["reason"])


@pytest.mark.slow
def test_an_equal_version_is_refused(config, data, tmp_path):
    for version in (1, 2):
        put(config, tmp_path, version, data, guesses(data, BLUR))
    reason = refused(config)
    assert "AP is better: +0.0000" in reason
    assert "beyond chance" not in reason


@pytest.mark.slow
def test_a_slightly_worse_version_passes_only_with_a_margin_and_a_tolerance(config, data, tmp_path):
    put(config, tmp_path, 1, data, guesses(data, BLUR))
    put(config, tmp_path, 2, data, guesses(data, BLUR * 1.02))
    assert "AP is better: -0.0" in refused(config)
    assert main(replace(config, margin=-0.05, tolerance=0.1))["promoted"]
    assert champion(config) == 2


def test_a_version_with_a_much_worse_class_is_refused_with_its_name(config, data, tmp_path):
    put(config, tmp_path, 1, data, guesses(data, BLUR))
    put(config, tmp_path, 2, data, guesses(data, {"ant": 0.01, "bee": 0.3, "cat": 0.01}))
    reason = refused(config)
    assert reason.startswith("no class is much worse: bee -0.")
    assert "AP is better" not in reason
    assert main(replace(config, max_class_drop=1.0))["promoted"]


def test_evaluations_on_different_data_are_refused(config, data, tmp_path):
    other = write_awkward(tmp_path / "other", shards=(20,), seed=1)
    put(config, tmp_path, 1, data, guesses(data, BLUR))
    put(config, tmp_path, 2, other, guesses(other, BLUR / 2))
    assert (
        f"both versions are evaluated on the same data: version 2 on {other.digest[:12]}; "
        f"version 1 on {data.digest[:12]}, required: evaluations on the same data"
    ) in refused(config)
    put(config, tmp_path, 2, data, guesses(data, BLUR / 2))
    put(config, tmp_path, 1, other, guesses(other, BLUR))
    with pytest.raises(ConfigError, match=f"several data sets are possible: .*{other.digest[:12]}"):
        main(config)
    assert main(replace(config, data=other.root))["data_digest"] == other.digest


def test_a_champion_with_other_classes_is_replaced_with_a_reason_and_restored_by_undo(config, data, tmp_path):
    other = write_awkward(tmp_path / "other", shards=(20,), seed=1)
    put(config, tmp_path, 1, data, guesses(data, BLUR))
    put(config, tmp_path, 2, other, guesses(other, BLUR))
    assert '--replace-champion --reason "' in refused(config)
    summary = main(replace(config, replace_champion=True, reason="counts nuts now"))
    assert (summary["promoted"], summary["from_version"], champion(config)) == (True, 1, 2)
    assert summary["rules"][0]["found"] == "version 1"
    (decision,) = (each for each in tags(config, 2).values() if each["promoted"])
    assert decision["reason"] == "version 1 is replaced (counts nuts now)"
    main(replace(config, undo=True))
    assert champion(config) == 1


def test_a_replacement_needs_its_own_evaluation(config, data, tmp_path):
    put(config, tmp_path, 1, data, guesses(data, BLUR))
    reason = refused(replace(config, replace_champion=True, reason="new classes"))
    assert reason.startswith("the challenger is evaluated: version 2 on nothing")


def test_data_that_changed_on_storage_is_refused(config, data, tmp_path):
    shards = tmp_path / "copied"
    shutil.copytree(data.root, shards)
    copied = Manifest.load(str(shards))
    for version, blur in ((1, BLUR), (2, BLUR / 2)):
        put(config, tmp_path, version, copied, guesses(copied, blur))
    shutil.rmtree(shards)
    now = write_awkward(shards, shards=(20,), seed=1)
    assert f"the evaluation data is unchanged: {now.digest} at {shards}" in refused(config)


def test_data_that_selected_the_checkpoint_is_refused_unless_allowed(config, data, tmp_path):
    put(config, tmp_path, 1, data, guesses(data, BLUR))
    put(config, tmp_path, 2, data, guesses(data, BLUR / 2))
    client(config.tracking_uri).set_model_version_tag("raydetr", "2", "chosen_on_digest", data.digest)
    reason = refused(config)
    rule = "the evaluation data was used neither to train nor to select either model"
    assert f"{rule}: {data.digest[:12]}: version 2's checkpoint was selected on it" in reason
    assert main(replace(config, allow_contaminated_eval=True))["promoted"]


def model_folder_of(config, version):
    """Copy the files of a version and point the version to the copy, because all tests share the original files."""
    mlflow = client(config.tracking_uri)
    source = mlflow.get_model_version("raydetr", str(version)).source
    copy = Path(config.json).parent / f"files-{version}"
    shutil.copytree(Path(source.removeprefix("file://")), copy)
    database = sqlite3.connect(config.tracking_uri.removeprefix("sqlite:///"))
    statement = "UPDATE model_versions SET source = :uri, storage_location = :uri WHERE version = :version"
    database.execute(statement, {"uri": copy.as_uri(), "version": version})
    database.commit()
    database.close()
    return copy


def test_a_missing_report_is_refused(config, data, tmp_path):
    put(config, tmp_path, 1, data, guesses(data, BLUR))
    record = put(config, tmp_path, 2, data, guesses(data, BLUR / 2))
    Path(record.report).unlink()
    assert f"the evaluation reports exist: missing for version 2: {record.report}" in refused(config)


def test_an_evaluation_stored_without_a_report_is_refused(config, data, tmp_path):
    put(config, tmp_path, 1, data, guesses(data, BLUR), report="")
    put(config, tmp_path, 2, data, guesses(data, BLUR / 2))
    assert "missing for version 1: its evaluation was stored without a report" in refused(config)


@pytest.mark.parametrize("changed", [1, 2])
@pytest.mark.parametrize("change", ["other weights", "no weights"])
def test_model_files_that_changed_since_registration_are_refused(config, data, tmp_path, changed, change):
    for version, blur in ((1, BLUR), (2, BLUR / 2)):
        put(config, tmp_path, version, data, guesses(data, blur))
    weights = Path(model_folder_of(config, changed), "model.safetensors")
    weights.unlink()
    if change == "other weights":
        weights.write_text("x")
    assert f"the model files are unchanged since registration: version {changed} has" in refused(config)
    assert champion(config) == 1


def test_predictions_that_do_not_reproduce_the_recorded_metrics_are_refused(config, data, tmp_path):
    put(config, tmp_path, 1, data, guesses(data, BLUR))
    record = put(config, tmp_path, 2, data, guesses(data, BLUR / 2))
    shutil.copy(tmp_path / f"evaluation-1-{data.digest[:8]}/predictions.parquet", record.predictions)
    assert "the predictions reproduce the recorded metrics: challenger's AP" in refused(config)


def test_the_second_of_two_concurrent_promotions_is_refused(config, data, tmp_path, monkeypatch):
    """Version 3 is promoted while version 2 is being compared."""
    for version, blur in ((1, BLUR), (2, BLUR / 2), (3, BLUR / 3)):
        put(config, tmp_path, version, data, guesses(data, blur))
    compare = promote.compare

    def promote_version_3_first(*arguments):
        monkeypatch.setattr(promote, "compare", compare)
        assert main(replace(config, model="models:/raydetr/3"))["promoted"]
        return compare(*arguments)

    monkeypatch.setattr(promote, "compare", promote_version_3_first)
    with pytest.raises(PromotionRefused) as error:
        main(config)
    reason = error.value.summary["reason"]
    print("\nREASON", reason)
    assert reason.startswith("no concurrent promotion: version 3 since ")
    assert reason.endswith("required: champion still at version 1: promote again")
    assert champion(config) == 3
    (decision,) = tags(config, 2).values()
    assert not decision["promoted"]
    page = client(config.tracking_uri).download_artifacts(error.value.summary["run_id"], "comparison.html")
    assert "no concurrent promotion" in Path(page).read_text()
    with pytest.raises(PromotionRefused, match="stays at version 3: AP is better: -0"):
        main(config)


def test_a_first_version_needs_only_an_evaluation_with_its_report(config, data, tmp_path, capsys):
    client(config.tracking_uri).delete_registered_model_alias("raydetr", "champion")
    with pytest.raises(PromotionRefused, match="the challenger is evaluated: version 2 on nothing"):
        main(config)
    record = put(config, tmp_path, 2, data, guesses(data, BLUR))
    summary = main(config)
    assert (summary["from_version"], summary["reason"]) == ("none", "there was no champion")
    assert (
        "raydetr@champion moved from nothing to version 2: there was no champion" in capsys.readouterr().out
    )
    assert summary["evaluations"] == {data.digest: record.metrics}
    repeated = main(config)
    assert (repeated["moved"], repeated["reason"]) == (False, "version 2 is already the champion")


@pytest.mark.slow
def test_a_dry_run_decides_and_changes_nothing(config, data, tmp_path):
    put(config, tmp_path, 1, data, guesses(data, BLUR))
    put(config, tmp_path, 2, data, guesses(data, BLUR / 2))
    summary = main(replace(config, dry_run=True, report=str(tmp_path / "page.html")))
    assert summary["promoted"]
    assert not summary["moved"]
    assert (tmp_path / "page.html").is_file()
    with pytest.raises(PromotionRefused, match="AP is better"):
        main(replace(config, dry_run=True, margin=0.9))
    assert champion(config) == 1
    assert tags(config, 1) == tags(config, 2) == {}
    assert client(config.tracking_uri).get_experiment_by_name("promotion") is None


@pytest.mark.slow
def test_a_promotion_is_undone_with_one_command(config, data, tmp_path, capsys):
    put(config, tmp_path, 1, data, guesses(data, BLUR))
    put(config, tmp_path, 2, data, guesses(data, BLUR / 2))
    main(config)
    assert main(replace(config, undo=True, reason="it misses cats"))["version"] == 1
    assert (
        "raydetr@champion moved from version 2 to version 1: the last promotion is undone"
        in capsys.readouterr().out
    )
    assert champion(config) == 1
    assert tags(config, 2)["promotion.champion.0002"]["reason"] == "promotion 1 undone (it misses cats)"
    with pytest.raises(RegistryError, match="nothing to undo"):
        main(replace(config, undo=True))


def test_a_metric_that_the_comparison_does_not_have_is_an_error(config, data, tmp_path):
    for version in (1, 2):
        put(config, tmp_path, version, data, guesses(data, BLUR))
    with pytest.raises(ConfigError, match="--metric PQ: the comparison has AP, AP50"):
        main(replace(config, metric="PQ"))


@pytest.mark.slow
def test_latency_is_measured_for_both_versions_and_limits_the_challenger(data, tmp_path):
    uri = empty_registry(tmp_path)
    run_id = start_run(uri, "training", "run", {}, {})
    for seed in (0, 1):
        model = save_tiny_detr(tmp_path / f"tiny-{seed}", ["ant", "bee", "cat"], edge=64, seed=seed)
        register(uri, run_id, str(model))
    for version, blur in ((1, BLUR), (2, BLUR / 2)):
        put_on_file(uri, version, data, guesses(data, blur), tmp_path / str(version))
    client(uri).set_registered_model_alias("raydetr", "champion", "1")
    config = PromoteConfig(tracking_uri=uri, latency_images=8, max_latency_ms=1e-3)
    with pytest.raises(
        PromotionRefused,
        match=r"the latency is within the limit: challenger \d+\.\d ms, champion \d+\.\d ms \(95th",
    ):
        main(config)
    assert main(replace(config, max_latency_ms=1e6))["promoted"]


def test_the_exit_status_shows_the_outcome_and_the_json_has_the_decision(config, data, pipeline, tmp_path):
    put(config, tmp_path, 1, data, guesses(data, BLUR))
    put(config, tmp_path, 2, data, guesses(data, BLUR / 2))
    flags = ["--tracking-uri", config.tracking_uri, "--json", config.json, "--model", "models:/raydetr/2"]
    refusal = pipeline("promote", *flags, "--margin", "0.9", cwd=tmp_path)
    assert refusal.returncode == 3, refusal.stderr
    assert "error: raydetr@champion stays at version 1: AP is better: +0." in refusal.stderr
    assert "FAIL  AP is better" in refusal.stdout
    summary = json.loads(Path(config.json).read_text())
    assert not summary["promoted"]
    assert [rule["rule"] for rule in summary["rules"] if not rule["passed"]] == ["AP is better"]
    done = pipeline("promote", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path(config.json).read_text())["promoted"]
    assert champion(config) == 2
