"""Parse request bodies of three formats to lists of encoded images.

The formats are the raw bytes of one image, multipart/form-data with parts named `images`, and JSON
`{"images": ["<base64>", …]}`. `Limits.max_bytes` bounds each of them. Parsing runs on a thread, writes nothing to disk,
uses no file name and fetches nothing: a URL in place of an image is rejected like any other text.
"""

import asyncio
import binascii
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from typing import Any, TypeAlias

from fastapi import Request

from raydetr.errors import RequestError
from raydetr.serving.images import Limits

Encoded: TypeAlias = bytes | bytearray | memoryview
"""Bytes of an image file. A part of a multipart body is a view, so that the body is not copied."""

# curl --data-binary sends application/x-www-form-urlencoded by default.
_RAW = {"", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded"}
_ACCEPTED = (
    "image/jpeg, image/png, image/webp, application/octet-stream, multipart/form-data or application/json"
)
_MAX_BOUNDARY_CHARS = 70  # RFC 2046
_MAX_PART_HEADERS_BYTES = 4096  # bytes of the headers of a part
_MAX_CONTENT_TYPE_CHARS = 1024
_STRUCTURE = (b"{", b"[", b",", b":")
_EXTRA_STRUCTURE = 64  # beyond the commas of the list; bounds the number of values and their nesting


@dataclass(frozen=True)
class Body:
    """Parsed request body."""

    images: list[Encoded]
    """Encoded images in the order of the body; at least one."""
    is_list: bool
    """Whether the body was a list (multipart or JSON), so that the response must be one, or one raw image."""


async def read_images(request: Request, limits: Limits, reserve: Callable[[int], None]) -> Body:
    """Read and parse the body of a request.

    Args:
        request: a request whose body has not been read.
        limits: `max_bytes` and `max_images` apply.
        reserve: see `read_body`.

    Raises:
        RequestError: 400 for an empty or malformed body, 413 for a body that is too large or has too many images, 415
            for an unsupported type or encoding, 422 for an unexpected JSON structure or part.
    """
    content_type = _content_type(request.headers.get("content-type", ""))
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RequestError(415, "The body has a Content-Encoding: send it uncompressed.")
    kind = content_type.get_content_type() if content_type["content-type"] else ""
    is_raw = kind in _RAW or kind.startswith("image/")
    boundary = _boundary(content_type) if kind == "multipart/form-data" else b""
    if not is_raw and kind not in ("multipart/form-data", "application/json"):
        raise RequestError(415, f"The Content-Type of the body is not supported: send {_ACCEPTED}.")
    data = await read_body(request.stream(), request.headers.get("content-length"), limits, reserve)
    if is_raw:
        return Body([data], is_list=False)
    if kind == "application/json":
        return Body(await asyncio.to_thread(images_of_json, data, limits), is_list=True)
    return Body(await asyncio.to_thread(images_of_multipart, data, boundary, limits), is_list=True)


async def read_body(
    chunks: AsyncIterator[bytes], declared: str | None, limits: Limits, reserve: Callable[[int], None]
) -> bytearray:
    """Read a request's body, and stop as soon as it exceeds the limit.

    Args:
        chunks: chunks of the body.
        declared: the Content-Length header, if there is one.
        limits: `max_bytes` applies.
        reserve: called with the size of each chunk before it is stored; raises an exception to reject the chunk.

    Raises:
        RequestError: 400 for an empty body, 413 for one that is too large.
    """
    too_large = RequestError(413, f"The body is larger than {limits.max_bytes} bytes: send a smaller image.")
    # the length first: int() raises ValueError for thousands of digits
    if (
        declared is not None
        and declared.isdecimal()
        and (len(declared) > 18 or int(declared) > limits.max_bytes)
    ):
        raise too_large
    body = bytearray()
    async for chunk in chunks:
        if len(body) + len(chunk) > limits.max_bytes:
            raise too_large
        reserve(len(chunk))
        body += chunk
    if not body:
        raise RequestError(400, "The body is empty: send the bytes of a JPEG, PNG or WebP file.")
    return body


def images_of_json(data: bytes | bytearray, limits: Limits) -> list[Encoded]:
    """Parse the images of `{"images": ["<base64>", …]}`.

    Args:
        data: the body.
        limits: `max_images` applies.

    Raises:
        RequestError: 400 for invalid JSON, 413 for too many images, 422 for another structure or for text that is not
            strict base64 (RFC 4648, padded, no line breaks).
    """
    # Each JSON value needs a structural character, and base64 contains none. A body with many of them is invalid, and
    # parsing it would take thirty times its size in memory, or nest too deep.
    if sum(map(data.count, _STRUCTURE)) > limits.max_images + _EXTRA_STRUCTURE:
        raise RequestError(
            413, f'The JSON has more values than {{"images": […]}} with {limits.max_images} images.'
        )
    try:
        content: Any = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise RequestError(400, "The body is not JSON: it is not UTF-8.") from None
    except json.JSONDecodeError as error:
        raise RequestError(400, f"The body is not JSON: {error}.") from None
    except ValueError:  # an integer of thousands of digits
        raise RequestError(400, "The body is not valid JSON.") from None
    if not isinstance(content, dict) or set(content) != {"images"} or not isinstance(content["images"], list):
        raise RequestError(422, 'The JSON is not {"images": ["<base64>", …]} with that one key.')
    texts = content["images"]
    _check_count(len(texts), limits)
    return [_decode_base64(text, number) for number, text in enumerate(texts, 1)]


def _decode_base64(text: Any, number: int) -> bytes:
    if not isinstance(text, str):
        raise RequestError(422, f"images: number {number} is not a base64 string.")
    try:
        image = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise RequestError(
            422,
            f"images: number {number} is not base64 (RFC 4648, padded, without line breaks and without a "
            "`data:` prefix; URLs are not fetched).",
        ) from None
    if not image:
        raise RequestError(422, f"images: number {number} is empty.")
    return image


def images_of_multipart(data: bytes | bytearray, boundary: bytes, limits: Limits) -> list[Encoded]:
    """Parse the parts named `images` of a multipart/form-data body (RFC 7578).

    Args:
        data: the body.
        boundary: boundary of the Content-Type, without the leading dashes.
        limits: `max_images` applies.

    Raises:
        RequestError: 400 for a malformed or truncated body, 413 for too many parts, 422 for an empty part or one of
            another name.
    """
    images: list[Encoded] = []
    for number, (head, content) in enumerate(_parts(data, boundary), 1):
        _check_count(number, limits)
        name = _part_name(head, number)
        if name != "images":
            raise RequestError(422, f"Part {number} is not named `images`: send parts of that name only.")
        if not content:
            raise RequestError(422, f"images: number {number} is empty.")
        images.append(content)
    _check_count(len(images), limits)
    return images


def _parts(data: bytes | bytearray, boundary: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the headers and the content of each part. Each search starts where the last one ended: linear time."""
    view = memoryview(data)
    delimiter = b"\r\n--" + boundary
    if data.startswith(delimiter[2:]):
        position = len(delimiter) - 2
    else:
        position = data.find(delimiter) + len(delimiter)
        if position < len(delimiter):
            raise RequestError(400, "The multipart body does not have the boundary of its Content-Type.")
    while not data.startswith(b"--", position):
        line_end = data.find(b"\r\n", position, position + 64)  # a boundary may be followed by blanks
        if line_end < 0 or data[position:line_end].strip(b" \t"):
            raise RequestError(400, "The multipart body is malformed after a boundary.")
        # a part without headers starts with the empty line
        head_end = data.find(b"\r\n\r\n", line_end, line_end + _MAX_PART_HEADERS_BYTES)
        if head_end < 0:
            raise RequestError(
                400,
                f"A part of the multipart body does not start with headers of at most {_MAX_PART_HEADERS_BYTES} bytes.",
            )
        end = data.find(delimiter, head_end + 2)
        if end < 0:
            raise RequestError(400, "The multipart body is truncated: it does not end with its boundary.")
        yield bytes(view[line_end + 2 : head_end]), view[head_end + 4 : end]
        position = end + len(delimiter)


def _part_name(head: bytes, number: int) -> str | None:
    """Return the name of a part. Its file name is ignored."""
    disposition = Message()
    for line in head.decode("utf-8", "replace").split("\r\n"):
        key, _, value = line.partition(":")
        key = key.strip().lower()
        if key == "content-disposition":
            disposition["content-disposition"] = re.sub(r"[\r\n]", " ", value.strip())
        elif key == "content-transfer-encoding" and value.strip().lower() not in ("binary", "8bit", "7bit"):
            raise RequestError(
                415, f"Part {number} has a Content-Transfer-Encoding: send the bytes as they are."
            )
    name = disposition.get_param("name", header="content-disposition")
    return name if isinstance(name, str) else None


def _content_type(value: str) -> Message:
    message = Message()
    if len(value) > _MAX_CONTENT_TYPE_CHARS:
        raise RequestError(415, "The Content-Type is too long.")
    message["content-type"] = re.sub(r"[\r\n]", " ", value.strip())
    return message


def _boundary(content_type: Message) -> bytes:
    boundary = content_type.get_param("boundary")
    if (
        not isinstance(boundary, str)
        or not boundary.isascii()
        or not 1 <= len(boundary) <= _MAX_BOUNDARY_CHARS
        or not boundary.isprintable()
    ):
        raise RequestError(
            400, f"The multipart Content-Type has no boundary of 1 to {_MAX_BOUNDARY_CHARS} ASCII characters."
        )
    return boundary.encode("ascii")


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.max_images:
        raise RequestError(413, f"More than {limits.max_images} images: send them in several requests.")
    if not count:
        raise RequestError(422, "The body contains no image: send at least one.")
