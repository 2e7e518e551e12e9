"""The client against a real HTTP server with scripted replies and failures."""

import contextlib
import inspect
import io
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterator
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import tenacity
from PIL import Image

from raydetr.client import core
from raydetr.client.client import AsyncClient, Client
from raydetr.client.core import Answer, Call, NoResponse
from raydetr.errors import RequestError, ServingError
from raydetr.responses import (
    Box,
    Detection,
    DetectManyResponse,
    DetectResponse,
    ImageInfo,
    ModelInfo,
    SegmentResponse,
    ServedModel,
    Times,
)
from raydetr.serving.bodies import images_of_multipart
from raydetr.serving.images import Limits

DETECTION = {
    "score": 0.9,
    "label": "cat",
    "label_id": 3,
    "box": {"xmin": 1.5, "ymin": 2.0, "xmax": 30.0, "ymax": 40.25},
}
MODEL = {"name": "raydetr", "version": 3}
TIMES = {"prepare_ms": 1.0, "model_ms": 20.0, "total_ms": 22.5}
ONE = {"image": {"height": 60, "width": 90, "orientation": "ignore"}, "detections": [DETECTION]}
DETECTED = {"model": MODEL, **ONE, "times": TIMES}

Reply = Callable[[BaseHTTPRequestHandler], None]


def reply(status: int, content: Any, **headers: str) -> Reply:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def error(status: int, message: str, **headers: str) -> Reply:
    return reply(status, {"error": {"status": status, "message": message}}, **headers)


def reset(handler: BaseHTTPRequestHandler) -> None:
    """Reset the connection, as a server that dies does."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def break_off(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"model"')
    handler.close_connection = True


def trickle(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(1000):
            handler.wfile.write(b" ")
            time.sleep(0.05)
    handler.close_connection = True


class ScriptedServer(ThreadingHTTPServer):
    """Server that sends scripted replies in order and records the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: deque[Reply] = deque()
        self.requests: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that are reset."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = httpx.URL(self.path)
        self.server.requests.append(
            {
                "method": self.command,
                "path": url.path,
                "query": url.params.multi_items(),
                "headers": self.headers,
                "body": body,
            }
        )
        self.server.replies.popleft()(self)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "INITIAL_BACKOFF_S", 0.01)


Ask = Callable[..., Any]


@pytest.fixture(params=["blocking", "asyncio"])
def ask(request: pytest.FixtureRequest, server: ScriptedServer) -> Ask:
    """Call a client method: `ask("detect", image, token="…")`. Each test runs with both clients."""

    def blocking(method: str, *args: Any, endpoint: str, options: dict[str, Any], **kwargs: Any) -> Any:
        with Client(endpoint, **options) as client:
            return getattr(client, method)(*args, **kwargs)

    async def awaiting(method: str, *args: Any, endpoint: str, options: dict[str, Any], **kwargs: Any) -> Any:
        async with AsyncClient(endpoint, **options) as client:
            return await getattr(client, method)(*args, **kwargs)

    def call(method: str, *args: Any, **kwargs: Any) -> Any:
        options = {name: kwargs.pop(name) for name in ("token", "timeout_s", "retries") if name in kwargs}
        kwargs = {"endpoint": server.url, "options": options, **kwargs}
        if request.param == "blocking":
            return blocking(method, *args, **kwargs)
        return anyio.run(partial(awaiting, method, *args, **kwargs))

    return call


