"""The comparison report: it shows the decision first, then the change and its uncertainty."""

from pathlib import Path
from typing import Any

import pytest

from raydetr.data.shards import Manifest
from raydetr.reports.page_comparison import write_comparison
from tests.raydetr.reports.page_examples import (
    make_analysis,
    make_comparison,
    make_record,
    spoilt_predictions,
)
from tests.raydetr.reports.test_page import Page

DECISION = {
    "promoted": False,
    "reason": "AP fell <i>",
    "rules": [
        {"rule": "AP is better", "passed": False, "found": -0.0123, "limit": "more than 0"},
        {"rule": "the evaluation data is unchanged", "passed": True, "found": "abc", "limit": None},
    ],
}


def write_and_parse(
    tmp_path: Path, manifest: Manifest, comparison: dict[str, Any] | None = None, decision: Any = None
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
    for text in ("AP fell <i>", "✗ failed", "✓ passed", "−0.0123", "raydetr version 4 is better", "98 %"):
        assert text in page.words
    assert {"figures", "classes", "better", "worse", "about"} <= set(page.ids)
    assert "Not promoted" not in write_and_parse(tmp_path, manifest).words
    assert "✓ Promoted" in write_and_parse(tmp_path, manifest, decision={**DECISION, "promoted": True}).words


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
    change = {"old": 0.4, "new": 0.4 + delta, "delta": delta, "low": delta - width, "high": delta + width}
    page = write_and_parse(
        tmp_path, manifest, {"figures": {"AP": change | {"probability_better": None}}, "classes": {}}
    )
    assert verdict in page.words


def test_images_are_shown_three_times_and_embedded_once(manifest: Manifest, tmp_path: Path) -> None:
    page = write_and_parse(tmp_path, manifest)
    images = {reference for reference in page.references if reference.startswith("#image-")}
    assert images
    for image in images:
        assert page.references.count(image) % 3 == 0
        assert page.html.count(f'id="{image[1:]}"') == 1


def test_a_data_set_without_objects_has_nothing_to_compare(manifest: Manifest, tmp_path: Path) -> None:
    nothing = {"old": -1.0, "new": -1.0, "delta": 0.0, "low": 0.0, "high": 0.0, "probability_better": 0.0}
    page = write_and_parse(tmp_path, manifest, {"figures": {"AP": nothing}, "classes": {}, "changed": {}})
    assert "nothing to compare" in page.words


def test_undecodable_and_missing_images_have_a_placeholder(manifest: Manifest, tmp_path: Path) -> None:
    change = {"old": 0.4, "new": 0.5, "delta": 0.1, "low": 0.0, "high": 0.2, "probability_better": 0.9}
    changed = {"better": [1035], "worse": [999999]}  # one has no bytes, one does not exist
    page = write_and_parse(tmp_path, manifest, {"figures": {"AP": change}, "classes": {}, "changed": changed})
    assert page.words.count("cannot be shown") == 2
