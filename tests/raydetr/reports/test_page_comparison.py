"""The comparison report: it shows the decision first, then the change and its uncertainty."""

from dataclasses import replace
from pathlib import Path

import pytest

from raydetr.data.shards import Manifest
from raydetr.reports.page_comparison import write_comparison
from raydetr.results.comparison import Change, ChangedImages, Comparison
from raydetr.results.decision import Decision, Rule
from tests.raydetr.reports.page_examples import (
    make_analysis,
    make_comparison,
    make_record,
    spoilt_predictions,
)
from tests.raydetr.reports.test_page import Page

DECISION = Decision(
    promoted=False,
    rules=(
        Rule("AP is better", False, "-0.0123", "more than 0"),
        Rule("the evaluation data is unchanged", True, "abc", "the same"),
    ),
    reason="AP fell <i>",
)


def comparison_of(change: Change) -> Comparison:
    """Return a comparison with this change of AP and nothing else."""
    return Comparison({"AP": change}, {}, images=61, resamples=1000, confidence=0.95)


def write_and_parse(
    tmp_path: Path, manifest: Manifest, comparison: Comparison | None = None, decision: Decision | None = None
) -> Page:
    old, new = spoilt_predictions(manifest, seed=0), spoilt_predictions(manifest, seed=1, harm=0.5)
    before, after = make_analysis(manifest, old), make_analysis(manifest, new)
    file = tmp_path / "comparison.html"
    write_comparison(
        str(file),
        make_record(manifest, before),
        make_record(manifest, after, 4),
        comparison if comparison is not None else make_comparison(before, after),
        manifest,
        old,
        new,
        decision,
    )
    return Page(file)


def test_the_decision_comes_before_everything_else(manifest: Manifest, tmp_path: Path) -> None:
    page = write_and_parse(tmp_path, manifest, decision=DECISION)
    assert page.words.index("Not promoted") < page.words.index("AP rose by") < page.words.index("All metrics")
    for text in ("AP fell <i>", "✗ failed", "✓ passed", "-0.0123", "raydetr version 4 is better", "98 %"):
        assert text in page.words
    assert {"figures", "classes", "better", "worse", "about"} <= set(page.ids)
    assert "Not promoted" not in write_and_parse(tmp_path, manifest).words
    assert (
        "✓ Promoted" in write_and_parse(tmp_path, manifest, decision=replace(DECISION, promoted=True)).words
    )


@pytest.mark.parametrize(
    ("delta", "width", "verdict"),
    [
        (0.02, 0.01, "is better"),
        (-0.02, 0.01, "is worse"),
        (0.02, 0.03, "No clear difference"),
        (0.0, 0.0, "No clear"),
    ],
)
def test_only_an_interval_that_excludes_zero_is_a_difference(
    manifest: Manifest, tmp_path: Path, delta: float, width: float, verdict: str
) -> None:
    change = Change(0.4, 0.4 + delta, delta, delta - width, delta + width)
    page = write_and_parse(tmp_path, manifest, comparison_of(change))
    assert verdict in page.words


def test_images_are_shown_three_times_and_embedded_once(manifest: Manifest, tmp_path: Path) -> None:
    page = write_and_parse(tmp_path, manifest)
    images = {reference for reference in page.references if reference.startswith("#image-")}
    assert images
    for image in images:
        assert page.references.count(image) % 3 == 0
        assert page.html.count(f'id="{image[1:]}"') == 1


def test_a_data_set_without_objects_has_nothing_to_compare(manifest: Manifest, tmp_path: Path) -> None:
    nothing = Change(-1.0, -1.0, 0.0, 0.0, 0.0, 0.0)
    page = write_and_parse(tmp_path, manifest, comparison_of(nothing))
    assert "nothing to compare" in page.words


def test_undecodable_and_missing_images_have_a_placeholder(manifest: Manifest, tmp_path: Path) -> None:
    change = Change(0.4, 0.5, 0.1, 0.0, 0.2, 0.9)
    changed = ChangedImages(better=(1035,), worse=(999999,))  # one has no bytes, one does not exist
    page = write_and_parse(tmp_path, manifest, replace(comparison_of(change), changed=changed))
    assert page.words.count("cannot be shown") == 2