def test_detect_sends_the_documented_request_and_parses_the_documented_response(
    server: ScriptedServer, ask: Ask
) -> None:
    DetectResponse.model_validate(DETECTED)  # the reply has the schema of the endpoint
    server.replies.append(reply(200, DETECTED))
    result = ask(
        "detect",
        b"image",
        0.25,
        top_k=7,
        classes=["cat", "traffic light"],
        orientation="apply",
        token="secret",
    )
    box = Box(xmin=1.5, ymin=2.0, xmax=30.0, ymax=40.25)
    assert result.detections == [Detection(score=0.9, label="cat", label_id=3, box=box)]
    assert result.model == ModelInfo(name="raydetr", version=3)
    assert result.image == ImageInfo(height=60, width=90, orientation="ignore")
    assert result.times == Times(prepare_ms=1.0, model_ms=20.0, total_ms=22.5)
    assert json.loads(json.dumps(result.model_dump())) == DETECTED
    (request,) = server.requests
    assert (request["method"], request["path"], request["body"]) == ("POST", "/v1/detect", b"image")
    assert request["query"] == [
        ("threshold", "0.25"),
        ("top_k", "7"),
        ("classes", "cat"),
        ("classes", "traffic light"),
        ("orientation", "apply"),
    ]
    assert request["headers"]["Content-Type"] == "application/octet-stream"
    assert request["headers"]["Authorization"] == "Bearer secret"


def test_parameters_that_are_not_given_are_not_sent(server: ScriptedServer, ask: Ask) -> None:
    server.replies.append(reply(200, DETECTED))
    ask("detect", b"image")
    (request,) = server.requests
    assert request["query"] == [("threshold", "0.5")]
    assert request["headers"]["Authorization"] is None


def test_paths_and_pillow_images_are_sent_as_encoded_files(
    server: ScriptedServer, ask: Ask, tmp_path: Path
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"of the file")
    image = Image.new("RGB", (4, 3), (10, 200, 30))
    server.replies.extend([reply(200, DETECTED)] * 4)
    ask("detect", tmp_path / "a.jpg")
    ask("detect", str(tmp_path / "a.jpg"))
    ask("detect", image)
    ask("detect", image.convert("CMYK"))
    bodies = [request["body"] for request in server.requests]
    assert bodies[:2] == [b"of the file"] * 2
    sent = Image.open(io.BytesIO(bodies[2]))
    assert (sent.format, sent.size, sent.getpixel((0, 0))) == ("PNG", (4, 3), (10, 200, 30))
    assert Image.open(io.BytesIO(bodies[3])).mode == "RGB"
    with pytest.raises(FileNotFoundError):
        ask("detect", tmp_path / "none.jpg")
    with pytest.raises(TypeError, match="image is a int: expected bytes"):
        ask("detect", 5)
    with pytest.raises(TypeError, match="expected a list of names"):
        ask("detect", b"image", classes="cat")


def test_detect_many_sends_a_few_images_per_request_and_returns_results_in_order(
    server: ScriptedServer, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "IMAGES_PER_REQUEST", 2)
    monkeypatch.setattr(core, "BYTES_PER_REQUEST", 1000)
    images = [b"0" * 10, b"1" * 10, b"2" * 10, b"3" * 995, b"4" * 2000]

    def sizes(*widths: int) -> Reply:
        each = [
            {"image": {"height": 1, "width": width, "orientation": "ignore"}, "detections": [DETECTION]}
            for width in widths
        ]
        DetectManyResponse.model_validate({"model": MODEL, "results": each, "times": TIMES})
        return reply(200, {"model": MODEL, "results": each, "times": TIMES})

    server.replies.extend([sizes(0, 1), sizes(2), error(429, "busy"), sizes(3), sizes(4)])
    results = ask("detect_many", iter(images), threshold=0.1)
    assert [result.image.width for result in results] == [0, 1, 2, 3, 4]
    assert results[0].detections[0].label == "cat"
    sent = []
    for request in server.requests:
        kind, _, boundary = request["headers"]["Content-Type"].partition("; boundary=")
        assert kind == "multipart/form-data"
        sent.append(images_of_multipart(request["body"], boundary.encode(), Limits()))  # as the endpoint does
    assert sent == [images[:2], [images[2]], [images[3]], [images[3]], [images[4]]]
    assert all(request["query"] == [("threshold", "0.1")] for request in server.requests)
    assert ask("detect_many", []) == []


