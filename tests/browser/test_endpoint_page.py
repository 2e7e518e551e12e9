"""The endpoint's page in a real browser, before a server that answers by the contract with a real model, without Ray."""

import io
import json
import random
import re
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from pycocotools import mask as coco_mask

import raydetr.serving.page
from detr.detector import ObjectDetector
from detr.image_processing.decode import ImageError
from raydetr.serving.page import index
from raydetr.serving.segments import SegmentRequest, segments
from tests.tiny_detr import add_mask_head, png, save_tiny_detr

NAMES = ["ant", "bee", "cat", "<b>dog</b>"]
MODEL = {"name": "raydetr", "version": 3}
TIMES = {"prepare_ms": 1.0, "model_ms": 2.0, "total_ms": 4.0}


@dataclass
class Server:
    """What the page talks to.

    replies: given to the next posts instead of an answer: status, message, headers.
    tasks: of the model.
    token: asked for, unless None.
    asked: paths and queries of the posts.
    bodies: of the posts.
    """

    url: str
    detector: ObjectDetector
    replies: deque[tuple[int, str, dict[str, str]]] = field(default_factory=deque)
    tasks: list[str] = field(default_factory=lambda: ["detect", "segment"])
    token: str | None = None
    asked: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    def detections(self, image: bytes) -> list[dict[str, Any]]:
        return self.detector.detect_image(image)


def refused(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    answer = {"error": {"status": status, "message": message}}
    return JSONResponse(answer, status, {"X-Request-Id": "abc-123", **(headers or {})})


def application(server: Server) -> FastAPI:
    app = FastAPI()
    id2label = server.detector.model.config.id2label

    @app.middleware("http")
    async def guard(request: Request, call: Callable[[Request], Any]) -> Response:
        if request.method == "POST":
            server.asked.append(f"{request.url.path}?{request.url.query}")
            server.bodies.append(await request.body())
        if request.url.path.startswith("/v1/"):
            given = request.headers.get("authorization", "")
            if server.token is not None and given != f"Bearer {server.token}":
                return refused(401, "A token is missing or wrong.", {"WWW-Authenticate": "Bearer"})
            if request.method == "POST" and server.replies:
                return refused(*server.replies.popleft())
        response: Response = await call(request)
        return response

    @app.get("/")
    def page() -> Response:
        return Response(index(), media_type="text/html; charset=utf-8")

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"models": [{**MODEL, "labels": NAMES, "tasks": server.tasks}]}

    @app.post("/v1/detect", response_model=None)
    async def detect(request: Request, threshold: float = 0.5) -> dict[str, Any] | JSONResponse:
        data = await request.body()
        try:
            prepared = server.detector.prepare(data)
        except ImageError as error:
            return refused(415, f"The body is not an image that can be read: {error}.")
        height, width = prepared.original_size
        found = [each for each in server.detections(data) if each["score"] >= threshold]
        image = {"height": height, "width": width}
        return {"model": MODEL, "image": image, "detections": found, "times": TIMES}

    @app.post("/v1/segment")
    async def segment(
        request: Request, kind: str, threshold: float = 0.5, format: str = "rle"
    ) -> dict[str, Any]:
        prepared = server.detector.prepare(await request.body())
        height, width = prepared.original_size
        asked = SegmentRequest(kind, threshold, format)  # type: ignore[arg-type]
        outputs = server.detector.run([prepared])
        found = segments(outputs, prepared, asked, id2label)
        return {"model": MODEL, "image": {"height": height, "width": width}, **found, "times": TIMES}

    return app


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> ObjectDetector:
    folder = save_tiny_detr(tmp_path_factory.mktemp("model") / "tiny", NAMES)
    return ObjectDetector.from_pretrained(add_mask_head(folder, 2), masks=True)


@pytest.fixture
def server(detector: ObjectDetector) -> Iterator[Server]:
    server = Server("", detector)
    config = uvicorn.Config(application(server), port=0, log_level="error", ws="none", lifespan="off")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.01)
    server.url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    yield server
    running.should_exit = True
    thread.join()


