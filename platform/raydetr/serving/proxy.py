"""What Serve's HTTP proxy does not do by itself: checks request ids, and closes connections whose headers never end.

Serve calls `middlewares` in each proxy process where `CALLBACK` is set in the environment of Ray's node;
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
"""Time in which a connection's next request has to have all its headers, in seconds."""


def request_callback() -> None:
    """Have the proxies of the Ray that this process starts call `middlewares`, unless they call something else."""
    os.environ.setdefault(CALLBACK, f"{__name__}:{middlewares.__name__}")


def middlewares() -> list[Middleware]:
    """Serve's callback: what is put around its proxy."""
    for protocol in (H11Protocol, HttpToolsProtocol):
        limit_headers(protocol)
    return [Middleware(SaneRequestId)]


class SaneRequestId:
    """ASGI middleware around the proxy, which answers with the `X-Request-Id` of the request, whatever it is, and makes
    one where there is none. So an id that is none, or one of several, is taken out.
    """

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Hand one request on."""
        if scope["type"] == "http":
            headers = MutableHeaders(scope=scope)
            given = headers.getlist("x-request-id")
            if given and (len(given) > 1 or sane_request_id(given[0]) != given[0]):
                del headers["x-request-id"]
        await self.app(scope, receive, send)


def limit_headers(protocol: type[Any], seconds: float = HEADERS_S) -> None:
    """Have connections of one of uvicorn's protocols closed whose next request has not all its headers in time.

    uvicorn 0.54 has no such limit; the one for idle connections (`timeout_keep_alive`) ends with the first byte of a
    request, and begins with the first answer.

    Args:
        protocol: `H11Protocol` or `HttpToolsProtocol`; changed once, however often this is called.
        seconds: from the connection, or from the first bytes after an answer.
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