def test_the_error_for_a_bad_image_among_many_names_its_request(
    server: ScriptedServer, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "IMAGES_PER_REQUEST", 2)
    two = reply(200, {"model": MODEL, "results": [ONE, ONE], "times": TIMES})
    server.replies.extend([two, error(415, "Image 1 is not an image.")])
    with pytest.raises(
        RequestError, match=r"images 3 to 4, sent in one request: .* Image 1 is not"
    ) as caught:
        ask("detect_many", [b"0", b"1", b"2", b"3"])
    assert caught.value.status == 415
    server.replies.append(two)
    with pytest.raises(ServingError, match="2 results for 1 images"):
        ask("detect_many", [b"0"])


def test_segments_have_masks_with_rle_and_a_map_with_png(server: ScriptedServer, ask: Ask) -> None:
    segment = {"id": 1, "label": "cat", "label_id": 3, "score": 0.8, "mask": {"size": [2, 3], "counts": "06"}}
    answer = {"model": MODEL, "image": ONE["image"], "segments": [segment], "map": None, "times": TIMES}
    mapped = {
        **answer,
        "segments": [{**segment, "mask": None, "score": None}],
        "map": b64encode(b"PNG").decode(),
    }
    for each in (answer, mapped):
        SegmentResponse.model_validate(each)
        server.replies.append(reply(200, each))
    by_masks = ask("segment", b"image", "panoptic", 0.3)
    assert by_masks.segments[0].mask.size == (2, 3)
    assert json.loads(json.dumps(by_masks.model_dump())) == answer
    by_map = ask("segment", b"image", "semantic", format="png")
    assert by_map.map_png == b"PNG"
    assert (by_map.segments[0].mask, by_map.segments[0].score) == (None, None)
    assert server.requests[0]["query"] == [("kind", "panoptic"), ("threshold", "0.3"), ("format", "rle")]
    assert server.requests[1]["query"] == [("kind", "semantic"), ("format", "png")]
    server.replies.append(error(409, "The model has no mask head."))
    with pytest.raises(RequestError, match="no mask head") as caught:
        ask("segment", b"image")
    assert caught.value.status == 409


def test_models_and_health_are_parsed(server: ScriptedServer, ask: Ask) -> None:
    model = {**MODEL, "labels": ["ant", "bee"], "tasks": ["detect"]}
    server.replies.extend([reply(200, {"models": [model]}), reply(200, {"status": "ok", "model": MODEL})])
    assert ask("models") == [ServedModel.model_validate(model)]
    assert ask("health").model_dump() == {"status": "ok", "model": MODEL}
    assert [request["path"] for request in server.requests] == ["/v1/models", "/health"]


def test_ready_sends_one_request_and_returns_a_bool(server: ScriptedServer, ask: Ask) -> None:
    server.replies.extend(
        [reply(200, {"ready": True}), reply(503, {"ready": False}), error(404, "Not Found")]
    )
    assert ask("ready") is True
    assert ask("ready") is False
    with pytest.raises(RequestError, match="404"):
        ask("ready")
    assert ask("ready", endpoint=unused_url()) is False
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "trouble",
    [
        error(429, "busy", Retry_After="0"),
        error(503, "no replica"),
        reset,
        reply(500, b"Internal Server Error"),
    ],
    ids=["429", "503", "reset", "500 of Ray's proxy"],
)
def test_transient_errors_are_retried_with_the_same_body(
    server: ScriptedServer, ask: Ask, trouble: Reply
) -> None:
    server.replies.extend([trouble, trouble, trouble, reply(200, DETECTED)])
    assert ask("detect", b"image" * 100_000).model.name == "raydetr"
    assert [request["body"] for request in server.requests] == [b"image" * 100_000] * 4


