"""A small app with the endpoint's middlewares, without Ray. It prepares images and responds with their sizes."""

import asyncio
import io
import logging
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import unquote

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from detr.image_processing.processor import DetrImageProcessor
from raydetr.errors import RequestError
from raydetr.serving import middleware
from raydetr.serving.auth import Tokens
from raydetr.serving.bodies import read_images
from raydetr.serving.images import Limits
from raydetr.serving.middleware import error_answer
from raydetr.serving.stack import add_middlewares
from tests.raydetr.serving.decoders import preparer

LIMITS = Limits()
PROCESSOR = DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})


def guarded_app(limits: Limits, tokens: Tokens | None = None) -> FastAPI:
    api = FastAPI(redirect_slashes=False)
    images = preparer(limits)

    @api.exception_handler(RequestError)
    async def _(_: Request, error: RequestError) -> JSONResponse:
        return error_answer(error.status, str(error))

    @api.exception_handler(HTTPException)
    async def _(_: Request, error: HTTPException) -> JSONResponse:
        return error_answer(error.status_code, str(error.detail))

    @api.post("/v1/detect")
    async def detect(request: Request) -> dict[str, Any]:
        request.state.model = "tiny/3"
        body = await read_images(request, limits, lambda _: None)
        prepared = await images.prepare(body.images, PROCESSOR)
        return {"many": body.is_list, "sizes": [image.original_size for image in prepared]}

    @api.get("/health")
    async def health() -> str:
        return "ok"

    @api.get("/broken")
    async def broken() -> None:
        raise KeyError("internal secret")

    @api.get("/asleep")
    async def asleep() -> None:
        await asyncio.Event().wait()

    @api.get("/whoami")
    async def whoami(request: Request) -> str:
        return request.state.client

    add_middlewares(api, limits, tokens)
    return api


def client(api: FastAPI) -> httpx.AsyncClient:
    """Create a client that calls the app in process. Exceptions of the app propagate."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://endpoint")


def ask(api: FastAPI, method: str, path: str, **request: Any) -> httpx.Response:
    async def one() -> httpx.Response:
        async with client(api) as http:
            return await http.request(method, path, **request)

    return asyncio.run(one())


def scope_of(path: str, method: str = "POST", **headers: str) -> dict[str, Any]:
    """Build an ASGI scope as a server passes it to the app. Unlike in a client, the path is not normalized."""
    return {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": unquote(path),
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "scheme": "http",
        "server": ("endpoint", 80),
        "client": ("client", 1),
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }


async def call(api: FastAPI, scope: dict[str, Any], *body: bytes, then: str = "end") -> list[dict[str, Any]]:
    """Return the messages of the app. `then`: after its chunks the body ends, hangs, repeats, or the client leaves."""
    chunks = list(body) or [b""]
    messages = []

    async def receive() -> dict[str, Any]:
        if len(chunks) > 1 or (chunks and then != "end"):
            return {
                "type": "http.request",
                "body": chunks[0] if then == "repeat" else chunks.pop(0),
                "more_body": True,
            }
        if chunks:
            return {"type": "http.request", "body": chunks.pop(0), "more_body": False}
        if then == "leave":
            return {"type": "http.disconnect"}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    await api(scope, receive, send)
    return messages


def message_of(answer: httpx.Response) -> str:
    """Check the format of an error response and return its message."""
    content = answer.json()
    assert list(content) == ["error"], content
    assert content["error"].keys() == {"status", "message"}
    assert content["error"]["status"] == answer.status_code
    return content["error"]["message"]


async def chunked(*chunks: bytes, then_hang: bool = False) -> AsyncIterator[bytes]:
    """Yield a body in chunks, optionally without an end."""
    for chunk in chunks:
        yield chunk
    if then_hang:
        await asyncio.Event().wait()


def log_lines() -> io.StringIO:
    """Redirect the request log to a new stream and return it."""
    stream = io.StringIO()
    middleware.log_requests(stream)
    assert logging.getLogger("raydetr.serving.requests").handlers
    return stream
