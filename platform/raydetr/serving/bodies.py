"""The three forms of a request's body, each as a list of encoded images.

Raw bytes of one image, multipart/form-data with parts named `images`, or JSON `{"images": ["<base64>", …]}`. The body
is read within `Limits.max_bytes` whatever its form, and taken apart on a thread. Nothing is written to a disk, no file
name is used, and nothing is fetched: a URL in place of an image is refused like any other text.
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
"""An image file's bytes; a view where it is part of a body, which is not copied."""

# curl --data-binary says application/x-www-form-urlencoded where no type is given.
_RAW = {"", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded"}
_ACCEPTED = (
    "image/jpeg, image/png, image/webp, application/octet-stream, multipart/form-data or application/json"
)
_LONGEST_BOUNDARY = 70  # RFC 2046
_LONGEST_HEAD = 4096  # bytes of a part's headers
_LONGEST_CONTENT_TYPE = 1024
_STRUCTURE = (b"{", b"[", b",", b":")
_MORE_STRUCTURE = 64  # characters besides the commas of the list: bounds the number of values and their depth


@dataclass(frozen=True)
class Body:
    """What a request brought."""

    images: list[Encoded]
    """Encoded, in the order they were sent; at least one."""
    many: bool
    """Whether the body was a list (multipart or JSON) and the answer has to be one, or one raw image."""


async def read_images(request: Request, limits: Limits, take: Callable[[int], None]) -> Body:
    """Read a request's body and take it apart.

    Args:
        request: its body has not been read.
        limits: `max_bytes` and `max_images` count here.
        take: see `read_body`.

    Raises:
        RequestError: 400 for a body that is empty or malformed, 413 for one that is too large or has too many images,
            415 for a type or an encoding that is not read, 422 for JSON or parts of another shape.
    """
    content_type = _content_type(request.headers.get("content-type", ""))
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RequestError(415, "The body has a Content-Encoding: send it without.")
    kind = content_type.get_content_type() if content_type["content-type"] else ""
    is_raw = kind in _RAW or kind.startswith("image/")
    boundary = _boundary(content_type) if kind == "multipart/form-data" else b""
    if not is_raw and kind not in ("multipart/form-data", "application/json"):
        raise RequestError(415, f"The Content-Type of the body is not one that is read: send {_ACCEPTED}.")
    data = await read_body(request.stream(), request.headers.get("content-length"), limits, take)
    if is_raw:
        return Body([data], many=False)
    if kind == "application/json":
        return Body(await asyncio.to_thread(images_of_json, data, limits), many=True)
    return Body(await asyncio.to_thread(images_of_multipart, data, boundary, limits), many=True)


async def read_body(
    chunks: AsyncIterator[bytes], declared: str | None, limits: Limits, take: Callable[[int], None]
) -> bytearray:
    """Collect a request's body, and stop as soon as it is over the limit.

    Args:
        chunks: of the body.
        declared: the Content-Length header, where there is one.
        limits: `max_bytes` counts here.
        take: called with the size of each chunk before it is stored; may refuse it with an exception.

    Raises:
        RequestError: 400 for an empty body, 413 for one that is too large.
    """
    too_large = RequestError(413, f"The body is larger than {limits.max_bytes} bytes: send a smaller image.")
    # int() refuses thousands of digits with a ValueError
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
        take(len(chunk))
        body += chunk
    if not body:
        raise RequestError(400, "The body is empty: send the bytes of a JPEG, PNG or WebP file.")
    return body


def images_of_json(data: bytes | bytearray, limits: Limits) -> list[Encoded]:
    """The images of `{"images": ["<base64>", …]}`.

    Args:
        data: a body.
        limits: `max_images` counts here.

    Raises:
        RequestError: 400 for what is not JSON, 413 for too many images, 422 for another shape or for text that is not
            strict base64 (RFC 4648, padded, no line breaks).
    """
    # A value needs a character of structure, and base64 has none of them: many make a body that can only be wrong, and
    # whose parsing would take thirty times its size or nest too deep.
    if sum(map(data.count, _STRUCTURE)) > limits.max_images + _MORE_STRUCTURE:
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
        raise RequestError(400, "The body is not JSON that can be read.") from None
    if not isinstance(content, dict) or set(content) != {"images"} or not isinstance(content["images"], list):
        raise RequestError(422, 'The JSON is not {"images": ["<base64>", …]} with that one key.')
    texts = content["images"]
    _check_count(len(texts), limits)
    return [_decoded(text, number) for number, text in enumerate(texts, 1)]


def _decoded(text: Any, number: int) -> bytes:
    if not isinstance(text, str):
        raise RequestError(422, f"images: number {number} is not a string of base64.")
    try:
        image = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise RequestError(
            422,
            f"images: number {number} is not base64 (RFC 4648, padded, without line breaks and without a "
            "`data:` prefix; addresses are not fetched).",
        ) from None
    if not image:
        raise RequestError(422, f"images: number {number} is empty.")
    return image


def images_of_multipart(data: bytes | bytearray, boundary: bytes, limits: Limits) -> list[Encoded]:
    """The parts named `images` of a multipart/form-data body (RFC 7578).

    Args:
        data: a body.
        boundary: of its Content-Type, without the leading dashes.
        limits: `max_images` counts here.

    Raises:
        RequestError: 400 for a body that is malformed or cut short, 413 for too many parts, 422 for a part of another
            name or an empty one.
    """
    images: list[Encoded] = []
    for number, (head, content) in enumerate(_parts(data, boundary), 1):
        _check_count(number, limits)
        name = _name(head, number)
        if name != "images":
            raise RequestError(422, f"Part {number} is not named `images`: other parts are not read.")
        if not content:
            raise RequestError(422, f"images: number {number} is empty.")
        images.append(content)
    _check_count(len(images), limits)
    return images


def _parts(data: bytes | bytearray, boundary: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Headers and content of each part; every search is linear and goes on where the last one ended."""
    view = memoryview(data)
    delimiter = b"\r\n--" + boundary
    if data.startswith(delimiter[2:]):
        position = len(delimiter) - 2
    else:
        position = data.find(delimiter) + len(delimiter)
        if position < len(delimiter):
            raise RequestError(400, "The multipart body does not have the boundary of its Content-Type.")
    while not data.startswith(b"--", position):
        line_end = data.find(b"\r\n", position, position + 64)  # blanks may follow a boundary
        if line_end < 0 or data[position:line_end].strip(b" \t"):
            raise RequestError(400, "The multipart body is malformed after a boundary.")
        # a part without headers begins with the empty line
        head_end = data.find(b"\r\n\r\n", line_end, line_end + _LONGEST_HEAD)
        if head_end < 0:
            raise RequestError(
                400,
                f"A part of the multipart body does not begin with headers of at most {_LONGEST_HEAD} bytes.",
            )
        end = data.find(delimiter, head_end + 2)
        if end < 0:
            raise RequestError(400, "The multipart body is cut short: it does not end with its boundary.")
        yield bytes(view[line_end + 2 : head_end]), view[head_end + 4 : end]
        position = end + len(delimiter)


def _name(head: bytes, number: int) -> str | None:
    """The name of a part; of its file name nothing is used."""
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
    if len(value) > _LONGEST_CONTENT_TYPE:
        raise RequestError(415, "The Content-Type is too long.")
    message["content-type"] = re.sub(r"[\r\n]", " ", value.strip())
    return message


def _boundary(content_type: Message) -> bytes:
    boundary = content_type.get_param("boundary")
    if (
        not isinstance(boundary, str)
        or not boundary.isascii()
        or not 1 <= len(boundary) <= _LONGEST_BOUNDARY
        or not boundary.isprintable()
    ):
        raise RequestError(
            400, f"The multipart Content-Type has no boundary of 1 to {_LONGEST_BOUNDARY} ASCII characters."
        )
    return boundary.encode("ascii")


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.max_images:
        raise RequestError(413, f"More than {limits.max_images} images: send them in several requests.")
    if not count:
        raise RequestError(422, "There is no image in the body: send at least one.")