class Visit:
    """The page, open; and what it logged and asked for."""

    def __init__(self, browser: Browser, url: str, width: int = 1280, dark: bool = False) -> None:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light"
        )
        self.page = context.new_page()
        self.page.set_default_timeout(60_000)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)

    def choose(self, image: bytes, name: str = "photo.png", kind: str = "image/png") -> None:
        self.page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": image})

    def slide(self, value: float) -> None:
        self.page.locator("#threshold").fill(str(value))

    def rows(self) -> list[str]:
        return [text.split("\n")[0] for text in self.page.locator("#list button").all_inner_texts()]

    def until_answered(self) -> None:
        expect(self.page.locator("#result")).not_to_have_attribute("aria-busy", "true", timeout=60_000)
        expect(self.page.locator("#caption")).to_contain_text("answered in", timeout=60_000)


Open = Callable[..., Visit]


@pytest.fixture
def visit(browser: Browser, server: Server) -> Iterator[Open]:
    """Opens the page; at the end it must have asked nobody else, and logged nothing but the refusals that are meant."""
    visits: list[tuple[Visit, tuple[int, ...]]] = []

    def open_one(width: int = 1280, dark: bool = False, refusals: tuple[int, ...] = ()) -> Visit:
        visits.append((Visit(browser, server.url, width, dark), refusals))
        return visits[-1][0]

    yield open_one
    for context in browser.contexts:
        context.close()
    for each, refusals in visits:
        meant = [
            message
            for message in each.messages
            if any(f"status of {status} " in message for status in refusals)
            or (0 in refusals and "net::ERR_" in message)
        ]
        assert each.messages == meant
        foreign = [
            url for url in each.requests if not url.startswith((server.url, "data:", f"blob:{server.url}"))
        ]
        assert foreign == []


PIXELS = """
const shown = document.getElementById("canvas");
const canvas = new OffscreenCanvas(shown.width, shown.height);
const context = canvas.getContext("2d", { willReadFrequently: true });
context.drawImage(shown, 0, 0);
const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
"""


def pixels(page: Page) -> int:
    """A hash of what the canvas shows."""
    return page.evaluate(
        f"() => {{{PIXELS} return data.reduce((sum, each) => (sum * 31 + each) % 1000003, 7); }}"
    )


def changed(page: Page) -> list[float] | None:
    """Bounds, in pixels of the picture (180 × 120, grey), of what is drawn on it."""
    return page.evaluate(
        f"""() => {{{PIXELS}
          let [left, top, right, bottom] = [Infinity, Infinity, -1, -1];
          for (let y = 0; y < canvas.height; y++) for (let x = 0; x < canvas.width; x++) {{
            const i = 4 * (y * canvas.width + x);
            if (Math.abs(data[i] - 128) + Math.abs(data[i + 1] - 128) + Math.abs(data[i + 2] - 128) < 30) continue;
            [left, top, right, bottom] = [Math.min(left, x), Math.min(top, y), Math.max(right, x), Math.max(bottom, y)];
          }}
          const scale = 180 / canvas.width;
          return right < 0 ? null : [left, top, right + 1, bottom + 1].map((each) => each * scale);
        }}"""
    )


def scores(server: Server, image: bytes) -> list[float]:
    return [each["score"] for each in server.detections(image)]


def test_a_chosen_picture_is_sent_as_it_is_and_its_detections_are_listed(server: Server, visit: Open) -> None:
    opened = visit()
    expect(opened.page.locator("#model")).to_have_text(
        f"The model raydetr, version 3, knows {', '.join(NAMES)}."
    )
    image = png(120, 180)
    opened.choose(image)
    opened.until_answered()
    assert server.bodies == [image]
    assert server.asked == ["/v1/detect?threshold=0"]
    expected = server.detections(image)
    opened.slide(0)
    assert opened.page.locator("#list .score").all_inner_texts() == [f"{d['score']:.2f}" for d in expected]
    labels = opened.page.locator("#list button > span:nth-child(2)").all_inner_texts()
    assert labels == [d["label"] for d in expected]  # also the one that looks like HTML
    assert opened.page.locator("#status").inner_text() == f"{len(expected)} objects"
    name = opened.page.locator("#canvas").get_attribute("aria-label")
    assert name is not None
    assert name.startswith(f"photo.png: {len(expected)} objects: ")


