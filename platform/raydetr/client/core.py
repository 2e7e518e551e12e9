"""Requests, retries and responses, shared by the blocking and the asynchronous client."""

import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import httpx
import tenacity
from pydantic import ValidationError

from raydetr.errors import RequestError, ServingError
from raydetr.responses import (
    DetectManyResponse,
    DetectResponse,
    HealthResponse,
    ModelsResponse,
    ReadyResponse,
    SegmentResponse,
    ServedModel,
)

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

T = TypeVar("T")
ImageSource: TypeAlias = "bytes | str | os.PathLike[str] | PillowImage"
"""An encoded image, a file's path, or a Pillow image (sent as PNG)."""
Params: TypeAlias = Sequence[tuple[str, Any]]

IMAGES_PER_REQUEST = 8
BYTES_PER_REQUEST = 16 * 1024 * 1024
"""Maximum body of a `detect_many` request, in bytes, unless a single image is larger."""
PROBE_TIMEOUT_S = 10.0
"""Maximum timeout of `ready`, in seconds."""
INITIAL_BACKOFF_S = 0.25
"""Maximum backoff before the first retry, in seconds; doubled before each further one."""
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


class Call(Generic[T]):
    """A request with its time limit and its retries; the clients do the I/O.

    Args:
        request: the request.
        parse: converts the body of a response to the result.
        timeout_s: time limit of the call, waits included, in seconds.
        retries: maximum number of retries.
        subject: what the request is about, for messages.
    """

    def __init__(
        self,
        request: httpx.Request,
        parse: Callable[[bytes], T],
        timeout_s: float,
        retries: int,
        subject: str = "",
    ) -> None:
        self.request, self.parse, self.subject = request, parse, subject
        self.timeout_s, self.retries = timeout_s, retries
        self.deadline = time.monotonic() + timeout_s

    def policy(self) -> dict[str, Any]:
        """Return the arguments of `tenacity.Retrying`; the last outcome is the result also if it is an error."""
        return {
            "retry": tenacity.retry_if_result(is_transient),
            # Random, so that clients that were rejected together do not retry together.
            "wait": tenacity.wait_combine(
                _retry_after, tenacity.wait_random_exponential(INITIAL_BACKOFF_S, MAX_BACKOFF_S)
            ),
            "stop": tenacity.stop_after_attempt(self.retries + 1)
            | tenacity.stop_before_delay(self.timeout_s),
            "retry_error_callback": lambda state: state.outcome.result(),
        }

    def prepare(self) -> httpx.Request:
        """Return the request with the time that is left."""
        left = max(self.deadline - time.monotonic(), 0.001)
        self.request.extensions["timeout"] = httpx.Timeout(left).as_dict()
        return self.request

    def check_time(self) -> None:
        """Enforce the deadline for the whole response; httpx's own timeouts apply to each chunk.

        Raises:
            httpx.ReadTimeout: the deadline has passed.
        """
        if time.monotonic() > self.deadline:
            raise httpx.ReadTimeout("the response is too slow", request=self.request)

    def result(self, outcome: Answer | NoResponse) -> T:
        """Return the parsed response.

        Raises:
            RequestError: the endpoint answered 4xx.
            ServingError: the endpoint does not answer, or its response is not valid.
        """
        where = f"{self.request.method} {self.request.url.copy_with(query=None, userinfo=b'')}"
        if isinstance(outcome, NoResponse):
            if isinstance(outcome.error, httpx.TimeoutException):
                raise ServingError(f"{where}: no answer within {self.timeout_s:g} s.") from outcome.error
            reason = f"{type(outcome.error).__name__}: {outcome.error}"
            what = "did not finish its response" if outcome.started else "does not answer"
            raise ServingError(f"{where} {what} ({reason}).") from outcome.error
        where = f"{self.subject}: {where}" if self.subject else where
        no_json = f"{where} answered {outcome.status} without JSON: is it a raydetr endpoint?"
        if not 200 <= outcome.status < 300:
            if not is_json(outcome.body):
                raise _make_error(outcome, no_json)
            raise _make_error(outcome, f"{where} answered {outcome.status}: {_error_message(outcome.body)}")
        try:
            return self.parse(outcome.body)
        except ValidationError as error:
            found = error.errors()[0]
            if found["type"] == "json_invalid":
                raise _make_error(outcome, no_json) from error
            place = ".".join(map(str, found["loc"]))
            raise ServingError(
                f"{where} sent an unexpected response ({place}: {found['msg']}): is it a raydetr endpoint of this "
                "version?"
            ) from error