def test_a_refused_connection_is_retried_until_the_server_starts(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "INITIAL_BACKOFF_S", 0.2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = listener.getsockname()

        def start() -> None:
            listener.listen()
            connection, _ = listener.accept()
            with connection:
                connection.recv(10_000)
                body = json.dumps({"status": "ok", "model": MODEL}).encode()
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

        timer = threading.Timer(0.3, start)
        timer.start()
        assert ask("health", endpoint=f"http://127.0.0.1:{address[1]}").status == "ok"
        timer.join()


@pytest.mark.parametrize(("status", "raised"), [(429, RequestError), (503, ServingError)], ids=["429", "503"])
def test_a_persistent_error_is_raised_after_the_last_retry(
    server: ScriptedServer, ask: Ask, status: int, raised: type[ServingError]
) -> None:
    server.replies.extend([error(status, "full up")] * 3)
    with pytest.raises(raised, match=f"answered {status}: full up"):
        ask("detect", b"image", retries=2)
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 415, 422])
def test_a_rejected_request_is_not_retried(server: ScriptedServer, ask: Ask, status: int) -> None:
    server.replies.append(error(status, "not so", X_Request_Id="abc-1"))
    with pytest.raises(RequestError, match=r"/v1/detect answered .*: not so \(request abc-1\)") as caught:
        ask("detect", b"image", token="secret")
    assert caught.value.status == status
    assert "secret" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [500, 504])
def test_a_server_error_is_not_a_request_error(server: ScriptedServer, ask: Ask, status: int) -> None:
    server.replies.append(error(status, "out of order"))
    with pytest.raises(ServingError, match="out of order") as caught:
        ask("detect", b"image")
    assert not isinstance(caught.value, RequestError)
    assert len(server.requests) == 1


def test_an_incomplete_response_is_an_error_and_not_retried(server: ScriptedServer, ask: Ask) -> None:
    server.replies.append(break_off)
    with pytest.raises(ServingError, match="did not finish its response"):
        ask("detect", b"image")
    assert len(server.requests) == 1


@pytest.mark.parametrize("slow", [trickle, lambda _: time.sleep(3)], ids=["slow chunks", "silent"])
def test_the_timeout_covers_the_whole_response(server: ScriptedServer, ask: Ask, slow: Reply) -> None:
    server.replies.append(slow)
    with pytest.raises(ServingError, match=r"no answer within 0\.3 s"):
        ask("detect", b"image", timeout_s=0.3)
    assert len(server.requests) == 1


def test_a_wait_that_exceeds_the_remaining_time_is_not_started(server: ScriptedServer, ask: Ask) -> None:
    server.replies.append(error(429, "come back later", Retry_After="3600"))
    with pytest.raises(RequestError, match="come back later"):
        ask("detect", b"image", timeout_s=20)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply(200, b"<html>"), "answered 200 without JSON"),
        (reply(200, {"status": "ok"}), "sent an unexpected response"),
        (reply(200, [1]), "sent an unexpected response"),
        (reply(502, b"Bad gateway"), "answered 502 without JSON"),
        (reply(307, {"detail": "elsewhere"}, Location="/"), "answered 307"),
    ],
)
def test_a_server_that_is_not_the_endpoint_is_detected(
    server: ScriptedServer, ask: Ask, answer: Reply, message: str
) -> None:
    server.replies.append(answer)
    with pytest.raises(ServingError, match=message):
        ask("health")


def test_a_proxys_error_keeps_its_status(server: ScriptedServer, ask: Ask) -> None:
    server.replies.extend([reply(413, b"<html>"), reply(403, {"detail": "not from here"})])
    with pytest.raises(RequestError, match="413 without JSON") as caught:
        ask("detect", b"image")
    assert caught.value.status == 413
    with pytest.raises(RequestError, match="not from here"):
        ask("detect", b"image")


def unused_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_url_where_nothing_listens_is_an_error(ask: Ask) -> None:
    with pytest.raises(ServingError, match=r"GET http://127.0.0.1:[0-9]+/health does not answer"):
        ask("health", endpoint=unused_url(), retries=2)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:8000", "", "ftp://host", "http://", "http://[::1"])
