"""The data report: its numbers equal those of the original JSON, and the page is self-contained."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from raydetr.data.ingest.record import make_record
from raydetr.data.ingest.shard_writer import write_manifest, write_shard
from raydetr.data.shards import Manifest
from raydetr.reports.charts import bars, histogram
from raydetr.reports.data_report import write_report
from tests.awkward import record, write_awkward
from tests.raydetr.data.coco_files import read_file

VOID = {"meta", "img", "rect", "path", "line", "br"}


class Page(HTMLParser):
    """Parses a page, checks that its tags are closed, and collects text and references."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        # Of the tags that HTML allows to stay open, the reports leave only paragraphs open.
        while self.open[-1] == "p" != tag:
            self.open.pop()
        if tag == "p" and "p" not in self.open:
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def report(manifest: Manifest, file: Path) -> Page:
    write_report(manifest, str(file))
    text = file.read_text()
    assert not re.search(r"https?:|@import|url\(", text)
    return Page(text)


def test_counts_equal_those_of_the_original_json(shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "coco128/annotations/instances_train2017.json"
    index = read_file(str(file))
    category_ids = frozenset(category["id"] for category in index.categories)
    records = [
        make_record(entry, (shared_data / "coco128/train2017" / entry.file_name).read_bytes(), category_ids)[
            0
        ]
        for entry in index.entries
    ]
    summary = write_shard(str(tmp_path), 0, records)
    assert summary is not None
    page = report(write_manifest(str(tmp_path), [summary], index.categories), tmp_path / "report.html")
    text = " ".join(page.words)
    content = json.loads(file.read_text())
    boxes = [item["bbox"] for item in content["annotations"]]
    areas = [w * h for _, _, w, h in boxes]
    small = sum(area < 32**2 for area in areas)
    large = sum(area >= 96**2 for area in areas)
    for expected in (
        f"objects {len(boxes)}",
        f"crowds {sum(item['iscrowd'] for item in content['annotations'])}",
        f"small: {small}",
        f"large: {large}",
        f"medium: {len(boxes) - small - large}",
    ):
        assert expected in text
    for category in content["categories"]:
        count = sum(item["category_id"] == category["id"] for item in content["annotations"])
        assert re.search(rf"{category['name']} +{count}\b", text)
    assert len(page.references) == 12
    assert all(reference.startswith("data:image/jpeg;base64,") for reference in page.references)


def test_the_report_lists_faults_and_is_deterministic(tmp_path: Path) -> None:
    manifest = write_awkward(tmp_path / "data")
    report(manifest, tmp_path / "first.html")
    page = report(manifest, tmp_path / "second.html")
    assert (tmp_path / "first.html").read_bytes() == (tmp_path / "second.html").read_bytes()
    text = " ".join(page.words)
    assert "Images with a fault" in text
    assert "missing-file" in text
    assert "cannot be shown" in text


def test_names_in_the_data_are_escaped(tmp_path: Path) -> None:
    import numpy as np

    row = record(np.random.default_rng(0), 1, 0.0) | {"file_name": "<script>alert(1)</script>.jpg"}
    summary = write_shard(str(tmp_path), 0, [row])
    assert summary is not None
    categories = [{"id": 3, "name": "<b>ant</b>"}, {"id": 7, "name": "b&e"}, {"id": 90, "name": '"c"'}]
    page = report(write_manifest(str(tmp_path), [summary], categories), tmp_path / "report.html")
    assert "<script" not in (tmp_path / "report.html").read_text()
    assert "<b>ant</b>" in page.words


@pytest.mark.parametrize("counts", [[], [0], [3, 0, 9]])
def test_charts_are_well_formed_with_and_without_data(counts: list[int]) -> None:
    Page(histogram(counts, ["<a>"] * len(counts), "A & B", "objects", (0.5, "mark")))
    Page(bars([("<a>", count) for count in counts], "objects"))
