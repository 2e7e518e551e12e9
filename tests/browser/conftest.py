"""Fixtures: a real browser (chromium), and the endpoint's page with a real model behind it, without Ray."""

import shutil
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from playwright.sync_api import Browser, sync_playwright

from detr.inference.detector import ObjectDetector
from tests.browser.endpoint import NAMES, Open, Server, Visit, application
from tests.tiny_detr import add_mask_head, save_tiny_detr


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start a browser for one module: while playwright runs, no other test can use an event loop."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium: install one (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=120_000)
        yield browser
        browser.close()


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


@pytest.fixture
def visit(browser: Browser, server: Server) -> Iterator[Open]:
    """Open the page. At the end it must have sent requests to this server only, and logged only the expected errors."""
    visits: list[tuple[Visit, tuple[int, ...]]] = []

    def open_one(width: int = 1280, dark: bool = False, errors: tuple[int, ...] = ()) -> Visit:
        visits.append((Visit(browser, server.url, width, dark), errors))
        return visits[-1][0]

    yield open_one
    for context in browser.contexts:
        context.close()
    for each, errors in visits:
        expected = [
            message
            for message in each.messages
            if any(f"status of {status} " in message for status in errors)
            or (0 in errors and "net::ERR_" in message)
        ]
        assert each.messages == expected
        foreign = [
            url for url in each.requests if not url.startswith((server.url, "data:", f"blob:{server.url}"))
        ]
        assert foreign == []
