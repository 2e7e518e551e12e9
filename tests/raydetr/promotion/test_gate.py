"""The rules alone: from facts to a decision and its reason."""

from dataclasses import replace
from typing import Any

import pytest

from raydetr.config import PromoteConfig
from raydetr.errors import ConfigError
from raydetr.promotion.gate import (
    Candidate,
    Decision,
    check_data,
    check_latency,
    check_prerequisites,
    check_replacement,
    check_unmoved,
    choose_judge,
    compare_rules,
    decide,
    describe,
)

DATA, OTHER = "a" * 64, "b" * 64
CONFIG = PromoteConfig()


def record(model: str, data: str = DATA, **other: Any) -> dict[str, Any]:
    return {
        "schema_version": 2,
        "model": {"digest": model},
        "data": {"address": f"shards/{data[:4]}", "digest": data},
        "settings": {"max_detections": 100},
        "images": 50,
        "report": "page.html",
        **other,
    }


CHAMPION = Candidate("raydetr", 1, "old", {DATA: record("old")})
CHALLENGER = Candidate("raydetr", 2, "new", {DATA: record("new")})


def comparison(
    old: float, new: float, low: float, high: float, classes: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    figure = {"old": old, "new": new, "delta": new - old, "low": low, "high": high, "probability_better": 0.5}
    whole = {"id": 3, "name": "ant", "objects": 40, **figure}
    return {
        "figures": {"AP": figure, "AP_small": {**figure, "old": -1.0, "new": -1.0, "delta": 0.0}},
        "classes": {"AP": [whole] if classes is None else classes},
        "images": 50,
        "resamples": 1000,
        "confidence": 0.95,
        "changed": {},
    }


def of_class(name: str, delta: float, low: float, high: float, objects: int = 40) -> dict[str, Any]:
    figure = {"old": 0.5, "new": 0.5 + delta, "delta": delta, "low": low, "high": high}
    return {"id": 1, "name": name, "objects": objects, **figure}


def decision(config: PromoteConfig, found: dict[str, Any]) -> Decision:
    return decide(compare_rules(config, found), describe(config, found), config.reason)


def papers(
    config: PromoteConfig = CONFIG,
    challenger: Candidate = CHALLENGER,
    champion: Candidate | None = CHAMPION,
    missing: dict[int, str] | None = None,
) -> Decision:
    digest = choose_judge(challenger, champion, config.data)
    return decide(check_prerequisites(config, challenger, champion, digest, missing or {}), "in order")


def test_a_better_one_is_promoted_with_figure_and_interval_as_the_reason():
    found = decision(replace(CONFIG, reason="asked for by the lab"), comparison(0.40, 0.43, 0.01, 0.05))
    assert found.promoted
    assert found.reason == (
        "AP 0.4000 to 0.4300, +0.0300 [+0.0100, +0.0500] on 50 images (asked for by the lab)"
    )
    assert all(rule.passed for rule in found.rules)


def test_an_equal_one_is_refused_as_not_better():
    found = decision(CONFIG, comparison(0.4, 0.4, 0.0, 0.0))
    assert not found.promoted
    assert found.reason == "AP is better: +0.0000 (0.4000 to 0.4000), asked for: more than +0.0000"
    assert decision(replace(CONFIG, margin=-0.001), comparison(0.4, 0.4, 0.0, 0.0)).promoted


def test_a_slightly_worse_one_passes_only_with_a_negative_margin_and_a_tolerance():
    worse = comparison(0.4, 0.398, -0.006, 0.002)
    assert (
        "AP is better: -0.0020 (0.4000 to 0.3980), asked for: more than +0.0000"
        in decision(CONFIG, worse).reason
    )
    assert not decision(replace(CONFIG, margin=-0.005), worse).promoted
    assert decision(replace(CONFIG, margin=-0.005, tolerance=0.01), worse).promoted


def test_better_by_chance_is_refused_unless_tolerated():
    lucky = comparison(0.4, 0.41, -0.01, 0.03)
    assert decision(CONFIG, lucky).reason == (
        "AP is better beyond chance: 95 % of resamples between -0.0100 and +0.0300, asked for: from +0.0000 on"
    )
    assert decision(replace(CONFIG, tolerance=0.01), lucky).promoted
    assert not decision(replace(CONFIG, tolerance=0.01, margin=0.02), lucky).promoted


def test_one_class_much_worse_is_refused_by_name_although_the_whole_is_better():
    classes = [of_class("ant", 0.3, 0.1, 0.5), of_class("bee", -0.2, -0.3, -0.1)]
    found = decision(CONFIG, comparison(0.40, 0.45, 0.01, 0.09, classes))
    assert not found.promoted
    assert found.reason == (
        "no class is much worse: bee -0.200 [-0.300, -0.100], 40 objects, "
        "asked for: none that loses more than 0.05 AP beyond chance"
    )
    assert decision(replace(CONFIG, max_class_drop=0.25), comparison(0.4, 0.45, 0.01, 0.09, classes)).promoted


def test_a_class_that_fell_within_chance_a_little_or_with_few_objects_does_not_stop_a_promotion():
    classes = [
        of_class("within chance", -0.2, -0.5, 0.1),
        of_class("a little", -0.04, -0.05, -0.03),
        of_class("rare", -0.4, -0.5, -0.3, objects=9),
    ]
    found = decision(CONFIG, comparison(0.4, 0.45, 0.01, 0.09, classes))
    assert found.promoted
    assert found.rules[-1].found == "the worst of 2: within chance -0.200 [-0.500, +0.100], 40 objects"
    none = {
        "id": 1,
        "name": "no truth",
        "objects": 0,
        "old": -1.0,
        "new": -1.0,
        "delta": 0.0,
        "low": 0.0,
        "high": 0.0,
    }
    assert (
        decision(CONFIG, comparison(0.4, 0.45, 0.01, 0.09, [none])).rules[-1].found
        == "no class has 10 objects"
    )


def test_eighty_classes_much_worse_still_fit_into_a_tag():
    classes = [of_class("x" * 100, -0.2 - i / 1000, -0.3, -0.1) for i in range(80)]
    found = decision(CONFIG, comparison(0.4, 0.45, 0.01, 0.09, classes))
    assert "and 75 more" in found.reason
    assert len(found.reason) < 1000


def test_a_figure_that_is_not_there_or_counts_nothing_is_an_error_of_the_flag():
    with pytest.raises(ConfigError, match="--metric PQ: the comparison has AP, AP_small"):
        compare_rules(replace(CONFIG, metric="PQ"), comparison(0.4, 0.5, 0.1, 0.2))
    with pytest.raises(ConfigError, match="--metric AP_small: the data have no object"):
        compare_rules(replace(CONFIG, metric="AP_small"), comparison(0.4, 0.5, 0.1, 0.2))


def test_papers_in_order_pass():
    assert papers().promoted
    assert papers(champion=None).promoted


def test_other_data_are_refused_and_told():
    found = papers(challenger=replace(CHALLENGER, evaluations={OTHER: record("new", OTHER)}))
    assert not found.promoted
    assert found.reason == (
        "both are evaluated on the same data: version 2 on bbbbbbbbbbbb; version 1 on aaaaaaaaaaaa, "
        "asked for: the same: run pipelines/evaluate.py --model models:/raydetr/1 --data shards/bbbb. Where that says that "
        "labels and categories do not match, the two are models of different classes: train the new one under a name of "
        "its own (pipelines/train.py --name NAME, then --model models:/NAME@challenger), or replace the champion "
        '(--replace-champion --reason "…")'
    )
    nothing = papers(challenger=replace(CHALLENGER, evaluations={}), champion=None)
    assert "it is evaluated: version 2 on nothing" in nothing.reason
    asked = papers(replace(CONFIG, data=OTHER))
    assert "asked for: an evaluation on bbbbbbbbbbbb" in asked.reason


def test_a_path_of_the_advice_is_quoted():
    data = {OTHER: {**record("new", OTHER), "data": {"address": "my shards/val", "digest": OTHER}}}
    assert "--data 'my shards/val'" in papers(challenger=replace(CHALLENGER, evaluations=data)).reason


def test_a_champion_is_replaced_only_where_it_cannot_be_compared():
    with pytest.raises(
        ConfigError, match=r"version 2 and version 1 are both evaluated on aaaaaaaaaaaa.*leave the flag out"
    ):
        check_replacement(CHALLENGER, CHAMPION, "")
    other = replace(CHALLENGER, evaluations={OTHER: record("new", OTHER)})
    assert check_replacement(other, CHAMPION, "").passed
    both = replace(CHALLENGER, evaluations={**CHALLENGER.evaluations, **other.evaluations})
    assert check_replacement(both, CHAMPION, OTHER[:8]).passed, "not on these data"


@pytest.mark.parametrize("flags", [{}, {"reason": " "}, {"reason": "new classes", "undo": True}])
def test_a_replacement_needs_a_reason(flags):
    with pytest.raises(ConfigError, match="--replace-champion promotes without a comparison"):
        PromoteConfig(replace_champion=True, **flags)


def test_of_several_data_sets_one_must_be_said():
    both = {DATA: record("x"), OTHER: record("x", OTHER)}
    champion, challenger = replace(CHAMPION, evaluations=both), replace(CHALLENGER, evaluations=both)
    with pytest.raises(
        ConfigError, match=r"several.*aaaaaaaaaaaa \(shards/aaaa\); bbbbbbbbbbbb \(shards/bbbb\)"
    ):
        choose_judge(challenger, champion, "")
    assert choose_judge(challenger, champion, "bbbbbbbb") == OTHER
    assert choose_judge(challenger, replace(champion, evaluations={DATA: record("x")}), "") == DATA
    assert choose_judge(challenger, None, "") in both


@pytest.mark.parametrize("who", ["challenger", "champion"])
def test_the_data_that_training_chose_by_or_trained_on_do_not_judge_unless_allowed(who):
    for field, words in (("chosen_on", "checkpoint was chosen by it"), ("trained_on", "was trained on it")):
        contenders = {"challenger": CHALLENGER, "champion": CHAMPION}
        contenders[who] = replace(contenders[who], **{field: DATA})
        found = papers(**contenders)
        assert not found.promoted
        assert words in found.reason
        assert "--allow-contaminated-eval" in found.reason
        assert papers(replace(CONFIG, allow_contaminated_eval=True), **contenders).promoted
    assert papers(challenger=replace(CHALLENGER, chosen_on=OTHER)).promoted


def test_a_missing_report_is_refused():
    assert "missing of 1: its evaluation was kept without one" in papers(missing={1: ""}).reason
    assert "missing of 2: s3://gone/page.html" in papers(missing={2: "s3://gone/page.html"}).reason


def test_other_settings_other_images_and_other_weights_are_refused():
    scored = {DATA: record("new", settings={"max_detections": 300}, images=49)}
    assert (
        "the records differ in settings, images"
        in papers(challenger=replace(CHALLENGER, evaluations=scored)).reason
    )
    changed = papers(challenger=replace(CHALLENGER, digest="changed"))
    assert "version 2 has other files than were evaluated" in changed.reason


def test_data_that_changed_since_are_refused():
    assert check_data([DATA, DATA], DATA, "shards").passed
    rule = check_data([DATA, DATA], OTHER, "shards")
    assert not rule.passed
    assert "at shards" in rule.found


def test_latency_is_bounded_and_both_are_told():
    config = replace(CONFIG, max_latency_ms=100)
    assert check_latency(config, {"challenger": 100.0, "champion": 300.0}, "2 CPU threads").passed
    slow = check_latency(config, {"challenger": 100.1, "champion": 50.0}, "2 CPU threads")
    assert not slow.passed
    assert slow.found == "challenger 100.1 ms, champion 50.0 ms (95th percentile, 2 CPU threads)"


def test_who_was_overtaken_is_told_to_promote_again():
    rule = check_unmoved("champion", 1, "version 3")
    reason = decide([rule], "").reason
    assert reason == (
        "no other promotion meanwhile: version 3, asked for: champion still version 1: promote again"
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
def test_flags_that_cannot_work_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        PromoteConfig(**flags)
