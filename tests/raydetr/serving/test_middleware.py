import asyncio
import json
import re

import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from raydetr.errors import ConfigError, RequestError
from raydetr.serving.images import Limits
from raydetr.serving.request_id import sane_request_id
from raydetr.serving.stack import add_middlewares
from tests.raydetr.serving.guarded_app import ask, call, guarded_app, log_lines, message_of, scope_of
from tests.tiny_detr import png

LIMITS = Limits(max_bytes=50_000, max_pixels=100 * 100)


@pytest.fixture
def api():
    return guarded_app(LIMITS)


def logged(log):
    return [json.loads(line) for line in log.getvalue().splitlines()]


@pytest.mark.parametrize("path", ["/health", "/nowhere", "/broken", "/v1/detect"])
def test_every_answer_has_the_clients_request_id(api, path):
    answer = ask(api, "GET", path, headers={"X-Request-Id": "my.id_1-A"})
    assert answer.headers.get_list("X-Request-Id") == ["my.id_1-A"]


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 65, "a\nb", "id/../x", "é", "a,b", "<script>", "٣"])
def test_an_invalid_request_id_is_replaced(given):
    made = sane_request_id(given)
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert made != sane_request_id(given)


def test_an_invalid_request_id_is_not_returned(api):
    answer = ask(api, "GET", "/health", headers={"X-Request-Id": "x" * 100})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-Id"])


def test_an_internal_error_is_logged_under_the_request_id_but_not_returned(api):
    log = log_lines()
    answer = ask(api, "GET", "/broken")
    request_id = answer.headers["X-Request-Id"]
    assert answer.status_code == 500
    assert message_of(answer) == f"The server failed: see its log under request id {request_id}."
    (line,) = logged(log)
    assert (line["request_id"], line["status"], line["route"]) == (request_id, 500, "/broken")
    assert "internal secret" in line["error"]
    assert "guarded_app.py" in line["error"]


def test_a_request_logs_one_line_without_its_content(api):
    log = log_lines()
    image = png(40, 50)
    answer = ask(api, "POST", "/v1/detect?threshold=0.123", content=image, headers={"X-Request-Id": "one"})
    ask(api, "GET", "/secret/path")
    first, second = logged(log)
    assert first.pop("ms") >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first == {
        "request_id": "one",
        "client": None,
        "method": "POST",
        "route": "/v1/detect",
        "status": 200,
        "bytes_in": len(image),
        "bytes_out": len(answer.content),
        "model": "tiny/3",
    }
    assert (second["status"], second["route"]) == (404, None)
    assert not re.search(r"PNG|0\.123|secret", log.getvalue())


def test_a_line_break_in_a_request_adds_no_log_line(api):
    log = log_lines()
    asyncio.run(call(api, scope_of("/v1/detect\n{}", 'GET\n{"status": 200}' * 10)))
    (line,) = logged(log)
    assert len(line["method"]) == 16


def test_a_request_without_an_answer_is_504_at_the_deadline():
    log = log_lines()
    answer = ask(guarded_app(Limits(deadline_s=0.05)), "GET", "/asleep")
    assert answer.status_code == 504
    assert "within 0.05 seconds" in message_of(answer)
    assert logged(log)[0]["status"] == 504


def test_a_body_that_does_not_end_is_408():
    api = guarded_app(Limits(body_s=0.05))
    log = log_lines()
    scope = scope_of("/v1/detect", content_type="image/png")
    start, body = asyncio.run(call(api, scope, png(5, 5)[:40], then="hang"))
    assert start["status"] == 408
    assert (b"connection", b"close") in start["headers"]
    assert b"within 0.05 seconds" in body["body"]
    assert logged(log)[0]["bytes_in"] == 40


def test_a_slow_body_is_408_although_each_chunk_is_quick():
    api = guarded_app(Limits(body_s=0.1, max_bytes=10**9))

    async def run():
        async def receive():
            await asyncio.sleep(0.005)
            return {"type": "http.request", "body": b"x", "more_body": True}

        messages = []

        async def send(message):
            messages.append(message)

        await api(scope_of("/v1/detect"), receive, send)
        return messages

    assert asyncio.run(run())[0]["status"] == 408


def test_the_body_limit_does_not_apply_to_the_answer():
    api = FastAPI()

    @api.post("/slow")
    async def slow() -> str:
        await asyncio.sleep(0.2)
        return "done"

    add_middlewares(api, Limits(body_s=0.05, deadline_s=60))
    assert ask(api, "POST", "/slow", content=b"x").json() == "done"


def test_a_timeout_error_of_the_app_is_not_the_deadline():
    api = FastAPI()

    @api.get("/late")
    async def late() -> None:
        raise TimeoutError("internal")

    add_middlewares(api, Limits())
    assert ask(api, "GET", "/late").status_code == 500


def test_request_errors_without_a_handler_are_answered():
    api = FastAPI()

    @api.get("/conflict")
    async def conflict() -> None:
        raise RequestError(409, "The model has no mask head.")

    add_middlewares(api, Limits())
    answer = ask(api, "GET", "/conflict")
    assert (answer.status_code, message_of(answer)) == (409, "The model has no mask head.")


def test_an_incomplete_response_is_logged_as_500():
    api = FastAPI()

    @api.get("/half")
    async def half() -> StreamingResponse:
        async def pieces():
            yield b"first"
            raise OSError("disk")

        return StreamingResponse(pieces())

    add_middlewares(api, Limits())
    log = log_lines()
    with pytest.raises(OSError, match="disk"):
        ask(api, "GET", "/half")
    (line,) = logged(log)
    assert (line["status"], line["bytes_out"]) == (500, 5)
    assert "OSError: disk" in line["error"]


def test_a_cancelled_request_is_logged_and_stays_cancelled(api):
    log = log_lines()

    async def run():
        task = asyncio.ensure_future(call(api, scope_of("/asleep", "GET")))
        await asyncio.sleep(0.05)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert logged(log)[0]["status"] == 499


def test_websockets_are_closed_and_not_logged(tmp_path):
    from raydetr.serving.auth import Tokens

    file = tmp_path / "tokens"
    file.write_text("0" * 64 + "  alice")
    log = log_lines()
    sent = asyncio.run(call(guarded_app(LIMITS, Tokens(file)), {"type": "websocket", "path": "/health"}))
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert log.getvalue() == ""


@pytest.mark.parametrize("name", ["max_bytes", "max_pixels", "max_images", "body_s", "deadline_s"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_limit_that_is_not_positive_is_rejected(name, value):
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: value})