def is_transient(outcome: Answer | NoResponse) -> bool:
    """Return whether a retry may succeed.

    Transient are 429, 503, connections that are refused or lost before the response starts, and a 500 in plain text,
    which Ray Serve's proxy sends when the process of a request died. Any other error would only repeat.
    """
    if isinstance(outcome, NoResponse):
        return not outcome.started and isinstance(
            outcome.error, httpx.NetworkError | httpx.RemoteProtocolError
        )
    return outcome.status in (429, 503) or (outcome.status == 500 and not is_json(outcome.body))


def is_ready(outcome: Answer | NoResponse) -> bool:
    """Return whether an endpoint that is ready, or something else, has answered."""
    return isinstance(outcome, Answer) and outcome.status != 503


def _retry_after(state: tenacity.RetryCallState) -> float:
    """Return the seconds in a Retry-After header, which holds seconds or a date; 0 if missing or not valid."""
    assert state.outcome is not None
    outcome = state.outcome.result()
    value = outcome.headers.get("retry-after", "") if isinstance(outcome, Answer) else ""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


class BaseClient:
    """Build the calls that both clients run."""

    def __init__(self, endpoint: str, token: str | None, timeout_s: float, retries: int) -> None:
        """
        Args:
            endpoint: URL, e.g. `http://127.0.0.1:8000`.
            token: bearer token, if the endpoint requires one.
            timeout_s: time limit of a call including its retries, in seconds.
            retries: maximum number of retries of a request that gets 429 or 503, or does not reach the endpoint.

        Raises:
            ServingError: the endpoint is not an HTTP URL, or a header cannot hold the token.
        """
        try:
            url = httpx.URL(endpoint.rstrip("/"))
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise ServingError(f"--endpoint is {endpoint!r}: give http://HOST:PORT.")
        self._headers = {"User-Agent": "raydetr", "Accept": "application/json"}
        if token is not None:
            if not (token.isascii() and token.isprintable() and token == token.strip() and token):
                raise ServingError(
                    "The token is empty, or contains spaces, line breaks or characters that a header cannot hold."
                )
            self._headers["Authorization"] = f"Bearer {token}"
        self._endpoint = str(url)
        self._timeout_s = timeout_s
        self._retries = retries

    def detect_call(self, image: bytes, params: Params) -> Call[DetectResponse]:
        """Build the call of `detect`."""
        return self._call("POST", "/v1/detect", DetectResponse.model_validate_json, params, content=image)

    def detect_many_call(self, batch: "ImageBatch", params: Params) -> Call[list[DetectResponse]]:
        """Build the call for a few images of `detect_many`."""
        return self._call("POST", "/v1/detect", batch.parse, params, str(batch), files=batch.parts())

    def segment_call(self, image: bytes, params: Params) -> Call[SegmentResponse]:
        """Build the call of `segment`."""
        return self._call("POST", "/v1/segment", SegmentResponse.model_validate_json, params, content=image)

    def models_call(self) -> Call[list[ServedModel]]:
        """Build the call of `models`."""
        return self._call("GET", "/v1/models", lambda body: ModelsResponse.model_validate_json(body).models)

    def health_call(self) -> Call[HealthResponse]:
        """Build the call of `health`."""
        return self._call("GET", "/health", HealthResponse.model_validate_json)

    def _call(
        self,
        method: str,
        path: str,
        parse: Callable[[bytes], T],
        params: Params = (),
        subject: str = "",
        **body: Any,
    ) -> Call[T]:
        headers = dict(self._headers)
        if "content" in body:
            headers["Content-Type"] = (
                "application/octet-stream"  # the server detects the format from the bytes
            )
        given = [(name, value) for name, value in params if value is not None]
        request = httpx.Request(method, self._endpoint + path, headers=headers, params=given, **body)
        return Call(request, parse, self._timeout_s, self._retries, subject)

    def ready_call(self) -> Call[bool]:
        """Build the call of `ready`, without retries."""
        request = httpx.Request("GET", f"{self._endpoint}/ready", headers=self._headers)
        return Call(
            request,
            lambda body: ReadyResponse.model_validate_json(body).ready,
            min(self._timeout_s, PROBE_TIMEOUT_S),
            0,
        )


