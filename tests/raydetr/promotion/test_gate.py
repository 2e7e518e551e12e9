"""The rules of the gate: from facts to a decision and its reason."""

from dataclasses import replace

import pytest

from raydetr.config import PromoteConfig
from raydetr.errors import ConfigError
from raydetr.promotion.gate import (
    Candidate,
    check_comparison,
    check_data,
    check_latency,
    check_prerequisites,
    check_replacement,
    check_unmoved,
    choose_evaluation_data,
    decide,
    describe,
)
from raydetr.results.comparison import Change, ClassChange, Comparison
from raydetr.results.decision import Decision
from raydetr.results.record import EvaluatedModel, EvaluationData, EvaluationRecord

DATA, OTHER = "a" * 64, "b" * 64
CONFIG = PromoteConfig()


def record(model: str, data: str = DATA) -> EvaluationRecord:
    return EvaluationRecord(
        schema_version=2,
        model=EvaluatedModel("raydetr", None, digest=model),
        data=EvaluationData(f"shards/{data[:4]}", data),
        settings={"max_detections": 100},
        images=50,
        report="page.html",
    )


CHAMPION = Candidate("raydetr", 1, "old", {DATA: record("old")})
CHALLENGER = Candidate("raydetr", 2, "new", {DATA: record("new")})


def comparison(
    old: float, new: float, low: float, high: float, classes: list[ClassChange] | None = None
) -> Comparison:
    change = Change(old, new, new - old, low, high, 0.5)
    ant = ClassChange(3, "ant", 40, change)
    return Comparison(
        metrics={"AP": change, "AP_small": replace(change, old=-1.0, new=-1.0, delta=0.0)},
        classes={"AP": (ant,) if classes is None else tuple(classes)},
        images=50,
        resamples=1000,
        confidence=0.95,
    )


def class_change(name: str, delta: float, low: float, high: float, objects: int = 40) -> ClassChange:
    return ClassChange(1, name, objects, Change(0.5, 0.5 + delta, delta, low, high))


def decision(config: PromoteConfig, found: Comparison) -> Decision:
    return decide(check_comparison(config, found), describe(config, found), config.reason)


def prerequisites(
    config: PromoteConfig = CONFIG,
    challenger: Candidate = CHALLENGER,
    champion: Candidate | None = CHAMPION,
    missing: dict[int, str] | None = None,
) -> Decision:
    digest = choose_evaluation_data(challenger, champion, config.data)
    return decide(check_prerequisites(config, challenger, champion, digest, missing or {}), "all met")


def test_a_better_version_is_promoted_with_metric_and_interval_as_the_reason():
    found = decision(replace(CONFIG, reason="requested by the lab"), comparison(0.40, 0.43, 0.01, 0.05))
    assert found.promoted
    assert found.reason == (
        "AP 0.4000 to 0.4300, +0.0300 [+0.0100, +0.0500] on 50 images (requested by the lab)"
    )
    assert all(rule.passed for rule in found.rules)


def test_an_equal_version_is_refused_as_not_better():
    found = decision(CONFIG, comparison(0.4, 0.4, 0.0, 0.0))
    assert not found.promoted
    assert found.reason == "AP is better: +0.0000 (0.4000 to 0.4000), required: more than +0.0000"
    assert decision(replace(CONFIG, margin=-0.001), comparison(0.4, 0.4, 0.0, 0.0)).promoted


def test_a_slightly_worse_version_passes_only_with_a_negative_margin_and_a_tolerance():
    worse = comparison(0.4, 0.398, -0.006, 0.002)
    assert (
        "AP is better: -0.0020 (0.4000 to 0.3980), required: more than +0.0000"
        in decision(CONFIG, worse).reason
    )
    assert not decision(replace(CONFIG, margin=-0.005), worse).promoted
    assert decision(replace(CONFIG, margin=-0.005, tolerance=0.01), worse).promoted


def test_an_improvement_within_chance_is_refused_without_a_tolerance():
    uncertain = comparison(0.4, 0.41, -0.01, 0.03)
    assert decision(CONFIG, uncertain).reason == (
        "AP is better beyond chance: 95 % of resamples between -0.0100 and +0.0300, "
        "required: a lower bound of at least +0.0000"
    )
    assert decision(replace(CONFIG, tolerance=0.01), uncertain).promoted
    assert not decision(replace(CONFIG, tolerance=0.01, margin=0.02), uncertain).promoted


