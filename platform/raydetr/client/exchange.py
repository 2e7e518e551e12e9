"""One API call with its retries, as a generator that the blocking and the asynchronous client share.

As in httpx's authentication flow, the generator decides and its caller does the I/O: it yields a request to send or a
time to wait, and receives the outcome.
"""

import json
import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from raydetr.errors import RequestError, ServingError

T = TypeVar("T")

INITIAL_BACKOFF_S = 0.25
"""Backoff before the first retry, in seconds; doubled before each further one."""
MAX_BACKOFF_S = 8.0
"""Maximum backoff, in seconds. A `Retry-After` of the server is added to it."""


@dataclass(frozen=True)
class Answer:
    """A complete response."""

    status: int
    headers: httpx.Headers
    body: bytes


@dataclass(frozen=True)
class NoResponse:
    """The error that prevented a complete response, and whether the response had started."""

    error: httpx.HTTPError
    started: bool = False


@dataclass(frozen=True)
class Send:
    """Next step: send a request. `deadline` is a time of `time.monotonic`."""

    request: httpx.Request
    deadline: float

    def check_time(self) -> None:
        """Enforce the deadline for the whole response; httpx's own timeouts apply to each chunk.

        Raises:
            httpx.ReadTimeout: the deadline has passed.
        """
        if time.monotonic() > self.deadline:
            raise httpx.ReadTimeout("the response is too slow", request=self.request)


@dataclass(frozen=True)
class Wait:
    """Next step: wait for some seconds."""

    seconds: float


Exchange = Generator[Send | Wait, Answer | NoResponse | None, T]
"""Yields steps, receives the outcome of each (None after a wait), and returns the result."""


def exchange(request: httpx.Request, read: Callable[[Any], T], timeout_s: float, retries: int) -> Exchange[T]:
    """Send a request, retry transient errors with backoff, and parse the response.

    Transient are 429, 503, connections that are refused or lost before the response starts, and a 500 that is not the
    endpoint's JSON. Any other error would only repeat.

    Args:
        request: its `timeout` extension is set here.
        read: converts the JSON of a response to the result.
        timeout_s: time limit of the call, waits included, in seconds.
        retries: maximum number of retries.

    Raises:
        RequestError: the endpoint answered 4xx.
        ServingError: the endpoint does not answer, or its response is not valid.
    """
    deadline = time.monotonic() + timeout_s
    retry = 0
    while True:
        left = max(deadline - time.monotonic(), 0.001)
        request.extensions["timeout"] = httpx.Timeout(left).as_dict()
        outcome = yield Send(request, deadline)
        assert outcome is not None
        delay = _retry_delay(outcome, retry)
        if delay is None or retry >= retries or time.monotonic() + delay >= deadline:
            return _parse_response(outcome, request, read, timeout_s)
        yield Wait(delay)
        retry += 1


def probe(request: httpx.Request, timeout_s: float) -> Exchange[bool]:
    """Send one request. Returns False if nothing answers, or on 503.

    Raises:
        ServingError: something other than the endpoint answers.
    """
    request.extensions["timeout"] = httpx.Timeout(timeout_s).as_dict()
    outcome = yield Send(request, time.monotonic() + timeout_s)
    assert outcome is not None
    if isinstance(outcome, NoResponse) or outcome.status == 503:
        return False
    return _parse_response(outcome, request, lambda _: True, timeout_s)


def _retry_delay(outcome: Answer | NoResponse, retry: int) -> float | None:
    """Return the seconds to wait before the next attempt, or None if the error is not transient.

    Half of each backoff is random, so that clients that were rejected together do not retry together.
    """
    backoff = min(MAX_BACKOFF_S, INITIAL_BACKOFF_S * 2.0**retry) * random.uniform(0.5, 1.0)
    if isinstance(outcome, NoResponse):
        transient = isinstance(outcome.error, (httpx.NetworkError, httpx.RemoteProtocolError))
        return backoff if transient and not outcome.started else None
    if outcome.status not in (429, 503) and not _is_process_death(outcome):
        return None
    return _retry_after(outcome.headers.get("retry-after", "")) + backoff


def _is_process_death(answer: Answer) -> bool:
    """Check for the 500 in plain text that Ray Serve's proxy sends when the process of a request died."""
    if answer.status != 500:
        return False
    try:
        json.loads(answer.body)
    except ValueError:
        return True
    return False


def _retry_after(value: str) -> float:
    """Parse a Retry-After header, seconds or a date, to seconds from now; 0 if missing or not valid."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def _parse_response(
    outcome: Answer | NoResponse, request: httpx.Request, read: Callable[[Any], T], timeout_s: float
) -> T:
    where = f"{request.method} {request.url.copy_with(query=None, userinfo=b'')}"
    if isinstance(outcome, NoResponse):
        if isinstance(outcome.error, httpx.TimeoutException):
            raise ServingError(f"{where}: no answer within {timeout_s:g} s.") from outcome.error
        reason = f"{type(outcome.error).__name__}: {outcome.error}"
        what = "did not finish its response" if outcome.started else "does not answer"
        raise ServingError(f"{where} {what} ({reason}).") from outcome.error
    try:
        content = json.loads(outcome.body)
    except ValueError as error:
        raise _make_error(
            outcome, f"{where} answered {outcome.status} without JSON: is it a raydetr endpoint?"
        ) from error
    if not 200 <= outcome.status < 300:
        raise _make_error(outcome, f"{where} answered {outcome.status}: {_error_message(content)}")
    try:
        return read(content)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ServingError(
            f"{where} sent an unexpected response ({type(error).__name__}: {error}): is it a raydetr endpoint of "
            "this version?"
        ) from error


def _make_error(answer: Answer, message: str) -> ServingError:
    """Build a RequestError for a 4xx status, else a ServingError."""
    if identifier := answer.headers.get("x-request-id"):
        message += f" (request {identifier[:64]})"
    return RequestError(answer.status, message) if 400 <= answer.status < 500 else ServingError(message)


def _error_message(content: Any) -> str:
    """Extract the message from the JSON of an error, of the endpoint or of a proxy in front of it."""
    if isinstance(content, dict):
        error = content.get("error", content)
        return str(error.get("message", error) if isinstance(error, dict) else error)
    return str(content)
