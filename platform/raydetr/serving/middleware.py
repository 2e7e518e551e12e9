"""What every request passes through, as plain ASGI: its id, its log line, its deadline, and answers for errors.

`protect` puts them around an app, outermost first::

    RequestContext   X-Request-Id, one JSON log line, JSON answers for whatever is raised
    BearerAuth       tokens, see `auth`
    Deadline         408 for a slow body, 504 for a slow answer

The app finds the id of the request in `request.state.request_id`, the name of the client's token in
`request.state.client`, and may put the model's version into `request.state.model` for the log line.
"""

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
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from raydetr.errors import RequestError
from raydetr.serving.auth import BearerAuth, Tokens
from raydetr.serving.images import Limits
from raydetr.serving.request_id import sane_request_id

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG = logging.getLogger("raydetr.serving.requests")
"""One JSON object a request; `log_requests` gives it a place to go."""

CLIENT_GONE = 499
"""Status in the log of a request whose client went away before it was answered."""

_MOST_OF_A_MESSAGE = 300  # characters in the log: an exception's text may quote what a client sent


def protect(
    api: "FastAPI", limits: Limits, tokens: Tokens | None = None, *, server_sends_id: bool = False
) -> None:
    """Put the middlewares of this module around an app; before its first request.

    Args:
        api: its own exception handlers go on answering what its routes raise.
        limits: `body_s` and `deadline_s` count here.
        tokens: who may ask; None lets everybody in.
        server_sends_id: see `RequestContext`.
    """
    # the last one added is the outermost
    api.add_middleware(Deadline, limits=limits)
    if tokens is not None:
        api.add_middleware(BearerAuth, tokens=tokens)
    api.add_middleware(RequestContext, server_sends_id=server_sends_id)


def log_requests(stream: TextIO | None = None) -> None:
    """Write the log lines of this process's requests to a stream, by default standard output; once a process."""
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


def error_answer(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The endpoint's JSON for an error; see `schemas.ErrorResponse`."""
    return JSONResponse({"error": {"status": status, "message": message}}, status, headers)


class RequestContext:
    """The outermost middleware: request id, log line, and an answer for everything that is raised.

    The log line has `time` (UTC), `request_id`, `client` (the token's name or null), `method`, `route` (the pattern
    of the route, not the path that was asked for; null where there is none), `status`, `ms`, `bytes_in` (of the body,
    as far as it was read), `bytes_out`, `model`, and for a 500 `error`: the traceback. Nothing of the body or the
    query is in it.

    Args:
        app: what answers.
        server_sends_id: whether the server in front adds X-Request-Id to each answer by itself, as Ray Serve's proxy
            does: a second one would make two values of it.
    """

    def __init__(self, app: "ASGIApp", server_sends_id: bool = False) -> None:
        self.app = app
        self.server_sends_id = server_sends_id

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        request_id = sane_request_id(Headers(scope=scope).get("x-request-id"))
        state: dict[str, Any] = {**scope.get("state", {}), "request_id": request_id}
        scope["state"] = state
        seen = _Seen()

        async def counted_receive() -> "Message":
            message = await receive()
            if message["type"] == "http.request":
                seen.bytes_in += len(message.get("body", b""))
            return message

        async def counted_send(message: "Message") -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                headers = MutableHeaders(scope=message)
                if not self.server_sends_id:
                    headers["X-Request-Id"] = request_id
                headers.setdefault("X-Content-Type-Options", "nosniff")
                if message["status"] in (408, 413):
                    # The rest of the body is not read, so the connection cannot carry another request.
                    headers["Connection"] = "close"
            elif message["type"] == "http.response.body":
                seen.bytes_out += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, counted_receive, counted_send)
        except ClientDisconnect:
            seen.status = seen.status or CLIENT_GONE
        except asyncio.CancelledError:
            seen.status = seen.status or CLIENT_GONE
            raise
        except Exception as error:
            started = seen.status is not None
            answer = _answer_for(error, request_id)
            if answer.status_code == 500 or started:
                seen.error = _described(error)
            if started:
                # Too late for another answer: the server cuts the connection, so that nobody takes half for whole.
                seen.status = 500
                raise
            await answer(scope, receive, counted_send)
        finally:
            LOG.log(logging.ERROR if seen.error else logging.INFO, "%s", _line(scope, state, seen, start))


class _Seen:
    """What went through so far."""

    status: int | None = None
    bytes_in = 0
    bytes_out = 0
    error: str | None = None


def _answer_for(error: Exception, request_id: str) -> JSONResponse:
    if isinstance(error, HTTPException):
        return error_answer(error.status_code, str(error.detail), dict(error.headers or {}))
    if isinstance(error, RequestError):
        return error_answer(error.status, str(error))
    return error_answer(500, f"The server failed; its log has the reason under request id {request_id}.")


def _described(error: Exception) -> str:
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{frames}{type(error).__name__}: {str(error)[:_MOST_OF_A_MESSAGE]}"


def _line(scope: MutableMapping[str, Any], state: dict[str, Any], seen: _Seen, start: float) -> str:
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": state["request_id"],
        "client": state.get("client"),
        "method": scope["method"][:16],
        "route": getattr(scope.get("route"), "path", None),
        "status": seen.status,
        "ms": round(1000 * (time.perf_counter() - start), 1),
        "bytes_in": seen.bytes_in,
        "bytes_out": seen.bytes_out,
        "model": state.get("model"),
    }
    if seen.error:
        line["error"] = seen.error
    return json.dumps(line, default=str)


class Deadline:
    """Bounds in time: 408 where the body takes longer than `body_s` to arrive, 504 where the answer is not begun
    `deadline_s` after the request.

    What the app awaits is cancelled: images that wait are dropped, and one that is being decoded ends within its
    processor time.
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
        body_ends = loop.time() + self.limits.body_s
        body_is_read = False

        async def bounded_receive() -> "Message":
            nonlocal body_is_read
            if body_is_read:
                return await receive()  # waits for the client to leave; takes as long as the answer does
            try:
                async with asyncio.timeout_at(body_ends) as bound:
                    message = await receive()
            except TimeoutError:
                if not bound.expired():
                    raise
                raise HTTPException(
                    408, f"The body did not arrive within {self.limits.body_s:g} seconds: send it again."
                ) from None
            body_is_read = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def undisturbed_send(message: "Message") -> None:
            if message["type"] == "http.response.start":
                deadline.reschedule(None)
            await send(message)

        try:
            async with asyncio.timeout(self.limits.deadline_s) as deadline:
                await self.app(scope, bounded_receive, undisturbed_send)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise HTTPException(
                504, f"No answer within {self.limits.deadline_s:g} seconds: send fewer or smaller images."
            ) from None