def test_a_version_with_a_much_worse_class_is_refused_with_its_name_although_the_mean_is_better():
    classes = [class_change("ant", 0.3, 0.1, 0.5), class_change("bee", -0.2, -0.3, -0.1)]
    found = decision(CONFIG, comparison(0.40, 0.45, 0.01, 0.09, classes))
    assert not found.promoted
    assert found.reason == (
        "no class is much worse: bee -0.200 [-0.300, -0.100], 40 objects, "
        "required: no class that loses more than 0.05 AP beyond chance"
    )
    assert decision(replace(CONFIG, max_class_drop=0.25), comparison(0.4, 0.45, 0.01, 0.09, classes)).promoted


def test_a_class_that_is_worse_within_chance_or_slightly_or_has_few_objects_does_not_stop_a_promotion():
    classes = [
        class_change("within chance", -0.2, -0.5, 0.1),
        class_change("slightly", -0.04, -0.05, -0.03),
        class_change("rare", -0.4, -0.5, -0.3, objects=9),
    ]
    found = decision(CONFIG, comparison(0.4, 0.45, 0.01, 0.09, classes))
    assert found.promoted
    assert found.rules[-1].found == "the worst of 2: within chance -0.200 [-0.500, +0.100], 40 objects"
    none = ClassChange(1, "no ground truth", 0, Change(-1.0, -1.0, 0.0, 0.0, 0.0))
    assert (
        decision(CONFIG, comparison(0.4, 0.45, 0.01, 0.09, [none])).rules[-1].found
        == "no class has 10 objects"
    )


def test_the_reason_with_eighty_much_worse_classes_fits_into_a_tag():
    classes = [class_change("x" * 100, -0.2 - i / 1000, -0.3, -0.1) for i in range(80)]
    found = decision(CONFIG, comparison(0.4, 0.45, 0.01, 0.09, classes))
    assert "and 75 more" in found.reason
    assert len(found.reason) < 1000


def test_a_metric_that_is_missing_or_has_no_objects_is_an_error_of_the_flag():
    with pytest.raises(ConfigError, match="--metric PQ: the comparison has AP, AP_small"):
        check_comparison(replace(CONFIG, metric="PQ"), comparison(0.4, 0.5, 0.1, 0.2))
    with pytest.raises(ConfigError, match="--metric AP_small: the evaluation data has no objects"):
        check_comparison(replace(CONFIG, metric="AP_small"), comparison(0.4, 0.5, 0.1, 0.2))


def test_complete_prerequisites_pass():
    assert prerequisites().promoted
    assert prerequisites(champion=None).promoted


def test_evaluations_on_different_data_are_refused_with_advice():
    found = prerequisites(challenger=replace(CHALLENGER, evaluations={OTHER: record("new", OTHER)}))
    assert not found.promoted
    assert found.reason == (
        "both versions are evaluated on the same data: version 2 on bbbbbbbbbbbb; version 1 on aaaaaaaaaaaa, "
        "required: evaluations on the same data: run pipelines/evaluate.py --model models:/raydetr/1 "
        "--data shards/bbbb. If that fails because labels and categories do not match, the two models have different "
        "classes: train the new one under its own name (pipelines/train.py --name NAME, then --model "
        'models:/NAME@challenger), or replace the champion (--replace-champion --reason "…")'
    )
    without_evaluation = prerequisites(challenger=replace(CHALLENGER, evaluations={}), champion=None)
    assert "the challenger is evaluated: version 2 on nothing" in without_evaluation.reason
    other_data = prerequisites(replace(CONFIG, data=OTHER))
    assert "required: an evaluation on bbbbbbbbbbbb" in other_data.reason


def test_paths_in_the_advice_are_quoted():
    data = {OTHER: replace(record("new", OTHER), data=EvaluationData("my shards/val", OTHER))}
    assert "--data 'my shards/val'" in prerequisites(challenger=replace(CHALLENGER, evaluations=data)).reason


