"""A JSON object read member by member, arrays element by element: a file need not fit in memory."""

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
# What the end of the text may cut without an error before it: a number, a literal, an escape.
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
_KINDS = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}


class Element(NamedTuple):
    """An element of an array that is a member of the object, or a member that is no array or an empty one.

    key: of the member.
    position: in the array; None for a member.
    value: decoded.
    text: as it stands in the file.
    """

    key: str
    position: int | None
    value: Any
    text: str


def read_elements(address: str, digest: Any = None) -> Iterator[Element]:
    """The elements of a JSON object's arrays, and its other members, in the order of the file.

    Args:
        address: of the file.
        digest: a hash object of hashlib, which is given the bytes of the file.

    Raises:
        StorageError: it cannot be read.
        DataError: it is not JSON (the message has the line), no object, or has a key twice.
    """
    text = _Text(address, digest)
    if (first := text.peek()) != "{":
        kind_of_text = "list" if first == "[" else kind(text.value()[0])
        raise DataError(f"{address}: not COCO: the file holds a {kind_of_text}; expected an object.")
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
                raise DataError(f"{address}: the key {key!r} is there twice.")
            keys.add(key)
            text.take(":")
            yield from _member(key, text)
            if text.take(",}") == "}":
                break
    if text.peek():
        text.fail("Extra data")


def kind(value: Any) -> str:
    """What a decoded JSON value is, in words."""
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
    """The text of a file, of which only the part that is being decoded is in memory."""

    def __init__(self, address: str, digest: Any) -> None:
        self._address = address
        self._chunks = self._contents(digest)
        self._decoder: codecs.IncrementalDecoder | None = None
        self._buffer = ""
        self._ended = False
        self._before = (0, 0, 0)
        """Characters, lines and characters of the last line that are in the buffer no more."""
        self.at = 0

    def peek(self) -> str:
        """The next character that is not white space, where `at` then is; empty at the end."""
        while True:
            space = _SPACE.match(self._buffer, self.at)
            self.at = space.end() if space else self.at
            if self.at < len(self._buffer) or self._ended:
                return self._buffer[self.at : self.at + 1]
            self._read()

    def take(self, expected: str) -> str:
        """The next character, one of the expected."""
        character = self.peek()
        if not character or character not in expected:
            self.fail(f"Expecting {expected[0]!r} delimiter")
        self.at += 1
        return character

    def value(self) -> tuple[Any, str]:
        """The next value, and its text."""
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
        """Raise what is wrong at a place of the buffer; None: where `at` is."""
        at = self.at if at is None else at
        characters, lines, column = self._position(at)
        raise DataError(
            f"{self._address}: not JSON ({reason}: line {lines + 1} column {column + 1} (char {characters}))."
        )

    def _position(self, at: int) -> tuple[int, int, int]:
        characters, lines, column = self._before
        newline = self._buffer.rfind("\n", 0, at)
        column = column + at if newline < 0 else at - newline - 1
        return characters + at, lines + self._buffer.count("\n", 0, at), column

    def _read(self) -> None:
        """Drop what was decoded and add at least as much as is left: a long value is not tried too often."""
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
            raise DataError(f"{self._address}: not JSON ({error}).") from error
        self._buffer = "".join(parts)

    def _contents(self, digest: Any) -> Iterator[bytes]:
        """The file's content, gzip undone."""
        chunks = storage.read_chunks(self._address)
        first = next(chunks, b"")
        for magic, form in _ARCHIVES.items():
            if first.startswith(magic):
                raise DataError(
                    f"{self._address}: a {form} file: unpack it, and give the JSON that is in it."
                )
        gzip = zlib.decompressobj(wbits=31) if first.startswith(_GZIP) else None
        for chunk in chain([first], chunks):
            if digest is not None:
                digest.update(chunk)
            if gzip is None:
                yield chunk
                continue
            try:
                while chunk:
                    # In parts: little in a file can be much in memory.
                    yield gzip.decompress(chunk, _PART)
                    chunk = gzip.unconsumed_tail or gzip.unused_data
                    if gzip.eof and chunk:
                        gzip = zlib.decompressobj(wbits=31)
            except zlib.error as error:
                raise DataError(f"{self._address}: not gzip that can be read ({error}).") from error
        if gzip is not None and not gzip.eof:
            raise DataError(f"{self._address}: the gzip file is cut short: copy it again.")
