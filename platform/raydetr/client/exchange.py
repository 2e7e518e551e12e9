"""One call of the endpoint, with its repeats, as a generator: the same for the client that blocks and the one that awaits.

As in httpx's own authentication, the generator decides and its driver does: it yields what to do next, a request to
send or seconds to wait, and is sent what came of it.
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

FIRST_WAIT_S = 0.25
"""Before the first repeat; doubled before each one more."""
LONGEST_WAIT_S = 8.0
"""Of those waits; a server that asks for more (Retry-After) gets it."""


@dataclass(frozen=True)
class Answer:
    """A whole response."""

    status: int
    headers: httpx.Headers
    body: bytes


@dataclass(frozen=True)
class Lost:
    """No whole response: what happened, and whether the server had begun to answer."""

    error: httpx.HTTPError
    begun: bool = False


@dataclass(frozen=True)
class Send:
    """What to do next: send a request, until a time of `time.monotonic`."""

    request: httpx.Request
    until: float

    def check_time(self) -> None:
        """httpx's own timeouts are for each chunk of an answer; this one is for all of it.

        Raises:
            httpx.ReadTimeout: the time is over.
        """
        if time.monotonic() > self.until:
            raise httpx.ReadTimeout("the answer comes too slowly", request=self.request)


@dataclass(frozen=True)
class Wait:
    """What to do next: nothing, for some seconds."""

    seconds: float


Exchange = Generator[Send | Wait, Answer | Lost | None, T]
"""Yields what to do, is sent what came of it (None after a wait), returns the result."""


def exchange(request: httpx.Request, read: Callable[[Any], T], timeout_s: float, retries: int) -> Exchange[T]:
    """Send a request until it is answered, with more and more time between, and read the answer.

    Repeated are 429, 503, connections that are refused or lost before an answer begins, and 500 in another form than
    the endpoint's: nothing else would come out differently.

    Args:
        request: its `timeout` extension is set here.
        read: the answer's JSON to the result.
        timeout_s: for all of it, waits included.
        retries: most repeats.

    Raises:
        RequestError: the endpoint answered 4xx.
        ServingError: it does not answer, or not as it should.
    """
    until = time.monotonic() + timeout_s
    repeat = 0
    while True:
        left = max(until - time.monotonic(), 0.001)
        request.extensions["timeout"] = httpx.Timeout(left).as_dict()
        outcome = yield Send(request, until)
        assert outcome is not None
        pause = _pause(outcome, repeat)
        if pause is None or repeat >= retries or time.monotonic() + pause >= until:
            return _result(outcome, request, read, timeout_s)
        yield Wait(pause)
        repeat += 1


def probe(request: httpx.Request, timeout_s: float) -> Exchange[bool]:
    """Ask once; False where nothing answers, or 503.

    Raises:
        ServingError: something else answers.
    """
    request.extensions["timeout"] = httpx.Timeout(timeout_s).as_dict()
    outcome = yield Send(request, time.monotonic() + timeout_s)
    assert outcome is not None
    if isinstance(outcome, Lost) or outcome.status == 503:
        return False
    return _result(outcome, request, lambda _: True, timeout_s)


def _pause(outcome: Answer | Lost, repeat: int) -> float | None:
    """Seconds before the next try; None where there should be none.

    Half of each wait is random, so that clients that were turned away together do not come back together.
    """
    backoff = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0**repeat) * random.uniform(0.5, 1.0)
    if isinstance(outcome, Lost):
        again = isinstance(outcome.error, (httpx.NetworkError, httpx.RemoteProtocolError))
        return backoff if again and not outcome.begun else None
    if outcome.status not in (429, 503) and not _died(outcome):
        return None
    return _retry_after(outcome.headers.get("retry-after", "")) + backoff


def _died(answer: Answer) -> bool:
    """Whether the process that worked on the request died: Ray Serve's proxy answers 500 for it, in plain text."""
    if answer.status != 500:
        return False
    try:
        json.loads(answer.body)
    except ValueError:
        return True
    return False


def _retry_after(value: str) -> float:
    """Seconds from now; the header holds seconds or a date, or is not there."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def _result(outcome: Answer | Lost, request: httpx.Request, read: Callable[[Any], T], timeout_s: float) -> T:
    where = f"{request.method} {request.url.copy_with(query=None, userinfo=b'')}"
    if isinstance(outcome, Lost):
        if isinstance(outcome.error, httpx.TimeoutException):
            raise ServingError(f"{where}: no answer within {timeout_s:g} s.") from outcome.error
        reason = f"{type(outcome.error).__name__}: {outcome.error}"
        what = "broke off its answer" if outcome.begun else "does not answer"
        raise ServingError(f"{where} {what} ({reason}).") from outcome.error
    try:
        content = json.loads(outcome.body)
    except ValueError as error:
        raise _error(
            outcome, f"{where} answered {outcome.status} without JSON: is it a raydetr endpoint?"
        ) from error
    if not 200 <= outcome.status < 300:
        raise _error(outcome, f"{where} answered {outcome.status}: {_message(content)}")
    try:
        return read(content)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ServingError(
            f"{where} answered in another form ({type(error).__name__}: {error}): is it a raydetr endpoint of "
            "this version?"
        ) from error


def _error(answer: Answer, message: str) -> ServingError:
    """RequestError where the request is at fault."""
    if identifier := answer.headers.get("x-request-id"):
        message += f" (request {identifier[:64]})"
    return RequestError(answer.status, message) if 400 <= answer.status < 500 else ServingError(message)


def _message(content: Any) -> str:
    """Of an error's JSON, whoever wrote it: we, or what stands before us."""
    if isinstance(content, dict):
        error = content.get("error", content)
        return str(error.get("message", error) if isinstance(error, dict) else error)
    return str(content)
