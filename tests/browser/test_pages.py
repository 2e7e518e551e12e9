"""The evaluation's pages in a real browser: sorting, selection, small screens, no external requests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page

from raydetr.data.shards import Manifest
from raydetr.evaluation.analysis import analyze
from raydetr.evaluation.ground_truth import read_ground_truth
from raydetr.promotion.compare import compare
from raydetr.reports.page import write_page
from raydetr.reports.page_comparison import write_comparison
from raydetr.results.decision import Decision, Rule
from tests.awkward import write_awkward
from tests.raydetr.reports.page_examples import make_record, spoilt_predictions

pytestmark = pytest.mark.slow

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the evaluation and comparison pages of the same data."""
    folder = tmp_path_factory.mktemp("pages")
    manifest: Manifest = write_awkward(folder / "data")
    old, new = (spoilt_predictions(manifest, seed, harm=harm) for seed, harm in ((0, 1.0), (1, 0.5)))
    ground_truth = read_ground_truth(manifest, "none")
    before, after = (analyze(ground_truth, each, resamples=50) for each in (old, new))
    records = make_record(manifest, before), make_record(manifest, after, 4)
    files = {"evaluation": folder / "evaluation.html", "comparison": folder / "comparison.html"}
    write_page(str(files["evaluation"]), records[0], before, manifest, old)
    comparison = compare(ground_truth, old, new, resamples=50)
    rule = Rule("AP is better", passed=True, found="+0.1", limit="more than 0")
    decision = Decision(True, (rule,), "AP is better")
    write_comparison(str(files["comparison"]), *records, comparison, manifest, old, new, decision)
    return files


@pytest.fixture
def open_page(browser: Browser, pages: dict[str, Path]) -> Iterator[Open]:
    """Open a page by its name. At the end it must have logged nothing and loaded nothing else."""
    opened, messages, requests = [], [], []

    def open_one(name: str, width: int = 1280, dark: bool = False) -> Page:
        page = browser.new_page(
            viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light"
        )
        page.set_default_timeout(120_000)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(pages[name].as_uri())
        opened.append(pages[name].as_uri())
        return page

    yield open_one
    for context in browser.contexts:
        context.close()
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == opened


def column(table: Locator, index: int) -> list[str]:
    return table.evaluate("(t, i) => [...t.tBodies[0].rows].map((row) => row.cells[i].dataset.v)", index)


def test_a_click_on_a_header_sorts_and_a_second_click_reverses_the_order(open_page: Open) -> None:
    table = open_page("evaluation").locator("#classes-table")
    header = table.locator("thead th").nth(3)
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    values = [float(value) for value in column(table, 3)]
    assert values == sorted(values, reverse=True)
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert [float(value) for value in column(table, 3)] == sorted(values)
    assert table.locator("[aria-sort]").count() == 1


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_a_header_sorts_by_keyboard(open_page: Open, key: str) -> None:
    page = open_page("evaluation")
    table = page.locator("#classes-table")
    table.locator("thead button").first.focus()
    page.keyboard.press(key)
    assert table.locator("thead th").first.get_attribute("aria-sort") == "ascending"
    assert column(table, 0) == sorted(column(table, 0))
    page.keyboard.press("Tab")
    page.keyboard.press(key)
    assert table.locator("thead th").nth(1).get_attribute("aria-sort") == "descending"


def test_choosing_a_class_draws_its_curve_and_choosing_none_removes_it(open_page: Open) -> None:
    page = open_page("evaluation")
    curve, legend = page.locator(".chart .curve.one"), page.locator("#curve-legend")
    assert curve.get_attribute("d") == ""
    assert not legend.is_visible()
    drawn = set()
    for name in ("ant", "bee"):
        page.select_option("#curve-class", label=name)
        drawn.add(curve.get_attribute("d"))
        assert legend.inner_text() == name
    assert len(drawn) == 2
    page.select_option("#curve-class", label="none")
    assert curve.get_attribute("d") == ""


@pytest.mark.parametrize("name", ["evaluation", "comparison"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_pages_fit_the_window(open_page: Open, name: str, width: int) -> None:
    page = open_page(name, width, dark=True)
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(int(part) for part in paper[4:-1].split(",")) < 150  # dark


def test_ground_truth_can_be_hidden(open_page: Open) -> None:
    page = open_page("evaluation")
    ground_truth, detections = (
        page.locator(".shot .truth:has(.line)").first,
        page.locator(".shot .found:has(.line)").first,
    )
    shown = page.locator("#images details[open] .shot .truth.key:has(.line)").first
    assert shown.is_visible()
    page.uncheck("#show-truth")
    assert not shown.is_visible()
    page.check("#show-truth")
    assert shown.is_visible()
    line = "(e) => getComputedStyle(e.querySelector('.line')).strokeDasharray"
    assert ground_truth.evaluate(line) == "none"
    assert detections.evaluate(line) != "none"  # dashed: distinguishable without color


def test_an_image_can_be_enlarged_and_reduced(open_page: Open) -> None:
    page = open_page("evaluation")
    image, button = page.locator("#images .shot").first, page.locator("#images button").first
    narrow = image.bounding_box()
    button.click()
    wide = image.bounding_box()
    assert narrow is not None
    assert wide is not None
    assert wide["width"] > 1.5 * narrow["width"]
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    reduced = image.bounding_box()
    assert reduced is not None
    assert reduced["width"] == narrow["width"]


def test_every_chart_and_image_has_an_accessible_name(open_page: Open) -> None:
    for name in ("evaluation", "comparison"):
        page = open_page(name)
        images = page.locator("svg:not([aria-hidden]), img")
        names = images.evaluate_all("(all) => all.map((e) => e.getAttribute('aria-label') || e.alt)")
        assert names
        assert all(names)


def test_printing_expands_collapsed_sections(open_page: Open) -> None:
    page = open_page("evaluation")
    assert page.locator("details:not([open])").count() > 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0
