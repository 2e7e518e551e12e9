"""Error handling of the endpoint's page, in a real browser: error responses, tokens, an unreachable server."""

import io

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.browser.endpoint import Open, Server
from tests.tiny_detr import png

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("status", "title", "button"),
    [
        (400, "not a readable image", None),
        (415, "not a readable image", None),
        (409, "has no masks", "Try again"),
        (413, "too large for this server", "Send a smaller copy"),
        (422, "does not understand", "Try again"),
        (429, "The server is busy", "Try now"),
        (500, "The server failed", "Try again"),
        (503, "No model is ready yet", "Try now"),
        (504, "The request timed out", "Try again"),
    ],
)
def test_each_error_is_explained_and_recoverable(
    server: Server, visit: Open, status: int, title: str, button: str | None
) -> None:
    server.replies.append((status, "the reason", {"Retry-After": "100"} if status in (429, 503) else {}))
    opened = visit(errors=(status,))
    opened.choose(png(60, 90))
    message = opened.page.locator("#message")
    expect(message).to_contain_text(title)
    expect(message).to_contain_text("Message of the server: the reason (request abc-123)")
    assert message.get_attribute("role") == "alert"
    if button is None:
        assert message.locator("button").count() == 0
        opened.choose(png(60, 90, seed=1))
    else:
        message.locator("button", has_text=button).click()
    opened.until_answered()
    expect(message).to_be_hidden()
    assert len(server.posts) == 2


def test_a_busy_server_is_retried_after_its_retry_after(server: Server, visit: Open) -> None:
    server.replies.extend([(429, "busy", {"Retry-After": "1"})] * 2)
    opened = visit(errors=(429,))
    opened.choose(png(60, 90))
    opened.until_answered()
    expect(opened.page.locator("#list, #lower").first).to_be_attached()
    expect(opened.page.locator("#message")).to_be_hidden(timeout=30_000)
    expect(opened.page.locator("#caption")).to_contain_text("answered in", timeout=30_000)
    assert len(server.posts) == 3


def test_a_smaller_copy_is_sent_after_413(server: Server, visit: Open) -> None:
    server.replies.append((413, "The image has too many pixels.", {}))
    opened = visit(errors=(413,))
    opened.choose(png(900, 2400))
    opened.page.locator("#message button").click()
    opened.until_answered()
    assert Image.open(io.BytesIO(server.bodies[1])).size == (1600, 600)
    assert "sent as a smaller copy" in opened.page.locator("#caption").inner_text()


def test_a_file_that_is_not_an_image_is_not_sent(server: Server, visit: Open) -> None:
    opened = visit()
    opened.choose(b"just text", "notes.txt", "text/plain")
    expect(opened.page.locator("#message")).to_contain_text("“notes.txt” cannot be opened")
    assert server.posts == []
    opened.choose(png(60, 90))
    opened.until_answered()
    assert not opened.page.locator("#message").is_visible()


def test_a_network_failure_is_reported_and_recoverable(server: Server, visit: Open) -> None:
    opened = visit(errors=(0,))
    expect(opened.page.locator("#model")).to_contain_text("raydetr")
    opened.page.context.set_offline(True)
    opened.choose(png(60, 90))
    expect(opened.page.locator("#message")).to_contain_text("The server does not answer")
    opened.page.context.set_offline(False)
    opened.page.locator("#message button").click()
    opened.until_answered()
    expect(opened.page.locator("#message")).to_be_hidden()


def test_a_token_is_requested_stored_for_the_tab_and_sent(server: Server, visit: Open) -> None:
    server.token = "secret"
    opened = visit(errors=(401,))
    page = opened.page
    expect(page.locator("#token-form")).to_contain_text("This server requires a token.")
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


def test_a_revoked_token_is_requested_again_and_the_image_stays(server: Server, visit: Open) -> None:
    opened = visit(errors=(401,))
    expect(opened.page.locator("#model")).to_contain_text("raydetr")
    server.token = "new"
    opened.choose(png(60, 90))
    opened.page.get_by_label("Token").fill("new")
    opened.page.keyboard.press("Enter")
    opened.until_answered()
    assert len(server.posts) == 2
    expect(opened.page.locator("#caption")).to_contain_text("answered in")