def test_boxes_are_drawn_where_they_were_found(server: Server, visit: Open) -> None:
    grey = io.BytesIO()
    Image.new("RGB", (180, 120), (128, 128, 128)).save(grey, "PNG")
    found = server.detections(grey.getvalue())
    opened = visit()
    opened.choose(grey.getvalue())
    opened.until_answered()
    opened.slide(1)
    assert changed(opened.page) is None
    opened.slide(0)
    drawn = changed(opened.page)
    assert drawn is not None
    scale = opened.page.evaluate("document.getElementById('canvas').clientWidth") / 180
    line, name = (
        3 / scale,
        24 / scale,
    )  # in pixels of the picture; names lie above their boxes, or below the edge
    for side, low, high in ((0, "xmin", "xmax"), (1, "ymin", "ymax")):
        edge = (180, 120)[side]
        assert drawn[side] <= max(min(each["box"][low] for each in found), 0) + line
        assert drawn[side] >= max(min(each["box"][low] for each in found) - line - 3 * side * name, 0) - 1
        assert drawn[side + 2] >= min(max(each["box"][high] for each in found), edge) - line
        assert drawn[side + 2] <= edge


def test_the_slider_acts_without_asking_again(server: Server, visit: Open) -> None:
    image = png(120, 180, seed=3)
    found = scores(server, image)
    opened = visit()
    opened.choose(image)
    opened.until_answered()
    drawn = set()
    for threshold in (0, 0.2, 0.35, 1):
        opened.slide(threshold)
        assert opened.page.locator("#list li").count() == sum(score >= threshold for score in found)
        assert opened.page.locator("#threshold-text").inner_text() == f"{threshold:.2f}"
        drawn.add(pixels(opened.page))
    assert len(drawn) == len({sum(score >= threshold for score in found) for threshold in (0, 0.2, 0.35, 1)})
    assert len(server.asked) == 1
    expect(opened.page.locator("#status")).to_have_text("The model is not that sure of any object.")
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
    assert len(server.asked) == 1


def test_a_row_brings_its_box_forward_by_pointer_and_keyboard(server: Server, visit: Open) -> None:
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


def test_an_example_is_asked_for_by_keyboard_alone(server: Server, visit: Open) -> None:
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


def test_a_dropped_picture_is_taken(server: Server, visit: Open) -> None:
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


def test_a_photo_that_lies_on_its_side_is_sent_upright(server: Server, visit: Open) -> None:
    photo, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(png(60, 90))).save(photo, "JPEG", exif=exif)
    opened = visit()
    opened.choose(photo.getvalue(), "photo.jpg", "image/jpeg")
    opened.until_answered()
    assert Image.open(io.BytesIO(server.bodies[0])).size == (60, 90)
    assert "sent upright · 60 × 90 pixels" in opened.page.locator("#caption").inner_text()


def test_another_format_is_sent_as_png(server: Server, visit: Open) -> None:
    gif = io.BytesIO()
    Image.open(io.BytesIO(png(60, 90))).save(gif, "GIF")
    opened = visit()
    opened.choose(gif.getvalue(), "old.gif", "image/gif")
    opened.until_answered()
    assert Image.open(io.BytesIO(server.bodies[0])).format == "PNG"


