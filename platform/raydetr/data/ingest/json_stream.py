"""Read a JSON object member by member and its arrays element by element, so that the file need not fit in memory."""

import codecs
import json
import re
import zlib
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple, NoReturn

from raydetr import storage
from raydetr.errors import DataError

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
# Near the end of the buffer a number, literal or escape may be cut off without an obvious error, so a value or an error
# counts only if this many characters follow it.
_MARGIN = 16
_PART = 4 * 1024 * 1024
_GZIP = b"\x1f\x8b"
_ARCHIVES = {
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"Rar!": "rar",
}
_KINDS = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}


class Element(NamedTuple):
    """An element of an array in the object, or a member of the object that is not an array or is an empty one.

    key: key of the member.
    position: index in the array; None for a member.
    value: decoded value.
    text: JSON text of the value in the file.
    """

    key: str
    position: int | None
    value: Any
    text: str


def read_elements(uri: str, digest: Any = None) -> Iterator[Element]:
    """Iterate over the elements of a JSON object's arrays and over its other members, in the order of the file.

    Args:
        uri: URI of the file; may be compressed with gzip.
        digest: a hash object of hashlib, which is updated with the bytes of the file.

    Raises:
        StorageError: the file cannot be read.
        DataError: the file is not JSON (the message has the line), not an object, or has a duplicate key.
    """
    text = _Text(uri, digest)
    if (first := text.peek()) != "{":
        kind_of_text = "list" if first == "[" else kind(text.value()[0])
        raise DataError(f"{uri}: not COCO: the file holds a {kind_of_text}; expected an object.")
    text.at += 1
    keys: set[str] = set()
    if text.peek() == "}":
        text.at += 1
    else:
        while True:
            if text.peek() != '"':
                text.fail("Expecting property name enclosed in double quotes")
            key, _ = text.value()
            if key in keys:
                raise DataError(f"{uri}: duplicate key {key!r}.")
            keys.add(key)
            text.take(":")
            yield from _member(key, text)
            if text.take(",}") == "}":
                break
    if text.peek():
        text.fail("Extra data")


def kind(value: Any) -> str:
    """Name the JSON type of a decoded value."""
    return _KINDS.get(type(value), "null")


def _member(key: str, text: "_Text") -> Iterator[Element]:
    if text.peek() != "[":
        yield Element(key, None, *text.value())
        return
    text.at += 1
    if text.peek() == "]":
        text.at += 1
        yield Element(key, None, [], "[]")
        return
    position = 0
    while True:
        yield Element(key, position, *text.value())
        position += 1
        if text.take(",]") == "]":
            return


class _Text:
    """The text of a file. Only the part that is being decoded is in memory."""

    def __init__(self, uri: str, digest: Any) -> None:
        self._uri = uri
        self._chunks = self._contents(digest)
        self._decoder: codecs.IncrementalDecoder | None = None
        self._buffer = ""
        self._ended = False
        self._before = (0, 0, 0)
        """Characters, lines and characters of the last line that were dropped from the buffer."""
        self.at = 0

    def peek(self) -> str:
        """Advance `at` to the next character that is not white space and return it; empty at the end."""
        while True:
            space = _SPACE.match(self._buffer, self.at)
            self.at = space.end() if space else self.at
            if self.at < len(self._buffer) or self._ended:
                return self._buffer[self.at : self.at + 1]
            self._read()

    def take(self, expected: str) -> str:
        """Consume the next character, which must be one of the expected ones."""
        character = self.peek()
        if not character or character not in expected:
            self.fail(f"Expecting {expected[0]!r} delimiter")
        self.at += 1
        return character

    def value(self) -> tuple[Any, str]:
        """Consume the next value; return it and its text."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos + _MARGIN > len(self._buffer)
                if self._ended or not cut:
                    self.fail(error.msg, error.pos)
            except (ValueError, RecursionError) as error:
                self.fail(str(error))
            else:
                if self._ended or end + _MARGIN <= len(self._buffer):
                    text = self._buffer[self.at : end]
                    self.at = end
                    return value, text
            self._read()

    def fail(self, reason: str, at: int | None = None) -> NoReturn:
        """Raise a DataError with the position in the file of index `at` of the buffer (None: the current one)."""
        at = self.at if at is None else at
        characters, lines, column = self._position(at)
        raise DataError(
            f"{self._uri}: not JSON ({reason}: line {lines + 1} column {column + 1} (char {characters}))."
        )

    def _position(self, at: int) -> tuple[int, int, int]:
        characters, lines, column = self._before
        newline = self._buffer.rfind("\n", 0, at)
        column = column + at if newline < 0 else at - newline - 1
        return characters + at, lines + self._buffer.count("\n", 0, at), column

    def _read(self) -> None:
        """Drop the decoded text and at least double the rest, so that a long value is decoded only a few times."""
        self._before = self._position(self.at)
        parts = [self._buffer[self.at :]]
        self.at = 0
        wanted = 2 * len(parts[0]) + 1
        try:
            while sum(map(len, parts)) < wanted and not self._ended:
                chunk = next(self._chunks, b"")
                if self._decoder is None:
                    self._decoder = codecs.getincrementaldecoder(json.detect_encoding(chunk))()
                self._ended = not chunk
                parts.append(self._decoder.decode(chunk, final=not chunk))
        except UnicodeDecodeError as error:
            raise DataError(f"{self._uri}: not JSON ({error}).") from error
        self._buffer = "".join(parts)

    def _contents(self, digest: Any) -> Iterator[bytes]:
        """Read the content of the file in chunks, decompressed if it is gzip."""
        chunks = storage.read_chunks(self._uri)
        first = next(chunks, b"")
        for magic, form in _ARCHIVES.items():
            if first.startswith(magic):
                raise DataError(f"{self._uri}: this is a {form} file: unpack it and give the JSON in it.")
        gzip = zlib.decompressobj(wbits=31) if first.startswith(_GZIP) else None
        for chunk in chain([first], chunks):
            if digest is not None:
                digest.update(chunk)
            if gzip is None:
                yield chunk
                continue
            try:
                while chunk:
                    # In parts, since a few compressed bytes can expand to very many.
                    yield gzip.decompress(chunk, _PART)
                    chunk = gzip.unconsumed_tail or gzip.unused_data
                    if gzip.eof and chunk:  # another gzip member follows
                        gzip = zlib.decompressobj(wbits=31)
            except zlib.error as error:
                raise DataError(f"{self._uri}: the gzip file is damaged ({error}): copy it again.") from error
        if gzip is not None and not gzip.eof:
            raise DataError(f"{self._uri}: the gzip file is truncated: copy it again.")
