"""The endpoint's page in a real browser: choose images, see boxes and a list, by pointer and keyboard."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from detr.image_processing.decode import decode_image
from tests.browser.endpoint import NAMES, PIXELS, Open, Server, drawn_bounds, pixels
from tests.raydetr.serving.oriented import oriented
from tests.tiers import rest_slow
from tests.tiny_detr import png

RED = f"""() => {{{PIXELS}
  let [x, y, count] = [0, 0, 0];
  for (let i = 0; i < data.length; i += 4) {{
    if (data[i] > 150 && data[i + 1] < 100) {{
      x += (i / 4) % canvas.width;
      y += Math.floor(i / 4 / canvas.width);
      count += 1;
    }}
  }}
  return [x / count, y / count];
}}"""
"""Center of the red pixels of the canvas."""


def scores(server: Server, image: bytes) -> list[float]:
    return [each["score"] for each in server.detections(image)]


def test_a_chosen_image_is_sent_unchanged_and_its_detections_are_listed(server: Server, visit: Open) -> None:
    opened = visit()
    expect(opened.page.locator("#model")).to_have_text(
        f"The model raydetr, version 3, detects {', '.join(NAMES)}."
    )
    image = png(120, 180)
    opened.choose(image)
    opened.until_answered()
    assert server.bodies == [image]
    assert server.posts == ["/v1/detect?threshold=0&orientation=apply"]
    expected = server.detections(image)
    opened.slide(0)
    assert opened.page.locator("#list .score").all_inner_texts() == [f"{d['score']:.2f}" for d in expected]
    labels = opened.page.locator("#list button > span:nth-child(2)").all_inner_texts()
    assert labels == [d["label"] for d in expected]  # also the one that looks like HTML
    assert opened.page.locator("#status").inner_text() == f"{len(expected)} objects"
    name = opened.page.locator("#canvas").get_attribute("aria-label")
    assert name is not None
    assert name.startswith(f"photo.png: {len(expected)} objects: ")


def test_boxes_are_drawn_at_their_positions(server: Server, visit: Open) -> None:
    gray = io.BytesIO()
    Image.new("RGB", (180, 120), (128, 128, 128)).save(gray, "PNG")
    detections = server.detections(gray.getvalue())
    opened = visit()
    opened.choose(gray.getvalue())
    opened.until_answered()
    opened.slide(1)
    assert drawn_bounds(opened.page) is None
    opened.slide(0)
    drawn = drawn_bounds(opened.page)
    assert drawn is not None
    scale = opened.page.evaluate("document.getElementById('canvas').clientWidth") / 180
    line, name = (
        3 / scale,
        24 / scale,
    )  # in pixels of the image; a label is above its box, or below the upper edge of the image
    for side, low, high in ((0, "xmin", "xmax"), (1, "ymin", "ymax")):
        edge = (180, 120)[side]
        assert drawn[side] <= max(min(each["box"][low] for each in detections), 0) + line
        assert (
            drawn[side] >= max(min(each["box"][low] for each in detections) - line - 3 * side * name, 0) - 1
        )
        assert drawn[side + 2] >= min(max(each["box"][high] for each in detections), edge) - line
        assert drawn[side + 2] <= edge


def test_the_slider_filters_without_a_new_request(server: Server, visit: Open) -> None:
    image = png(120, 180, seed=3)
    all_scores = scores(server, image)
    opened = visit()
    opened.choose(image)
    opened.until_answered()
    drawn = set()
    for threshold in (0, 0.2, 0.35, 1):
        opened.slide(threshold)
        assert opened.page.locator("#list li").count() == sum(score >= threshold for score in all_scores)
        assert opened.page.locator("#threshold-text").inner_text() == f"{threshold:.2f}"
        drawn.add(pixels(opened.page))
    assert len(drawn) == len(
        {sum(score >= threshold for score in all_scores) for threshold in (0, 0.2, 0.35, 1)}
    )
    assert len(server.posts) == 1
    expect(opened.page.locator("#status")).to_have_text("No object reaches this score.")
    opened.page.locator("#lower").click()
    assert opened.page.locator("#list li").count() >= 1
    opened.slide(0.4)
    assert "threshold=0.4" in opened.page.locator("#curl").text_content()


def test_a_class_can_be_hidden_and_shown(server: Server, visit: Open) -> None:
    image = png(120, 180)
    labels = [each["label"] for each in server.detections(image)]
    first = labels[0]
    assert len(set(labels)) > 1
    opened = visit()
    opened.choose(image)
    opened.until_answered()
    opened.slide(0)
    box = opened.page.locator("#classes label", has_text=first).locator("input")
    before = pixels(opened.page)
    box.focus()
    opened.page.keyboard.press("Space")
    assert opened.page.locator("#list li").count() == len([each for each in labels if each != first])
    assert f"{labels.count(first)} hidden by class" in opened.page.locator("#status").inner_text()
    assert pixels(opened.page) != before
    expect(box).to_be_focused()
    opened.page.keyboard.press("Space")
    assert opened.page.locator("#list li").count() == len(labels)
    assert len(server.posts) == 1


def test_a_row_highlights_its_box_by_pointer_and_keyboard(server: Server, visit: Open) -> None:
    opened = visit()
    opened.choose(png(120, 180))
    opened.until_answered()
    opened.slide(0)
    plain = pixels(opened.page)
    row = opened.page.locator("#list button").nth(1)
    row.hover()
    assert pixels(opened.page) != plain
    opened.page.mouse.move(0, 0)
    assert pixels(opened.page) == plain
    row.focus()
    opened.page.keyboard.press("Enter")
    expect(row).to_have_attribute("aria-pressed", "true")
    opened.page.locator("#threshold").focus()
    assert pixels(opened.page) != plain
    opened.page.keyboard.press("Escape")
    expect(row).to_have_attribute("aria-pressed", "false")
    assert pixels(opened.page) == plain


@pytest.mark.slow
def test_an_example_can_be_chosen_by_keyboard(server: Server, visit: Open) -> None:
    opened = visit()
    expect(opened.page.locator(".thumbs button")).to_have_text(["street", "table", "shapes"])
    for _ in range(10):
        opened.page.keyboard.press("Tab")
        if opened.page.evaluate("document.activeElement.textContent") == "table":
            break
    opened.page.keyboard.press("Enter")
    opened.until_answered()
    assert Image.open(io.BytesIO(server.bodies[0])).size == (640, 480)
    assert opened.page.locator("#caption").inner_text().startswith("table.png · 640 × 480 pixels")
    for _ in range(10):
        opened.page.keyboard.press("Tab")
        if opened.page.evaluate("document.activeElement.id") == "threshold":
            break
    for _ in range(60):
        opened.page.keyboard.press("ArrowLeft")
    assert opened.page.locator("#list li").count() == 12


def test_a_dropped_image_is_sent(server: Server, visit: Open) -> None:
    opened = visit()
    image = png(60, 90)
    opened.page.evaluate(
        """(bytes) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
          const drop = document.getElementById("drop");
          for (const kind of ["dragenter", "dragover", "drop"]) {
            drop.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
          }
        }""",
        list(image),
    )
    opened.until_answered()
    assert server.bodies == [image]
    expect(opened.page.locator("body")).not_to_have_class(re.compile("dragging"))


@pytest.mark.parametrize(
    "file",
    rest_slow(
        [
            ("JPEG", "phone.png", "image/png"),
            ("PNG", "scan.png", "image/png"),
            ("JPEG", "photo.jpg", "image/jpeg"),
            ("JPEG", "photo", ""),
            ("PNG", "scan.jpg", "image/jpeg"),
            ("WEBP", "photo.webp", "image/webp"),
        ],
        fast=2,
    ),
)
def test_boxes_of_a_rotated_photo_match_the_displayed_image(
    server: Server, visit: Open, file: tuple[str, str, str]
) -> None:
    form, name, kind = file
    photo = oriented(form)
    opened = visit()
    opened.choose(photo, name, kind)
    opened.until_answered()
    height, width = server.sizes[-1]
    assert f"{width} × {height} pixels" in opened.page.locator("#caption").inner_text()
    if form != "WEBP":  # not every browser applies the orientation of WebP
        assert (height, width) == (180, 120)
        assert server.bodies == [photo]  # unchanged: the server rotates it


@pytest.mark.parametrize("orientation", rest_slow([7, 1, 2, 3, 4, 5, 6, 8]))
def test_the_browser_and_the_server_apply_the_same_orientation(
    server: Server, visit: Open, orientation: int
) -> None:
    photo = oriented("PNG", orientation)
    opened = visit()
    opened.choose(photo, "photo.png")
    opened.until_answered()
    opened.slide(1)  # no box is drawn
    center = opened.page.evaluate(RED)
    upright = decode_image(photo, orientation="apply").numpy().astype(int)
    rows, columns = np.nonzero((upright[0] > 150) & (upright[1] < 100))
    scale = opened.page.evaluate("document.getElementById('canvas').width") / upright.shape[2]
    assert center == pytest.approx([columns.mean() * scale, rows.mean() * scale], abs=2 * scale)


def test_if_browser_and_server_disagree_the_page_sends_the_displayed_image(
    server: Server, visit: Open
) -> None:
    photo = oriented("PNG")
    server.applies_orientation = False
    opened = visit()
    opened.choose(photo, "photo.png")
    opened.until_answered()
    assert [image.size for image in map(Image.open, map(io.BytesIO, server.bodies))] == [
        (180, 120),
        (120, 180),
    ]
    assert "sent upright · 120 × 180 pixels" in opened.page.locator("#caption").inner_text()
    assert server.sizes[-1] == (180, 120)


@pytest.mark.slow
def test_an_unsupported_format_is_sent_as_png(server: Server, visit: Open) -> None:
    gif = io.BytesIO()
    Image.open(io.BytesIO(png(60, 90))).save(gif, "GIF")
    opened = visit()
    for number, name in enumerate(("old.gif", "old.png")):
        opened.choose(gif.getvalue(), name, "image/" + name[-3:])
        opened.until_answered()
        assert Image.open(io.BytesIO(server.bodies[number])).format == "PNG"


@pytest.mark.slow
def test_the_copied_commands_send_the_request_of_the_page(
    server: Server, visit: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = png(60, 90)
    name = "it's a photo.png"
    (tmp_path / name).write_bytes(image)
    opened = visit()
    opened.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.choose(image, name)
    opened.until_answered()
    opened.slide(0.2)
    opened.page.locator("#commands summary").click()
    expected = [each for each in server.detections(image) if each["score"] >= 0.2]
    opened.page.get_by_role("button", name="Copy the curl command").click()
    expect(opened.page.get_by_role("button", name="Copied")).to_be_visible()
    command = opened.page.evaluate("navigator.clipboard.readText()")
    if shutil.which("curl"):
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert len(json.loads(done.stdout)["detections"]) == len(expected)
    opened.page.get_by_role("button", name="Copy the Python code").click()
    printed: list[Any] = []
    monkeypatch.chdir(tmp_path)
    exec(
        opened.page.evaluate("document.getElementById('python').textContent"),
        {"print": lambda *a: printed.append(a)},
    )
    assert [label for label, _, _ in printed] == [each["label"] for each in expected]


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_the_window_and_supports_dark_mode(server: Server, visit: Open, width: int) -> None:
    server.replies.append((429, "busy " * 40 + "x" * 200, {"Retry-After": "100"}))
    opened = visit(width, dark=True, errors=(429,))
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    opened.choose(png(300, 900), "a-very-long-name-" * 12 + ".png")
    expect(page.locator("#message")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#message button").click()
    opened.until_answered()
    opened.slide(0)
    page.locator("#commands summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.check("#modes input[value=panoptic]")
    opened.until_answered()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(int(part) for part in paper[4:-1].split(",")) < 150


@pytest.mark.slow
def test_all_controls_have_an_accessible_name(server: Server, visit: Open) -> None:
    opened = visit()
    opened.choose(png(120, 180))
    opened.until_answered()
    opened.slide(0)
    opened.page.locator("#commands summary").click()
    controls = opened.page.locator("button:visible, input:visible, canvas:visible:not([aria-hidden])")
    assert controls.count() > 10
    for control in controls.all():
        snapshot = control.evaluate(
            "(e) => e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent"
        )
        assert snapshot.strip(), control.evaluate("(e) => e.outerHTML")