def batches(images: Iterable[ImageSource]) -> Iterator["ImageBatch"]:
    """Yield the requests of `detect_many`, of a few images each. `images` is read lazily."""
    first, size = 0, 0
    chunk: list[bytes] = []
    for image in images:
        data = encode_image(image)
        if chunk and (len(chunk) == IMAGES_PER_REQUEST or size + len(data) > BYTES_PER_REQUEST):
            yield ImageBatch(first, chunk)
            first, chunk, size = first + len(chunk), [], 0
        chunk.append(data)
        size += len(data)
    if chunk:
        yield ImageBatch(first, chunk)


@dataclass(frozen=True)
class ImageBatch:
    """Images that are sent in one request; `first` is the index of the first one, for messages."""

    first: int
    images: list[bytes]

    def parts(self) -> list[tuple[str, tuple[str, bytes, str]]]:
        """Return the parts of a multipart/form-data body."""
        return [
            ("images", (f"image-{self.first + place + 1}", image, "application/octet-stream"))
            for place, image in enumerate(self.images)
        ]

    def parse(self, body: bytes) -> list[DetectResponse]:
        """Return a response for each image.

        Raises:
            ServingError: the response has another number of results.
        """
        answer = DetectManyResponse.model_validate_json(body)
        if len(answer.results) != len(self.images):
            raise ServingError(
                f"{self}: the endpoint sent {len(answer.results)} results for {len(self.images)} images."
            )
        return [
            DetectResponse(
                model=answer.model, image=each.image, detections=each.detections, times=answer.times
            )
            for each in answer.results
        ]

    def __str__(self) -> str:
        return f"images {self.first + 1} to {self.first + len(self.images)}, sent in one request"


def encode_image(image: ImageSource) -> bytes:
    """Return the bytes to send.

    Raises:
        OSError: the file cannot be read.
        TypeError: it is not bytes, a path or a Pillow image.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, os.PathLike)):
        return Path(image).read_bytes()
    if not callable(getattr(image, "save", None)):  # Pillow's images have it; Pillow is not imported here
        raise TypeError(f"image is a {type(image).__name__}: expected bytes, a path or a Pillow image.")
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")  # PNG supports no other mode
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def detect_params(
    threshold: float, top_k: int | None, classes: Sequence[str] | None, orientation: str | None
) -> Params:
    """Build the query of `/v1/detect`, see `Client.detect`."""
    if isinstance(classes, str):
        raise TypeError(f"classes is {classes!r}: expected a list of names.")
    return [
        ("threshold", threshold),
        ("top_k", top_k),
        *(("classes", name) for name in classes or ()),
        ("orientation", orientation),
    ]


def is_json(body: bytes) -> bool:
    """Return whether a body is JSON."""
    try:
        json.loads(body)
    except ValueError:
        return False
    return True


def _make_error(answer: Answer, message: str) -> ServingError:
    """Build a RequestError for a 4xx status, else a ServingError."""
    if identifier := answer.headers.get("x-request-id"):
        message += f" (request {identifier[:64]})"
    return RequestError(answer.status, message) if 400 <= answer.status < 500 else ServingError(message)


def _error_message(body: bytes) -> str:
    """Extract the message from the JSON of an error, of the endpoint or of a proxy in front of it."""
    content = json.loads(body)
    error = content.get("error", content) if isinstance(content, dict) else content
    return str(error.get("message", error) if isinstance(error, dict) else error)