@pytest.mark.parametrize("kind", ["instance", "panoptic", "semantic"])
def test_segments_are_those_of_the_model(server: Server, visit: Open, kind: str) -> None:
    image = png(120, 180)
    opened = visit()
    opened.choose(image)
    opened.until_answered()
    plain = pixels(opened.page)
    opened.slide(0.1)
    opened.page.check(f"#modes input[value={kind}]")
    opened.until_answered()
    prepared = server.detector.prepare(image)
    outputs = server.detector.run([prepared])
    asked = SegmentRequest(kind, 0.1, "rle")  # type: ignore[arg-type]
    expected = segments(outputs, prepared, asked, server.detector.model.config.id2label)["segments"]
    assert expected
    labels = opened.page.locator("#list button > span:nth-child(2)").all_inner_texts()
    assert sorted(labels) == sorted(each["label"] for each in expected)
    assert pixels(opened.page) != plain
    areas = sorted(round(100 * coco_mask.area(each["mask"]) / (120 * 180)) for each in expected)
    shown = opened.page.locator("#list small").all_inner_texts()
    assert sorted(0 if "under" in each else int(each.split(" %")[0]) for each in shown) == areas
    assert opened.page.locator("#slider").is_visible() == (kind != "semantic")
    count = len(server.asked)
    opened.page.check("#modes input[value=boxes]")
    opened.page.check(f"#modes input[value={kind}]")
    opened.until_answered()
    assert len(server.asked) == count  # what is known is not asked for again


def test_run_lengths_are_read_as_pycocotools_writes_them(browser: Browser) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    masks = [
        rng.random((h, w)) < share for h, w, share in ((1, 1, 1), (7, 5, 0.5), (60, 90, 0.02), (50, 40, 0))
    ]
    coarse = rng.random((6, 5)) < 0.5
    masks.append(np.kron(coarse, np.ones((70, 60), bool)))  # long runs
    page = browser.new_page()
    page.evaluate(
        (resources.files(raydetr.serving.page) / "masks.js").read_text() + "; globalThis.read = readMask; 0"
    )
    for mask in masks:
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        rle["counts"] = rle["counts"].decode()
        read = page.evaluate("(rle) => { const m = read(rle); return [[...m.bits], m.area]; }", rle)
        assert read[0] == mask.astype(int).ravel().tolist()
        assert read[1] == pytest.approx(mask.mean())
    wide = np.zeros((1000, 3000), bool)
    wide[250:750, 600:2400] = True
    rle = coco_mask.encode(np.asfortranarray(wide.astype(np.uint8)))
    rle["counts"] = rle["counts"].decode()
    width, height, share = page.evaluate(
        "(rle) => { const m = read(rle); return [m.width, m.height, m.bits.reduce((a, b) => a + b) / m.bits.length]; }",
        rle,
    )
    assert (width, height) == (1024, 341)
    assert share == pytest.approx(wide.mean(), abs=0.01)
    page.context.close()


def test_a_panoptic_map_is_asked_for_again_when_the_slider_is_let_go(server: Server, visit: Open) -> None:
    opened = visit()
    opened.choose(png(120, 180))
    opened.until_answered()
    opened.page.check("#modes input[value=panoptic]")
    opened.until_answered()
    opened.slide(0.2)
    opened.page.locator("#threshold").dispatch_event("change")
    opened.until_answered()
    assert server.asked[-1] == "/v1/segment?threshold=0.2&kind=panoptic&format=rle"


def test_a_model_without_masks_offers_boxes_only(server: Server, visit: Open) -> None:
    server.tasks = ["detect"]
    opened = visit()
    opened.choose(png(60, 90))
    opened.until_answered()
    assert not opened.page.locator("#modes").is_visible()


@pytest.mark.parametrize(
    ("status", "title", "button"),
    [
        (400, "not a picture that can be read", None),
        (415, "not a picture that can be read", None),
        (409, "cannot do that", "Try again"),
        (413, "too large for this server", "Send a smaller copy"),
        (422, "does not understand", "Try again"),
        (429, "The server is busy", "Try now"),
        (500, "The server failed", "Try again"),
        (503, "No model is ready yet", "Try now"),
        (504, "It took too long", "Try again"),
    ],
)
def test_each_refusal_is_explained_and_can_be_got_over(
    server: Server, visit: Open, status: int, title: str, button: str | None
) -> None:
    server.replies.append((status, "the reason", {"Retry-After": "100"} if status in (429, 503) else {}))
    opened = visit(refusals=(status,))
    opened.choose(png(60, 90))
    message = opened.page.locator("#message")
    expect(message).to_contain_text(title)
    expect(message).to_contain_text("The server says: the reason (request abc-123)")
    assert message.get_attribute("role") == "alert"
    if button is None:
        assert message.locator("button").count() == 0
        opened.choose(png(60, 90, seed=1))
    else:
        message.locator("button", has_text=button).click()
    opened.until_answered()
    expect(message).to_be_hidden()
    assert len(server.asked) == 2


