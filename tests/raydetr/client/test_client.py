"""The client against a real HTTP server that answers as it is told, or does not."""

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
from dataclasses import asdict
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from PIL import Image

from raydetr.client import calls, exchange
from raydetr.client.client import AsyncClient, Client
from raydetr.client.exchange import Answer, Lost, Send, Wait
from raydetr.client.results import Box, Detection, ImageSize, Model, ServedModel, Times
from raydetr.errors import RequestError, ServingError
from raydetr.serving import schemas
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
    """Ends the connection as a server that dies does."""
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


class Scripted(ThreadingHTTPServer):
    """Gives its replies one after the other, and keeps what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: deque[Reply] = deque()
        self.asked: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that is reset is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = httpx.URL(self.path)
        self.server.asked.append(
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
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as server:
        threading.Thread(target=partial(server.serve_forever, 0.01), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "FIRST_WAIT_S", 0.01)


Ask = Callable[..., Any]


@pytest.fixture(params=["blocking", "asyncio"])
def ask(request: pytest.FixtureRequest, server: Scripted) -> Ask:
    """Calls a method of a client: `ask("detect", image, token="…")`; both clients pass every test."""

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


def test_a_detection_is_asked_for_and_read_as_the_contract_says(server: Scripted, ask: Ask) -> None:
    schemas.DetectResponse.model_validate(DETECTED)  # what we read here is what the endpoint writes
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
    assert result.detections == (Detection(0.9, "cat", 3, Box(1.5, 2.0, 30.0, 40.25)),)
    assert result.model == Model("raydetr", 3)
    assert result.image == ImageSize(60, 90, "ignore")
    assert result.times == Times(1.0, 20.0, 22.5)
    assert json.loads(json.dumps(asdict(result))) == DETECTED
    (asked,) = server.asked
    assert (asked["method"], asked["path"], asked["body"]) == ("POST", "/v1/detect", b"image")
    assert asked["query"] == [
        ("threshold", "0.25"),
        ("top_k", "7"),
        ("classes", "cat"),
        ("classes", "traffic light"),
        ("orientation", "apply"),
    ]
    assert asked["headers"]["Content-Type"] == "application/octet-stream"
    assert asked["headers"]["Authorization"] == "Bearer secret"


def test_what_is_not_given_is_not_sent(server: Scripted, ask: Ask) -> None:
    server.replies.append(reply(200, DETECTED))
    ask("detect", b"image")
    (asked,) = server.asked
    assert asked["query"] == [("threshold", "0.5")]
    assert asked["headers"]["Authorization"] is None


def test_a_path_and_a_pillow_image_are_sent_as_files(server: Scripted, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"of the file")
    picture = Image.new("RGB", (4, 3), (10, 200, 30))
    server.replies.extend([reply(200, DETECTED)] * 4)
    ask("detect", tmp_path / "a.jpg")
    ask("detect", str(tmp_path / "a.jpg"))
    ask("detect", picture)
    ask("detect", picture.convert("CMYK"))
    bodies = [asked["body"] for asked in server.asked]
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


def test_many_images_go_out_a_few_at_a_time_and_come_back_in_order(
    server: Scripted, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "IMAGES_PER_REQUEST", 2)
    monkeypatch.setattr(calls, "BYTES_PER_REQUEST", 1000)
    images = [b"0" * 10, b"1" * 10, b"2" * 10, b"3" * 995, b"4" * 2000]

    def sizes(*widths: int) -> Reply:
        each = [
            {"image": {"height": 1, "width": width, "orientation": "ignore"}, "detections": [DETECTION]}
            for width in widths
        ]
        schemas.DetectManyResponse.model_validate({"model": MODEL, "results": each, "times": TIMES})
        return reply(200, {"model": MODEL, "results": each, "times": TIMES})

    server.replies.extend([sizes(0, 1), sizes(2), error(429, "busy"), sizes(3), sizes(4)])
    found = ask("detect_many", iter(images), threshold=0.1)
    assert [result.image.width for result in found] == [0, 1, 2, 3, 4]
    assert found[0].detections[0].label == "cat"
    held = []
    for asked in server.asked:
        kind, _, boundary = asked["headers"]["Content-Type"].partition("; boundary=")
        assert kind == "multipart/form-data"
        held.append(images_of_multipart(asked["body"], boundary.encode(), Limits()))  # as the endpoint does
    assert held == [images[:2], [images[2]], [images[3]], [images[3]], [images[4]]]
    assert all(asked["query"] == [("threshold", "0.1")] for asked in server.asked)
    assert ask("detect_many", []) == []


def test_a_bad_image_among_many_is_placed(
    server: Scripted, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "IMAGES_PER_REQUEST", 2)
    two = reply(200, {"model": MODEL, "results": [ONE, ONE], "times": TIMES})
    server.replies.extend([two, error(415, "Image 1 is not an image.")])
    with pytest.raises(RequestError, match=r"images 3 to 4 of those given, .* Image 1 is not") as caught:
        ask("detect_many", [b"0", b"1", b"2", b"3"])
    assert caught.value.status == 415
    server.replies.append(two)
    with pytest.raises(ServingError, match="2 results for 1 images"):
        ask("detect_many", [b"0"])


def test_segments_have_masks_or_a_map(server: Scripted, ask: Ask) -> None:
    segment = {"id": 1, "label": "cat", "label_id": 3, "score": 0.8, "mask": {"size": [2, 3], "counts": "06"}}
    answer = {"model": MODEL, "image": ONE["image"], "segments": [segment], "map": None, "times": TIMES}
    mapped = {
        **answer,
        "segments": [{**segment, "mask": None, "score": None}],
        "map": b64encode(b"PNG").decode(),
    }
    for each in (answer, mapped):
        schemas.SegmentResponse.model_validate(each)
        server.replies.append(reply(200, each))
    by_masks = ask("segment", b"image", "panoptic", 0.3)
    assert by_masks.segments[0].mask.size == (2, 3)
    assert json.loads(json.dumps(asdict(by_masks))) == answer
    by_map = ask("segment", b"image", "semantic", format="png")
    assert by_map.map == b"PNG"
    assert (by_map.segments[0].mask, by_map.segments[0].score) == (None, None)
    assert server.asked[0]["query"] == [("kind", "panoptic"), ("threshold", "0.3"), ("format", "rle")]
    assert server.asked[1]["query"] == [("kind", "semantic"), ("format", "png")]
    server.replies.append(error(409, "The model has no mask head."))
    with pytest.raises(RequestError, match="no mask head") as caught:
        ask("segment", b"image")
    assert caught.value.status == 409


def test_models_and_health_are_read(server: Scripted, ask: Ask) -> None:
    model = {**MODEL, "labels": ["ant", "bee"], "tasks": ["detect"]}
    server.replies.extend([reply(200, {"models": [model]}), reply(200, {"status": "ok", "model": MODEL})])
    assert ask("models") == [ServedModel("raydetr", 3, ("ant", "bee"), ("detect",))]
    assert asdict(ask("health")) == {"status": "ok", "model": MODEL}
    assert [asked["path"] for asked in server.asked] == ["/v1/models", "/health"]


def test_an_endpoint_is_ready_or_not_and_is_asked_once(server: Scripted, ask: Ask) -> None:
    server.replies.extend(
        [reply(200, {"ready": True}), reply(503, {"ready": False}), error(404, "Not Found")]
    )
    assert ask("ready") is True
    assert ask("ready") is False
    with pytest.raises(RequestError, match="404"):
        ask("ready")
    assert ask("ready", endpoint=nobody()) is False
    assert len(server.asked) == 3


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
def test_what_passes_is_repeated_with_the_same_body(server: Scripted, ask: Ask, trouble: Reply) -> None:
    server.replies.extend([trouble, trouble, trouble, reply(200, DETECTED)])
    assert ask("detect", b"image" * 100_000).model.name == "raydetr"
    assert [asked["body"] for asked in server.asked] == [b"image" * 100_000] * 4


def test_a_server_that_starts_a_little_later_is_found(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "FIRST_WAIT_S", 0.2)
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        address = place.getsockname()

        def start() -> None:
            place.listen()
            connection, _ = place.accept()
            with connection:
                connection.recv(10_000)
                body = json.dumps({"status": "ok", "model": MODEL}).encode()
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

        timer = threading.Timer(0.3, start)
        timer.start()
        assert ask("health", endpoint=f"http://127.0.0.1:{address[1]}").status == "ok"
        timer.join()


@pytest.mark.parametrize(("status", "raised"), [(429, RequestError), (503, ServingError)], ids=["429", "503"])
def test_what_does_not_pass_is_an_error_after_the_repeats(
    server: Scripted, ask: Ask, status: int, raised: type[ServingError]
) -> None:
    server.replies.extend([error(status, "full up")] * 3)
    with pytest.raises(raised, match=f"answered {status}: full up"):
        ask("detect", b"image", retries=2)
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 415, 422])
def test_a_request_at_fault_is_sent_once(server: Scripted, ask: Ask, status: int) -> None:
    server.replies.append(error(status, "not so", X_Request_Id="abc-1"))
    with pytest.raises(RequestError, match=r"/v1/detect answered .*: not so \(request abc-1\)") as caught:
        ask("detect", b"image", token="secret")
    assert caught.value.status == status
    assert "secret" not in str(caught.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [500, 504])
def test_a_failure_of_the_server_is_no_fault_of_the_request(server: Scripted, ask: Ask, status: int) -> None:
    server.replies.append(error(status, "out of order"))
    with pytest.raises(ServingError, match="out of order") as caught:
        ask("detect", b"image")
    assert not isinstance(caught.value, RequestError)
    assert len(server.asked) == 1


def test_an_answer_that_breaks_off_is_an_error_and_not_repeated(server: Scripted, ask: Ask) -> None:
    server.replies.append(break_off)
    with pytest.raises(ServingError, match="broke off its answer"):
        ask("detect", b"image")
    assert len(server.asked) == 1


@pytest.mark.parametrize("slow", [trickle, lambda _: time.sleep(3)], ids=["in trickles", "silent"])
def test_time_is_limited_however_slow_the_answer_comes(server: Scripted, ask: Ask, slow: Reply) -> None:
    server.replies.append(slow)
    with pytest.raises(ServingError, match=r"no answer within 0\.3 s"):
        ask("detect", b"image", timeout_s=0.3)
    assert len(server.asked) == 1


def test_a_wait_longer_than_the_time_left_is_not_begun(server: Scripted, ask: Ask) -> None:
    server.replies.append(error(429, "come back later", Retry_After="3600"))
    with pytest.raises(RequestError, match="come back later"):
        ask("detect", b"image", timeout_s=20)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply(200, b"<html>"), "answered 200 without JSON"),
        (reply(200, {"status": "ok"}), "answered in another form"),
        (reply(200, [1]), "answered in another form"),
        (reply(502, b"Bad gateway"), "answered 502 without JSON"),
        (reply(307, {"detail": "elsewhere"}, Location="/"), "answered 307"),
    ],
)
def test_another_kind_of_server_is_told_apart(
    server: Scripted, ask: Ask, answer: Reply, message: str
) -> None:
    server.replies.append(answer)
    with pytest.raises(ServingError, match=message):
        ask("health")


def test_a_proxys_error_keeps_its_status(server: Scripted, ask: Ask) -> None:
    server.replies.extend([reply(413, b"<html>"), reply(403, {"detail": "not from here"})])
    with pytest.raises(RequestError, match="413 without JSON") as caught:
        ask("detect", b"image")
    assert caught.value.status == 413
    with pytest.raises(RequestError, match="not from here"):
        ask("detect", b"image")


def nobody() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_nobody_at_an_address_is_an_error(ask: Ask) -> None:
    with pytest.raises(ServingError, match=r"GET http://127.0.0.1:[0-9]+/health does not answer"):
        ask("health", endpoint=nobody(), retries=2)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:8000", "", "ftp://host", "http://", "http://[::1"])
def test_an_address_that_is_none_is_refused(ask: Ask, endpoint: str) -> None:
    with pytest.raises(ServingError, match="give http://HOST:PORT"):
        ask("health", endpoint=endpoint)


@pytest.mark.parametrize("token", ["", "secret\n", "sec\nret", " secret", "sécret"])
def test_a_token_that_no_header_can_have_is_refused_without_being_shown(ask: Ask, token: str) -> None:
    with pytest.raises(ServingError, match=r"^The token is empty, or has") as caught:
        ask("health", token=token)
    assert "cret" not in str(caught.value)


def test_an_endpoint_below_a_path_is_reached(server: Scripted, ask: Ask) -> None:
    server.replies.append(reply(200, {"status": "ok", "model": MODEL}))
    ask("health", endpoint=f"{server.url}/detector/")
    assert server.asked[0]["path"] == "/detector/health"


def test_a_client_keeps_its_connection_and_survives_its_end(server: Scripted) -> None:
    """A server may close an idle connection just as the next request is on its way."""

    def last(handler: BaseHTTPRequestHandler) -> None:
        reply(200, DETECTED)(handler)
        handler.close_connection = True  # without saying so

    ports: list[int] = []

    def noted(answer: Reply) -> Reply:
        return lambda handler: (ports.append(handler.client_address[1]), answer(handler))[1]

    server.replies.extend([noted(reply(200, DETECTED)), noted(last), noted(reply(200, DETECTED))])
    with Client(server.url) as client:
        for _ in range(3):
            client.detect(b"image")
    assert ports[0] == ports[1] != ports[2]


def waits(outcomes: list[Answer | Lost], timeout_s: float = 1e6, retries: int = 50) -> list[float]:
    """How long the exchange pauses after each outcome, without pausing."""
    call = exchange.exchange(httpx.Request("GET", "http://host/"), lambda _: None, timeout_s, retries)
    pauses = []
    step = next(call)
    with contextlib.suppress(StopIteration, ServingError):
        for outcome in outcomes:
            assert isinstance(step, Send)
            step = call.send(outcome)
            assert isinstance(step, Wait)
            pauses.append(step.seconds)
            step = call.send(None)
    return pauses


def busy(**headers: str) -> Answer:
    return Answer(429, httpx.Headers({k.replace("_", "-"): v for k, v in headers.items()}), b"{}")


def test_waits_double_up_to_a_limit_and_none_is_like_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "FIRST_WAIT_S", 0.25)
    several = [waits([busy()] * 12) for _ in range(8)]
    for place, pauses in enumerate(zip(*several, strict=True)):
        most = min(0.25 * 2**place, exchange.LONGEST_WAIT_S)
        assert all(most / 2 <= pause <= most for pause in pauses)
        assert len(set(pauses)) == len(pauses)


def test_retry_after_is_kept_to_in_seconds_and_as_a_date() -> None:
    assert 7 <= waits([busy(Retry_After="7")])[0] < 8
    assert 28 <= waits([busy(Retry_After=formatdate(time.time() + 30, usegmt=True))])[0] < 31
    for other in ("soon", "-3", formatdate(time.time() - 30, usegmt=True)):
        assert 0 < waits([busy(Retry_After=other)])[0] < 1


def test_a_time_out_is_not_repeated() -> None:
    assert waits([Lost(httpx.ReadTimeout(""))]) == []
    assert waits([Lost(httpx.ConnectTimeout(""))]) == []


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> dict[str, list[str]]:
        return {
            name: [str(parameter) for parameter in inspect.signature(method).parameters.values()]
            for name, method in vars(kind).items()
            if not name.startswith("_")
        }

    assert public(Client) == public(AsyncClient)


def test_the_client_needs_httpx_alone() -> None:
    code = (
        "import sys, raydetr.client.client\n"
        "heavy = {'PIL', 'ray', 'torch', 'numpy', 'mlflow', 'fastapi', 'pydantic', 'pyarrow', 'detr'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