def test_an_endpoint_that_is_not_an_http_url_is_rejected(ask: Ask, endpoint: str) -> None:
    with pytest.raises(ServingError, match="give http://HOST:PORT"):
        ask("health", endpoint=endpoint)


@pytest.mark.parametrize("token", ["", "secret\n", "sec\nret", " secret", "sécret"])
def test_a_token_that_a_header_cannot_hold_is_rejected_without_being_printed(ask: Ask, token: str) -> None:
    with pytest.raises(ServingError, match=r"^The token is empty, or contains") as caught:
        ask("health", token=token)
    assert "cret" not in str(caught.value)


def test_an_endpoint_may_have_a_path_prefix(server: ScriptedServer, ask: Ask) -> None:
    server.replies.append(reply(200, {"status": "ok", "model": MODEL}))
    ask("health", endpoint=f"{server.url}/detector/")
    assert server.requests[0]["path"] == "/detector/health"


def test_a_client_reuses_its_connection_and_reconnects_when_it_is_closed(server: ScriptedServer) -> None:
    """A server may close an idle connection just when the next request is sent."""

    def last(handler: BaseHTTPRequestHandler) -> None:
        reply(200, DETECTED)(handler)
        handler.close_connection = True  # without a `Connection: close` header

    ports: list[int] = []

    def record_port(answer: Reply) -> Reply:
        return lambda handler: (ports.append(handler.client_address[1]), answer(handler))[1]

    server.replies.extend(
        [record_port(reply(200, DETECTED)), record_port(last), record_port(reply(200, DETECTED))]
    )
    with Client(server.url) as client:
        for _ in range(3):
            client.detect(b"image")
    assert ports[0] == ports[1] != ports[2]


def waits(outcomes: list[Answer | NoResponse], timeout_s: float = 1e6, retries: int = 50) -> list[float]:
    """Return the seconds that a call waits after each outcome, without waiting."""
    call = Call(httpx.Request("GET", "http://host/"), lambda _: None, timeout_s, retries)
    pauses: list[float] = []
    remaining = iter([*outcomes, Answer(200, httpx.Headers(), b"{}")])
    tenacity.Retrying(**call.policy(), sleep=pauses.append)(lambda: next(remaining))
    return pauses


def busy(**headers: str) -> Answer:
    return Answer(429, httpx.Headers({k.replace("_", "-"): v for k, v in headers.items()}), b"{}")


def test_the_backoff_doubles_up_to_a_limit_and_has_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "INITIAL_BACKOFF_S", 0.25)
    several = [waits([busy()] * 12) for _ in range(8)]
    for place, pauses in enumerate(zip(*several, strict=True)):
        maximum = min(0.25 * 2**place, core.MAX_BACKOFF_S)
        assert all(0 <= pause <= maximum for pause in pauses)
        assert len(set(pauses)) == len(pauses)


def test_retry_after_is_honored_in_seconds_and_as_a_date() -> None:
    assert 7 <= waits([busy(Retry_After="7")])[0] < 8
    assert 28 <= waits([busy(Retry_After=formatdate(time.time() + 30, usegmt=True))])[0] < 31
    for other in ("soon", "-3", formatdate(time.time() - 30, usegmt=True)):
        assert 0 < waits([busy(Retry_After=other)])[0] < 1


def test_a_timeout_is_not_retried() -> None:
    assert waits([NoResponse(httpx.ReadTimeout(""))]) == []
    assert waits([NoResponse(httpx.ConnectTimeout(""))]) == []


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> dict[str, list[str]]:
        return {
            name: [str(parameter) for parameter in inspect.signature(method).parameters.values()]
            for name, method in vars(kind).items()
            if not name.startswith("_")
        }

    assert public(Client) == public(AsyncClient)


def test_the_client_imports_no_heavy_dependency() -> None:
    code = (
        "import sys, raydetr.client.client\n"
        "heavy = {'PIL', 'ray', 'torch', 'numpy', 'mlflow', 'fastapi', 'pyarrow', 'detr'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