def test_a_busy_server_is_asked_again_after_the_time_it_names(server: Server, visit: Open) -> None:
    server.replies.extend([(429, "busy", {"Retry-After": "1"})] * 2)
    opened = visit(refusals=(429,))
    opened.choose(png(60, 90))
    opened.until_answered()
    expect(opened.page.locator("#list, #lower").first).to_be_attached()
    expect(opened.page.locator("#message")).to_be_hidden(timeout=30_000)
    expect(opened.page.locator("#caption")).to_contain_text("answered in", timeout=30_000)
    assert len(server.asked) == 3


def test_a_smaller_copy_is_smaller(server: Server, visit: Open) -> None:
    server.replies.append((413, "The image has too many pixels.", {}))
    opened = visit(refusals=(413,))
    opened.choose(png(900, 2400))
    opened.page.locator("#message button").click()
    opened.until_answered()
    assert Image.open(io.BytesIO(server.bodies[1])).size == (1600, 600)
    assert "sent as a smaller copy" in opened.page.locator("#caption").inner_text()


def test_a_file_that_is_no_picture_is_not_sent(server: Server, visit: Open) -> None:
    opened = visit()
    opened.choose(b"just text", "notes.txt", "text/plain")
    expect(opened.page.locator("#message")).to_contain_text("“notes.txt” cannot be opened")
    assert server.asked == []
    opened.choose(png(60, 90))
    opened.until_answered()
    assert not opened.page.locator("#message").is_visible()


def test_a_network_that_is_down_is_said_and_got_over(server: Server, visit: Open) -> None:
    opened = visit(refusals=(0,))
    expect(opened.page.locator("#model")).to_contain_text("raydetr")
    opened.page.context.set_offline(True)
    opened.choose(png(60, 90))
    expect(opened.page.locator("#message")).to_contain_text("The server does not answer")
    opened.page.context.set_offline(False)
    opened.page.locator("#message button").click()
    opened.until_answered()
    expect(opened.page.locator("#message")).to_be_hidden()


def test_a_token_is_asked_for_kept_for_the_tab_and_sent(server: Server, visit: Open) -> None:
    server.token = "secret"
    opened = visit(refusals=(401,))
    page = opened.page
    expect(page.locator("#token-form")).to_contain_text("This server asks for a token.")
    expect(page.get_by_label("Token")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#token-form")).to_contain_text("does not accept this token")
    page.get_by_label("Token").fill("secret\u200b")  # as pasted from a chat
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_contain_text("raydetr, version 3")
    expect(page.locator("#token-form")).to_be_hidden()
    opened.choose(png(60, 90))
    opened.until_answered()
    curl, python = (page.locator(each).text_content() for each in ("#curl", "#python"))
    assert 'Authorization: Bearer $TOKEN"' in curl
    assert 'token=os.environ["TOKEN"]' in python
    assert "secret" not in page.content()
    page.reload()
    expect(page.locator("#model")).to_contain_text("raydetr, version 3")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_a_token_that_is_taken_back_is_asked_for_again_and_the_picture_stays(
    server: Server, visit: Open
) -> None:
    opened = visit(refusals=(401,))
    expect(opened.page.locator("#model")).to_contain_text("raydetr")
    server.token = "new"
    opened.choose(png(60, 90))
    opened.page.get_by_label("Token").fill("new")
    opened.page.keyboard.press("Enter")
    opened.until_answered()
    assert len(server.asked) == 2
    expect(opened.page.locator("#caption")).to_contain_text("answered in")


def test_the_copied_commands_do_what_the_page_does(
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


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window_and_dark_is_dark(server: Server, visit: Open, width: int) -> None:
    server.replies.append((429, "busy " * 40 + "x" * 200, {"Retry-After": "100"}))
    opened = visit(width, dark=True, refusals=(429,))
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


def test_everything_that_can_be_used_has_a_name(server: Server, visit: Open) -> None:
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
