"""The API calls as exchanges, without I/O. `client.Client` and `client.AsyncClient` run them."""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import httpx

from raydetr.client import results
from raydetr.client.exchange import Exchange, exchange, probe
from raydetr.client.results import DetectResult
from raydetr.errors import RequestError, ServingError

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

T = TypeVar("T")
ImageSource: TypeAlias = "bytes | str | os.PathLike[str] | PillowImage"
"""An encoded image, a file's path, or a Pillow image (sent as PNG)."""

IMAGES_PER_REQUEST = 8
BYTES_PER_REQUEST = 16 * 1024 * 1024
"""Maximum body of a `detect_many` request, in bytes, unless a single image is larger."""
PROBE_TIMEOUT_S = 10.0
"""Maximum timeout of `ready`, in seconds."""


class BaseClient:
    """Build the exchanges that both clients run."""

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

    def _request(self, method: str, path: str, **content: Any) -> httpx.Request:
        headers = {**self._headers, **content.pop("headers", {})}
        return httpx.Request(method, self._endpoint + path, headers=headers, **content)

    def get_call(self, path: str, read: Callable[[Any], T]) -> Exchange[T]:
        """Build a GET request with retries."""
        return exchange(self._request("GET", path), read, self._timeout_s, self._retries)

    def post_image_call(
        self, path: str, image: bytes, params: Sequence[tuple[str, Any]], read: Callable[[Any], T]
    ) -> Exchange[T]:
        """Build a POST request of one image with retries."""
        headers = {"Content-Type": "application/octet-stream"}  # the server detects the format from the bytes
        request = self._request("POST", path, content=image, params=_drop_none(params), headers=headers)
        return exchange(request, read, self._timeout_s, self._retries)

    def _post_images(
        self, first: int, images: Sequence[bytes], params: Sequence[tuple[str, Any]]
    ) -> Exchange[list[DetectResult]]:
        """Send several images in one request; `first` is the index of the first one, for messages."""

        def read(answer: Any) -> list[DetectResult]:
            detected = results.parse_detect_results(answer)
            if len(detected) != len(images):
                raise ValueError(f"{len(detected)} results for {len(images)} images")
            return detected

        parts = [
            ("images", (f"image-{first + place + 1}", image, "application/octet-stream"))
            for place, image in enumerate(images)
        ]
        request = self._request("POST", "/v1/detect", files=parts, params=_drop_none(params))
        try:
            return (yield from exchange(request, read, self._timeout_s, self._retries))
        except RequestError as error:
            which = f"images {first + 1} to {first + len(images)}, sent in one request"
            raise RequestError(error.status, f"{which}: {error}") from error

    def many_call(
        self, images: Iterable[ImageSource], params: Sequence[tuple[str, Any]]
    ) -> Iterator[Exchange[list[DetectResult]]]:
        """Yield one exchange per request of a few images. `images` is read lazily."""
        first, size = 0, 0
        chunk: list[bytes] = []
        for image in images:
            data = encode_image(image)
            if chunk and (len(chunk) == IMAGES_PER_REQUEST or size + len(data) > BYTES_PER_REQUEST):
                yield self._post_images(first, chunk, params)
                first, chunk, size = first + len(chunk), [], 0
            chunk.append(data)
            size += len(data)
        if chunk:
            yield self._post_images(first, chunk, params)

    def ready_call(self) -> Exchange[bool]:
        """Build the single request of `ready`."""
        return probe(self._request("GET", "/ready"), min(self._timeout_s, PROBE_TIMEOUT_S))


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
) -> list[tuple[str, Any]]:
    """Build the query of `/v1/detect`, see `Client.detect`."""
    if isinstance(classes, str):
        raise TypeError(f"classes is {classes!r}: expected a list of names.")
    return [
        ("threshold", threshold),
        ("top_k", top_k),
        *(("classes", name) for name in classes or ()),
        ("orientation", orientation),
    ]


def _drop_none(params: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in params if value is not None]
