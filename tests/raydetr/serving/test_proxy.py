"""The header time limit with a real uvicorn, and the middleware of Serve's proxy."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from raydetr.serving.proxy import SaneRequestId, limit_headers
from tests.raydetr.serving.guarded_app import scope_of

SECONDS = 0.3


async def app(scope, receive, send):
    more = True
    while more:
        message = await receive()
        more = message.get("more_body", False)
    await PlainTextResponse("done")(scope, receive, send)


@pytest.fixture(scope="module", params=[H11Protocol, HttpToolsProtocol], ids=["h11", "httptools"])
def port(request) -> Iterator[int]:
    protocol = type("Limited", (request.param,), {})
    limit_headers(protocol, SECONDS)
    limit_headers(protocol, 1e-6)  # idempotent: the second call changes nothing
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=protocol, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.settimeout(10)
    return connection


def is_closed_within(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        while connection.recv(1000):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: ", b"POST"])
def test_a_connection_with_unfinished_headers_is_closed(port, start):
    with connect(port) as connection:
        connection.sendall(start)
        assert not is_closed_within(connection, SECONDS / 3)
        assert is_closed_within(connection, 10)


def test_slow_headers_do_not_extend_the_limit(port):
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        for number in range(1000):
            if is_closed_within(connection, 0.02):
                break
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"X-%d: a\r\n" % number)
        assert 3 < number < 500


def test_the_limit_applies_to_the_second_request_of_a_connection(port):
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"done" in connection.recv(1000)
        time.sleep(2 * SECONDS)  # idle: no request has started
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"done" in connection.recv(1000)
        connection.sendall(b"GET / HTTP/1.1\r\nHo")
        assert is_closed_within(connection, 10)


def test_a_body_may_take_longer_than_the_headers(port):
    with connect(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        for _ in range(4):
            time.sleep(SECONDS / 2)
            connection.sendall(b"x")
        assert b"done" in connection.recv(1000)


@pytest.mark.parametrize(
    ("given", "forwarded"),
    [
        ([], []),
        (["my.id-1"], ["my.id-1"]),
        (["a b"], []),
        (["x" * 65], []),
        (["<script>"], []),
        ([""], []),
        (["one", "two"], []),
        (["one", "one"], []),
    ],
)
def test_invalid_and_duplicate_request_ids_do_not_reach_the_proxy(given, forwarded):
    received = []

    async def inner(scope, receive, send):
        received.extend(value.decode() for name, value in scope["headers"] if name == b"x-request-id")

    scope = scope_of("/health", "GET", host="x")
    scope["headers"] += [(b"x-request-id", value.encode()) for value in given]
    asyncio.run(SaneRequestId(inner)(scope, None, None))
    assert received == forwarded
