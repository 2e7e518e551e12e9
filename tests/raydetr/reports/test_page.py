"""The evaluation report: it is self-contained, shows the analysis, and omits sections without data."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydetr.data.ingest.shard_writer import write_manifest, write_shard
from raydetr.data.shards import Manifest, read_records
from raydetr.evaluation.analysis import analyze
from raydetr.evaluation.ground_truth import read_ground_truth
from raydetr.prediction.predictions import table
from raydetr.reports.page import write_page
from raydetr.reports.page_matching import Item, match_image
from raydetr.reports.page_overlay import outlines
from raydetr.reports.page_pictures import detections, jpeg, open_album, read_predicted
from raydetr.reports.page_text import percent, with_interval
from raydetr.results.analysis import Analysis
from raydetr.results.json_form import from_json, to_json
from tests.awkward import record
from tests.raydetr.reports.page_examples import make_analysis, make_record, spoilt_predictions

VOID = {"meta", "img", "br", "input"}
SECTIONS = (
    "summary", "figures", "classes", "curves", "scores", "errors", "confusions", "images", "slices", "about",
)  # fmt: skip


class Page(HTMLParser):
    """Parses a page, checks that its tags are closed, and collects words, references and ids."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.html = file.read_text()
        self.open: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.words = ""
        self.feed(self.html)
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Handle self-closing tags such as `<rect/>` in SVG."""
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data + " "


def write_and_parse(
    tmp_path: Path, manifest: Manifest, predictions: pa.Table, analysis: Analysis, **of: Any
) -> Page:
    file = tmp_path / "page.html"
    write_page(str(file), make_record(manifest, analysis, **of), analysis, manifest, predictions)
    page = Page(file)
    assert not re.search(r"https?:|@import|url\(", page.html)
    assert not re.search(r"\b(nan|None|inf)\b", page.words)
    assert all(reference.startswith(("#", "data:image/jpeg;base64,")) for reference in page.references)
    inside = {reference[1:] for reference in page.references if reference.startswith("#")}
    assert inside <= set(page.ids)
    return page


def test_each_section_is_present_and_shows_the_analysis(manifest: Manifest, tmp_path: Path) -> None:
    predictions = spoilt_predictions(manifest, seed=0)
    analysis = analyze(read_ground_truth(manifest, "none"), predictions, resamples=50)
    page = write_and_parse(tmp_path, manifest, predictions, analysis)
    assert set(SECTIONS) <= set(page.ids)
    for text in ("raydetr version 3", "25 November 2026", manifest.digest, "cut short <b>", "95 %"):
        assert text in page.words
    for name in ("AP", "AP_small", "AR_100"):
        assert f"{analysis.metrics[name]:.3f}" in page.words
    for kind, count in analysis.errors.counts.items():
        assert f"{count:,}" in page.words, kind
    shown = {image_id for ids in analysis.worst.values() for image_id in ids}
    assert {f"image-{image_id}" for image_id in shown} - {"image-1021", "image-1035"} <= set(page.ids)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_errors_in_the_overlays_are_those_that_the_analysis_counts(manifest: Manifest, seed: int) -> None:
    predictions = spoilt_predictions(manifest, seed)
    analysis = analyze(read_ground_truth(manifest, "none"), predictions, resamples=1)
    min_score = analysis.errors.min_score
    every = [each["image_id"] for each in read_records(manifest, ["image_id"])]
    predicted, counts = read_predicted(predictions, every), dict.fromkeys(analysis.errors.counts, 0)
    album = open_album(manifest, every, "none")
    for image_id, entry in album.entries.items():
        matching = match_image(
            entry.objects, detections(predicted[image_id], entry.image.size[::-1], min_score)
        )
        counts["missed"] += matching.objects.count("missed")
        for kind in counts.keys() - {"missed"}:
            counts[kind] += matching.detections.count(kind)
    hidden_ids = set(every) - set(album.entries)
    hidden = [each for each in read_records(manifest) if each["image_id"] in hidden_ids]
    difference = sum(analysis.errors.counts.values()) - sum(counts.values())
    maximum = sum(len(each["objects"]) + len(predicted[each["image_id"]].detections) for each in hidden)
    assert 0 <= difference <= maximum
    for kind, count in analysis.errors.counts.items():
        assert 0 <= count - counts[kind] <= maximum, kind


def test_names_of_classes_and_files_are_escaped(tmp_path: Path) -> None:
    rows = [record(np.random.default_rng(seed), seed, 0.0) for seed in range(6)]
    rows = [row | {"file_name": f"<script>alert({i})</script>.jpg"} for i, row in enumerate(rows)]
    summary = write_shard(str(tmp_path), 0, rows)
    assert summary is not None
    names = ["</script><b>ant</b>", "b&e", "\"c'"]
    categories = [{"id": i, "name": name} for i, name in zip((3, 7, 90), names, strict=True)]
    manifest = write_manifest(str(tmp_path), [summary], categories)
    predictions = spoilt_predictions(manifest, seed=3)
    page = write_and_parse(tmp_path, manifest, predictions, make_analysis(manifest, predictions))
    assert page.html.count("<script") == 2  # the page's own
    assert "alert" in page.words
    assert "<b>ant" in page.words


@pytest.mark.parametrize(
    "missing", ["curves", "confusion", "calibration", "errors", "slices", "classes", "worst", "intervals"]
)
def test_a_part_that_the_analysis_does_not_have_is_omitted(
    manifest: Manifest, tmp_path: Path, missing: str
) -> None:
    predictions = spoilt_predictions(manifest, seed=1)
    stored = to_json(make_analysis(manifest, predictions))
    del stored[missing]
    write_and_parse(tmp_path, manifest, predictions, from_json(Analysis, stored))


def test_masks_and_segments_are_shown_if_present(manifest: Manifest, tmp_path: Path) -> None:
    predictions = spoilt_predictions(manifest, seed=1, masks=True)
    analysis = make_analysis(manifest, predictions)
    plain = write_and_parse(tmp_path, manifest, predictions, analysis)
    assert "Segments (panoptic)" not in plain.words
    segments = [f"{q}{part}" for q in ("PQ", "SQ", "RQ") for part in ("", "_things", "_stuff")]
    of_masks = {f"mask_{name}": 0.123 for name in analysis.metrics} | dict.fromkeys(segments, 0.456)
    analysis = replace(
        analysis,
        metrics={**analysis.metrics, **of_masks},
        intervals={**analysis.intervals, "mask_AP": (0.1, 0.15), "PQ": (0.4, 0.5)},
    )
    page = write_and_parse(tmp_path, manifest, predictions, analysis, task="instance")
    assert "Segments (panoptic)" in page.words
    assert "0.12  (0.10 to 0.15)" in page.words
    assert "class=mask" in page.html


def test_a_model_without_detections_has_a_report(manifest: Manifest, tmp_path: Path) -> None:
    ids = sorted(each["image_id"] for each in read_records(manifest, ["image_id"]))
    empty = table(
        [{"image_id": i, "height": 1, "width": 1, "category_id": [], "score": [], "bbox": []} for i in ids]
    )
    analysis = analyze(read_ground_truth(manifest, "none"), empty, resamples=10)
    page = write_and_parse(tmp_path, manifest, empty, analysis)
    assert "0.000" in page.words


def test_a_data_set_without_objects_has_a_report(tmp_path: Path) -> None:
    summary = write_shard(str(tmp_path), 0, [record(np.random.default_rng(0), 1, 0.0) | {"objects": []}])
    assert summary is not None
    manifest = write_manifest(str(tmp_path), [summary], [{"id": 3, "name": "ant"}])
    predictions = spoilt_predictions(manifest, seed=0, harm=0.0001)
    analysis = analyze(read_ground_truth(manifest, "none"), predictions, resamples=10)
    page = write_and_parse(tmp_path, manifest, predictions, analysis, version=None)
    assert "–" in page.words
    assert "last on" in page.words


def test_embedded_images_stay_below_their_maximum_size() -> None:
    from PIL import Image

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 1400, 3), dtype=np.uint8))
    data = jpeg(noise, 20_000)
    assert len(data) * 3 / 4 < 20_100


def test_the_outline_encloses_the_mask_and_is_empty_for_an_empty_mask() -> None:
    mask = np.zeros((100, 200), np.uint8)
    assert outlines(mask, (200, 100)) == ""
    mask[20:60, 50:150] = 1
    numbers = np.array(re.findall(r"-?\d+", outlines(mask, (200, 100))), int).reshape(-1, 2)
    assert numbers.min(0) == pytest.approx([50, 20], abs=2)
    assert numbers.max(0) == pytest.approx([150, 60], abs=2)


def test_a_misclassified_object_is_not_missed() -> None:
    objects = [Item(1, (0, 0, 10, 10)), Item(1, (50, 50, 10, 10)), Item(3, (0, 0, 90, 90), crowd=True)]
    predicted = [
        Item(2, (0, 0, 10, 10), 0.9),
        Item(1, (50, 50, 10, 10), 0.8),
        Item(1, (50, 50, 10, 10), 0.7),
    ]
    matching = match_image(objects, predicted)
    assert matching.objects == ["near", "found", "crowd"]
    assert matching.detections == ["classification", "right", "duplicate"]
    assert match_image([], predicted).detections == ["background"] * 3
    assert match_image(objects, []).objects == ["missed", "missed", "crowd"]


def test_number_formats() -> None:
    assert with_interval(0.4123, [0.3811, 0.4402]) == "0.41 (0.38 to 0.44)"
    assert with_interval(0.4123, [0.4101, 0.4142]) == "0.412 (0.410 to 0.414)"
    assert with_interval(-1, [-1, -1]) == "–"
    assert [percent(value) for value in (0, 0.001, 0.5, 0.999, 1)] == [
        "0 %",
        "under 1 %",
        "50 %",
        "over 99 %",
        "100 %",
    ]
