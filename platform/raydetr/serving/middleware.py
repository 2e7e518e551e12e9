"""ASGI middlewares of all requests: request id, log line, deadline, error responses. `stack` puts them together."""

import asyncio
import json
import logging
import sys
import time
import traceback
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from fastapi.responses import JSONResponse
from ray.exceptions import TaskCancelledError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from raydetr.errors import RequestError
from raydetr.serving.images import Limits
from raydetr.serving.request_id import sane_request_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG = logging.getLogger("raydetr.serving.requests")
"""One JSON object per request; `log_requests` sets the output."""

CLIENT_GONE = 499
"""Logged status of a request whose client disconnected before the response."""

_MAX_MESSAGE_CHARS = 300  # in the log: the text of an exception may quote what a client sent


def log_requests(stream: TextIO | None = None) -> None:
    """Write this process's request log to a stream, by default standard output. Replaces an earlier stream."""
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


def error_answer(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Build the JSON response of an error, see `responses.ErrorResponse`."""
    return JSONResponse({"error": {"status": status, "message": message}}, status, headers)


class RequestContext:
    """ASGI middleware: request id, log line, and a response for every exception.

    The log line has `time` (UTC), `request_id`, `client` (the token's name or null), `method`, `route` (the pattern
    of the route, not the requested path; null for an unknown route), `status`, `ms`, `bytes_in` (the part of the body
    that was read), `bytes_out`, `model`, and for a 500 `error`, the traceback. It contains nothing of the body or the
    query.

    Args:
        app: the inner app.
    """

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        request_id = sane_request_id(Headers(scope=scope).get("x-request-id"))
        state: dict[str, Any] = {**scope.get("state", {}), "request_id": request_id}
        scope["state"] = state
        record = _RequestRecord()

        async def counted_receive() -> "Message":
            message = await receive()
            if message["type"] == "http.request":
                record.bytes_in += len(message.get("body", b""))
            return message

        async def counted_send(message: "Message") -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers.setdefault("X-Content-Type-Options", "nosniff")
                if message["status"] in (408, 413):
                    # The rest of the body is not read, so the connection cannot carry another request.
                    headers["Connection"] = "close"
            elif message["type"] == "http.response.body":
                record.bytes_out += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, counted_receive, counted_send)
        except ClientDisconnect:
            record.status = record.status or CLIENT_GONE
        except asyncio.CancelledError:
            record.status = record.status or CLIENT_GONE
            raise
        except Exception as error:
            started = record.status is not None
            answer = _error_response(error, request_id)
            if answer.status_code == 500 or started:
                record.error = _format_error(error)
            if started:
                # Too late for an error response: the server closes the connection, so that the client does not take a
                # truncated response for a complete one.
                record.status = 500
                raise
            await answer(scope, receive, counted_send)
        finally:
            LOG.log(
                logging.ERROR if record.error else logging.INFO, "%s", _log_line(scope, state, record, start)
            )


class _RequestRecord:
    """Status and traffic of a request so far."""

    status: int | None = None
    bytes_in = 0
    bytes_out = 0
    error: str | None = None


def _error_response(error: Exception, request_id: str) -> JSONResponse:
    if isinstance(error, HTTPException):
        return error_answer(error.status_code, str(error.detail), dict(error.headers or {}))
    if isinstance(error, RequestError):
        return error_answer(error.status, str(error))
    return error_answer(500, f"The server failed: see its log under request id {request_id}.")


def _format_error(error: Exception) -> str:
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{frames}{type(error).__name__}: {str(error)[:_MAX_MESSAGE_CHARS]}"


def _log_line(
    scope: MutableMapping[str, Any], state: dict[str, Any], record: _RequestRecord, start: float
) -> str:
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": state["request_id"],
        "client": state.get("client"),
        "method": scope["method"][:16],
        "route": getattr(scope.get("route"), "path", None),
        "status": record.status,
        "ms": round(1000 * (time.perf_counter() - start), 1),
        "bytes_in": record.bytes_in,
        "bytes_out": record.bytes_out,
        "model": state.get("model"),
    }
    if record.error:
        line["error"] = record.error
    return json.dumps(line, default=str)


class Deadline:
    """Time limits: 408 if the body takes longer than `body_s`, 504 if the response has not started after `deadline_s`.

    On a timeout, whatever the app awaits is cancelled: waiting images are dropped, and an image that is being decoded
    stops at its CPU time limit at the latest.
    """

    def __init__(self, app: "ASGIApp", limits: Limits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        body_deadline = loop.time() + self.limits.body_s
        body_is_read = False

        async def bounded_receive() -> "Message":
            nonlocal body_is_read
            if body_is_read:
                return await receive()  # waits for the client to disconnect, without a limit
            try:
                async with asyncio.timeout_at(body_deadline) as bound:
                    message = await receive()
            except TimeoutError:
                if not bound.expired():
                    raise
                raise HTTPException(
                    408, f"The body did not arrive within {self.limits.body_s:g} seconds: send it again."
                ) from None
            body_is_read = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def send_without_deadline(message: "Message") -> None:
            if message["type"] == "http.response.start":
                deadline.reschedule(None)
            await send(message)

        try:
            async with asyncio.timeout(self.limits.deadline_s) as deadline:
                await self.app(scope, bounded_receive, send_without_deadline)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise HTTPException(
                504, f"No answer within {self.limits.deadline_s:g} seconds: send fewer or smaller images."
            ) from None


class ServeProxyAdapter:
    """ASGI middleware: adapts to Serve's proxy where it differs from an HTTP server.

    The proxy adds the request's `X-Request-Id` to the response (and creates one if the request has none), so the
    app's own header is dropped if it has the same id. If a client disconnects while its body arrives, the proxy cancels
    `receive`; the app gets a disconnect message instead.
    """

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request."""

        async def receive_or_disconnect() -> "Message":
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        async def send_without_duplicate_id(message: "Message") -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get("x-request-id") == Headers(scope=scope).get("x-request-id"):
                    del headers["x-request-id"]
            await send(message)

        http_send = send_without_duplicate_id if scope["type"] == "http" else send
        await self.app(scope, receive_or_disconnect, http_send)
