"""What the application's own errors answer; those of what is around it are in `middleware`."""

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
SLOW_S = 3.0
"""Mean time until a refusal is answered that is to be slow, in seconds; half to one and a half of it at random, or the
clients that were refused together would come back together."""
_MOST_SLOW = 256
"""Slow refusals at a time; those beyond are answered at once."""


class Unavailable(ServingError):
    """The endpoint cannot answer now, through no fault of the request.

    Args:
        status: 429 too many requests, 503 no model replica, 504 out of time.
        message: for the client.
        retry_after_s: when to try again; None says nothing.
        slowly: answer after about `SLOW_S`. A client that sends the next image as soon as one was refused would
            otherwise keep the cores busy with refusals. The request holds no place and no bytes meanwhile.
    """

    def __init__(
        self, status: int, message: str, retry_after_s: float | None = None, *, slowly: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after_s, self.slowly = status, retry_after_s, slowly


def too_many() -> Unavailable:
    """The answer under overload."""
    return Unavailable(429, "Too many requests are waiting: try again later.", RETRY_AFTER_S)


def add_handlers(api: FastAPI) -> None:
    """Make an application answer its errors in that form."""
    api.add_exception_handler(RequestError, _request_error)
    api.add_exception_handler(Unavailable, _AnswerUnavailable())
    api.add_exception_handler(RequestValidationError, _validation_error)
    api.add_exception_handler(HTTPException, _http_error)


async def _request_error(_: Request, error: Any) -> JSONResponse:
    return error_answer(error.status, str(error))


class _AnswerUnavailable:
    """Answers `Unavailable`, and counts the answers that wait."""

    def __init__(self) -> None:
        self._waiting = 0

    async def __call__(self, _: Request, error: Any) -> JSONResponse:
        if error.slowly and self._waiting < _MOST_SLOW:
            error.with_traceback(None)  # whose frames hold the images
            self._waiting += 1
            try:
                await asyncio.sleep(SLOW_S * random.uniform(0.5, 1.5))
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
