"""Error responses of the application, and Retry-After. Those of the middlewares are built by `middleware.error_answer`."""

import asyncio
import math
import random
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from raydetr.errors import RequestError, ServingError
from raydetr.serving.middleware import error_answer

RETRY_AFTER_S = 1.0
DELAY_S = 3.0
"""Mean of the delay of delayed rejections, in seconds. Each delay is 0.5 to 1.5 times as long at random, so that
clients that were rejected together do not retry together."""
_MAX_DELAYED = 256
"""Maximum number of concurrent delayed rejections; further ones are sent immediately."""


class Unavailable(ServingError):
    """The endpoint cannot answer a valid request at the moment.

    Args:
        status: 429 too many requests, 503 no model replica, 504 out of time.
        message: message for the client.
        retry_after_s: value of Retry-After, in seconds; None omits the header.
        delayed: respond after about `DELAY_S`. Otherwise a client that sends the next image as soon as one is rejected
            would keep the cores busy with rejections. A delayed request holds no place and no bytes.
    """

    def __init__(
        self, status: int, message: str, retry_after_s: float | None = None, *, delayed: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after_s, self.delayed = status, retry_after_s, delayed


def too_many() -> Unavailable:
    """Build the error under overload."""
    return Unavailable(429, "Too many requests are waiting: try again later.", RETRY_AFTER_S)


def add_handlers(api: FastAPI) -> None:
    """Add the exception handlers to an app."""
    api.add_exception_handler(RequestError, _request_error)
    api.add_exception_handler(Unavailable, _UnavailableHandler())
    api.add_exception_handler(RequestValidationError, _validation_error)
    api.add_exception_handler(HTTPException, _http_error)


async def _request_error(_: Request, error: Any) -> JSONResponse:
    return error_answer(error.status, str(error))


class _UnavailableHandler:
    """Handler of `Unavailable` that counts the delayed responses."""

    def __init__(self) -> None:
        self._waiting = 0

    async def __call__(self, _: Request, error: Any) -> JSONResponse:
        if error.delayed and self._waiting < _MAX_DELAYED:
            error.with_traceback(None)  # its frames hold the images
            self._waiting += 1
            try:
                await asyncio.sleep(DELAY_S * random.uniform(0.5, 1.5))
            finally:
                self._waiting -= 1
        headers = None
        if error.retry_after_s is not None:
            headers = {"Retry-After": str(math.ceil(error.retry_after_s))}
        return error_answer(error.status, str(error), headers)


async def _validation_error(_: Request, error: Any) -> JSONResponse:
    problems = "; ".join(f"{e['loc'][-1]}: {e['msg']} (got {e['input']!r})" for e in error.errors())
    return error_answer(422, problems)


async def _http_error(_: Request, error: Any) -> JSONResponse:
    return error_answer(error.status_code, str(error.detail), error.headers)
