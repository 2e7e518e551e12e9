"""Additions to Serve's HTTP proxy: validate request ids, and close connections whose headers never end.

Serve calls `middlewares` in each proxy process if `CALLBACK` is set in the environment of the Ray node.
`pipelines/serve.py` sets it for a local Ray, and `platform/deploy/` for clusters.
"""

import asyncio
import os
from typing import TYPE_CHECKING, Any

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from raydetr.serving.request_id import sane_request_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
HEADERS_S = 15.0
"""Time limit for the headers of the next request of a connection, in seconds."""


def set_proxy_callback() -> None:
    """Set `CALLBACK` for a Ray that this process starts, unless it is already set."""
    os.environ.setdefault(CALLBACK, f"{__name__}:{middlewares.__name__}")


def middlewares() -> list[Middleware]:
    """Return the middlewares of the proxy. Serve's callback."""
    for protocol in (H11Protocol, HttpToolsProtocol):
        limit_headers(protocol)
    return [Middleware(SaneRequestId)]


class SaneRequestId:
    """ASGI middleware that removes invalid or duplicate `X-Request-Id` headers from requests.

    The proxy returns the id of a request without a check, and creates one if there is none.
    """

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Forward one request."""
        if scope["type"] == "http":
            headers = MutableHeaders(scope=scope)
            given = headers.getlist("x-request-id")
            if given and (len(given) > 1 or sane_request_id(given[0]) != given[0]):
                del headers["x-request-id"]
        await self.app(scope, receive, send)


def limit_headers(protocol: type[Any], seconds: float = HEADERS_S) -> None:
    """Patch a uvicorn protocol to close connections whose next request does not complete its headers in time.

    uvicorn 0.54 has no such limit: its limit for idle connections (`timeout_keep_alive`) starts after the first
    response, and ends with the first byte of a request.

    Args:
        protocol: `H11Protocol` or `HttpToolsProtocol`. Idempotent: it is patched once.
        seconds: limit, from the start of the connection or from the first bytes after a response.
    """
    if hasattr(protocol, "headers_timer"):
        return
    protocol.headers_timer = None
    connection_made, data_received = protocol.connection_made, protocol.data_received
    connection_lost = protocol.connection_lost

    def stop(self: Any) -> None:
        if self.headers_timer is not None:
            self.headers_timer.cancel()
            self.headers_timer = None

    def made(self: Any, transport: asyncio.Transport) -> None:
        connection_made(self, transport)
        self.headers_timer = self.loop.call_later(seconds, transport.close)

    def received(self: Any, data: bytes) -> None:
        data_received(self, data)
        if self.cycle is not None and not self.cycle.response_complete:
            stop(self)
        elif self.headers_timer is None:
            self.headers_timer = self.loop.call_later(seconds, self.transport.close)

    def lost(self: Any, error: Exception | None) -> None:
        stop(self)
        connection_lost(self, error)

    protocol.connection_made, protocol.data_received = made, received
    protocol.connection_lost = lost
