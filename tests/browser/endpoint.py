"""Helpers of the tests of the endpoint's page: a server that follows the API contract, and an open page."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from playwright.sync_api import Browser, Page, expect

from detr.image_processing.decode import ImageError, Orientation
from detr.inference.detector import ObjectDetector, prepare_image
from raydetr.serving.page import index
from raydetr.serving.segments import SegmentRequest, segments

NAMES = ["ant", "bee", "cat", "<b>dog</b>"]
MODEL = {"name": "raydetr", "version": 3}
TIMES = {"prepare_ms": 1.0, "model_ms": 2.0, "total_ms": 4.0}


@dataclass
class Server:
    """State of the server behind the page.

    replies: error responses to the next POST requests: status, message, headers.
    tasks: tasks of the model.
    token: required token; None requires none.
    posts: paths and queries of the POST requests.
    bodies: bodies of the POST requests.
    sizes: (height, width) of the decoded images.
    applies_orientation: whether `orientation=apply` has an effect.
    """

    url: str
    detector: ObjectDetector
    replies: deque[tuple[int, str, dict[str, str]]] = field(default_factory=deque)
    tasks: list[str] = field(default_factory=lambda: ["detect", "segment"])
    token: str | None = None
    posts: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    applies_orientation: bool = True

    def detections(self, image: bytes) -> list[dict[str, Any]]:
        return self.detector.detect_image(image)


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    answer = {"error": {"status": status, "message": message}}
    return JSONResponse(answer, status, {"X-Request-Id": "abc-123", **(headers or {})})


def application(server: Server) -> FastAPI:
    app = FastAPI()
    id2label = server.detector.model.config.id2label

    @app.middleware("http")
    async def guard(request: Request, call: Callable[[Request], Any]) -> Response:
        if request.method == "POST":
            server.posts.append(f"{request.url.path}?{request.url.query}")
            server.bodies.append(await request.body())
        if request.url.path.startswith("/v1/"):
            given = request.headers.get("authorization", "")
            if server.token is not None and given != f"Bearer {server.token}":
                return error_response(401, "A token is missing or wrong.", {"WWW-Authenticate": "Bearer"})
            if request.method == "POST" and server.replies:
                return error_response(*server.replies.popleft())
        response: Response = await call(request)
        return response

    @app.get("/")
    def page() -> Response:
        return Response(index(), media_type="text/html; charset=utf-8")

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"models": [{**MODEL, "labels": NAMES, "tasks": server.tasks}]}

    @app.post("/v1/detect", response_model=None)
    async def detect(
        request: Request, threshold: float = 0.5, orientation: Orientation = "ignore"
    ) -> dict[str, Any] | JSONResponse:
        data = await request.body()
        try:
            applied = orientation if server.applies_orientation else "ignore"
            prepared = prepare_image(data, server.detector.image_processor, orientation=applied)
        except ImageError as error:
            return error_response(415, f"The body is not a readable image: {error}.")
        height, width = prepared.original_size
        server.sizes.append((height, width))
        detections = server.detector.detect([prepared])[0].to_dicts(id2label)
        selected = [each for each in detections if each["score"] >= threshold]
        image = {"height": height, "width": width, "orientation": applied}
        return {"model": MODEL, "image": image, "detections": selected, "times": TIMES}

    @app.post("/v1/segment")
    async def segment(
        request: Request,
        kind: str,
        threshold: float = 0.5,
        format: str = "rle",
        orientation: Orientation = "ignore",
    ) -> dict[str, Any]:
        data = await request.body()
        prepared = prepare_image(data, server.detector.image_processor, orientation=orientation)
        height, width = prepared.original_size
        options = SegmentRequest(kind, threshold, format)  # type: ignore[arg-type]
        outputs = server.detector.run([prepared])
        fields = segments(outputs, prepared, options, id2label)
        return {
            "model": MODEL,
            "image": {"height": height, "width": width, "orientation": orientation},
            **fields,
            "times": TIMES,
        }

    return app


class Visit:
    """The open page, with its console messages and requests."""

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


PIXELS = """
const shown = document.getElementById("canvas");
const canvas = new OffscreenCanvas(shown.width, shown.height);
const context = canvas.getContext("2d", { willReadFrequently: true });
context.drawImage(shown, 0, 0);
const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
"""


def pixels(page: Page) -> int:
    """Return a hash of the pixels of the canvas."""
    return page.evaluate(
        f"() => {{{PIXELS} return data.reduce((sum, each) => (sum * 31 + each) % 1000003, 7); }}"
    )


def drawn_bounds(page: Page) -> list[float] | None:
    """Return the bounds of what is drawn on the gray 180 × 120 image, in pixels of the image."""
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
