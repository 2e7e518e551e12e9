"""What a client of the endpoint can ask for, as exchanges; whoever drives them, see `client`."""

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
"""Of `detect_many`, unless one image alone is larger."""
PROBE_TIMEOUT_S = 10.0
"""Of `ready`."""


class Calls:
    """What both clients ask for, as exchanges that they drive."""

    def __init__(self, endpoint: str, token: str | None, timeout_s: float, retries: int) -> None:
        """
        Args:
            endpoint: e.g. `http://127.0.0.1:8000`.
            token: where the endpoint asks for one.
            timeout_s: for a call with all its repeats, in seconds.
            retries: most repeats of a request that is turned away (429, 503) or does not reach the endpoint.

        Raises:
            ServingError: the endpoint or the token cannot be one.
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
                    "The token is empty, or has spaces, line ends or letters that no header can have."
                )
            self._headers["Authorization"] = f"Bearer {token}"
        self._endpoint = str(url)
        self._timeout_s = timeout_s
        self._retries = retries

    def _request(self, method: str, path: str, **content: Any) -> httpx.Request:
        headers = {**self._headers, **content.pop("headers", {})}
        return httpx.Request(method, self._endpoint + path, headers=headers, **content)

    def get_call(self, path: str, read: Callable[[Any], T]) -> Exchange[T]:
        """A GET, with its repeats."""
        return exchange(self._request("GET", path), read, self._timeout_s, self._retries)

    def post_image_call(
        self, path: str, image: bytes, params: Sequence[tuple[str, Any]], read: Callable[[Any], T]
    ) -> Exchange[T]:
        """A POST of one image, with its repeats."""
        headers = {"Content-Type": "application/octet-stream"}  # the server looks at the bytes
        request = self._request("POST", path, content=image, params=_given(params), headers=headers)
        return exchange(request, read, self._timeout_s, self._retries)

    def _post_images(
        self, first: int, images: Sequence[bytes], params: Sequence[tuple[str, Any]]
    ) -> Exchange[list[DetectResult]]:
        """Ask for several images in one request; the first one's number is for messages."""

        def read(answer: Any) -> list[DetectResult]:
            found = results.detect_results(answer)
            if len(found) != len(images):
                raise ValueError(f"{len(found)} results for {len(images)} images")
            return found

        parts = [
            ("images", (f"image-{first + place + 1}", image, "application/octet-stream"))
            for place, image in enumerate(images)
        ]
        request = self._request("POST", "/v1/detect", files=parts, params=_given(params))
        try:
            return (yield from exchange(request, read, self._timeout_s, self._retries))
        except RequestError as error:
            which = f"images {first + 1} to {first + len(images)} of those given, sent together"
            raise RequestError(error.status, f"{which}: {error}") from error

    def many_call(
        self, images: Iterable[ImageSource], params: Sequence[tuple[str, Any]]
    ) -> Iterator[Exchange[list[DetectResult]]]:
        """One exchange for a few images each; reads them as it goes."""
        first, size = 0, 0
        chunk: list[bytes] = []
        for image in images:
            data = encoded(image)
            if chunk and (len(chunk) == IMAGES_PER_REQUEST or size + len(data) > BYTES_PER_REQUEST):
                yield self._post_images(first, chunk, params)
                first, chunk, size = first + len(chunk), [], 0
            chunk.append(data)
            size += len(data)
        if chunk:
            yield self._post_images(first, chunk, params)

    def ready_call(self) -> Exchange[bool]:
        """Of `ready`, asked once."""
        return probe(self._request("GET", "/ready"), min(self._timeout_s, PROBE_TIMEOUT_S))


def encoded(image: ImageSource) -> bytes:
    """The bytes to send.

    Raises:
        OSError: the file cannot be read.
        TypeError: it is neither bytes, nor a path, nor a Pillow image.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, (str, os.PathLike)):
        return Path(image).read_bytes()
    if not callable(getattr(image, "save", None)):  # of Pillow's images, without importing it
        raise TypeError(f"image is a {type(image).__name__}: expected bytes, a path or a Pillow image.")
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")  # PNG has no other modes
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def detect_params(
    threshold: float, top_k: int | None, classes: Sequence[str] | None, orientation: str | None
) -> list[tuple[str, Any]]:
    """The query of `/v1/detect`; see `Client.detect`."""
    if isinstance(classes, str):
        raise TypeError(f"classes is {classes!r}: expected a list of names.")
    return [
        ("threshold", threshold),
        ("top_k", top_k),
        *(("classes", name) for name in classes or ()),
        ("orientation", orientation),
    ]


def _given(params: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in params if value is not None]