def test_a_champion_is_replaced_only_if_it_cannot_be_compared():
    with pytest.raises(
        ConfigError, match=r"version 2 and version 1 are both evaluated on aaaaaaaaaaaa.*remove the flag"
    ):
        check_replacement(CHALLENGER, CHAMPION, "")
    other = replace(CHALLENGER, evaluations={OTHER: record("new", OTHER)})
    assert check_replacement(other, CHAMPION, "").passed
    both = replace(CHALLENGER, evaluations={**CHALLENGER.evaluations, **other.evaluations})
    assert check_replacement(both, CHAMPION, OTHER[:8]).passed, "not comparable on this data"


@pytest.mark.parametrize("flags", [{}, {"reason": " "}, {"reason": "new classes", "undo": True}])
def test_a_replacement_needs_a_reason(flags):
    with pytest.raises(ConfigError, match="--replace-champion promotes without a comparison"):
        PromoteConfig(replace_champion=True, **flags)


def test_one_of_several_data_sets_must_be_requested():
    both = {DATA: record("x"), OTHER: record("x", OTHER)}
    champion, challenger = replace(CHAMPION, evaluations=both), replace(CHALLENGER, evaluations=both)
    with pytest.raises(
        ConfigError, match=r"several.*aaaaaaaaaaaa \(shards/aaaa\); bbbbbbbbbbbb \(shards/bbbb\)"
    ):
        choose_evaluation_data(challenger, champion, "")
    assert choose_evaluation_data(challenger, champion, "bbbbbbbb") == OTHER
    assert choose_evaluation_data(challenger, replace(champion, evaluations={DATA: record("x")}), "") == DATA
    assert choose_evaluation_data(challenger, None, "") in both


@pytest.mark.parametrize("role", ["challenger", "champion"])
def test_data_that_a_version_was_trained_or_selected_on_is_refused_unless_allowed(role):
    for field, words in (("chosen_on", "checkpoint was selected on it"), ("trained_on", "was trained on it")):
        versions = {"challenger": CHALLENGER, "champion": CHAMPION}
        versions[role] = replace(versions[role], **{field: DATA})
        found = prerequisites(**versions)
        assert not found.promoted
        assert words in found.reason
        assert "--allow-contaminated-eval" in found.reason
        assert prerequisites(replace(CONFIG, allow_contaminated_eval=True), **versions).promoted
    assert prerequisites(challenger=replace(CHALLENGER, chosen_on=OTHER)).promoted


def test_a_missing_report_is_refused():
    assert (
        "missing for version 1: its evaluation was stored without a report"
        in prerequisites(missing={1: ""}).reason
    )
    missing = prerequisites(missing={2: "s3://gone/page.html"})
    assert "missing for version 2: s3://gone/page.html" in missing.reason


def test_other_settings_other_images_and_other_weights_are_refused():
    scored = {DATA: replace(record("new"), settings={"max_detections": 300}, images=49)}
    assert (
        "the records differ in settings, images"
        in prerequisites(challenger=replace(CHALLENGER, evaluations=scored)).reason
    )
    changed = prerequisites(challenger=replace(CHALLENGER, digest="changed"))
    assert "version 2 was evaluated with other files" in changed.reason


def test_data_that_changed_since_it_was_scored_is_refused():
    assert check_data([DATA, DATA], DATA, "shards").passed
    rule = check_data([DATA, DATA], OTHER, "shards")
    assert not rule.passed
    assert "at shards" in rule.found


def test_latency_has_a_limit_and_both_versions_are_reported():
    config = replace(CONFIG, max_latency_ms=100)
    assert check_latency(config, {"challenger": 100.0, "champion": 300.0}, "2 CPU threads").passed
    slow = check_latency(config, {"challenger": 100.1, "champion": 50.0}, "2 CPU threads")
    assert not slow.passed
    assert slow.found == "challenger 100.1 ms, champion 50.0 ms (95th percentile, 2 CPU threads)"


def test_a_concurrent_promotion_is_refused_with_the_advice_to_promote_again():
    rule = check_unmoved("champion", 1, "version 3")
    reason = decide([rule], "").reason
    assert (
        reason == "no concurrent promotion: version 3, required: champion still at version 1: promote again"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tolerance": -0.1}, "--tolerance is -0.1"),
        ({"max_class_drop": -1.0}, "--max-class-drop"),
        ({"latency_images": 0}, "--latency-images"),
        ({"reason": "x" * 501}, "--reason has 501 characters"),
    ],
)
def test_invalid_flags_are_errors(flags, message):
    with pytest.raises(ConfigError, match=message):
        PromoteConfig(**flags)
