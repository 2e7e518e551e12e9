"""Parse the structure of an image file without decoding it: estimated decoding time and EXIF orientation.

A file of a few kilobytes can take minutes to decode, and neither its file size nor its pixel count shows it. A
progressive JPEG may pass over its pixels 100,000 times, and metadata may expand a thousandfold or be read a million
times. So this module walks through the parts of a file, estimates the work, and removes the parts that do not affect
the pixels: only image data reaches a decoder.
"""

import math
import re
import struct
from dataclasses import dataclass
from typing import Literal

MAX_PARTS = 100_000
"""Maximum parts of a file (JPEG segments, PNG chunks, …): parsing so many takes a tenth of a second. Photographs have
under 100; a PNG of 100 MB written in chunks of 8 KiB has 12,800."""

# JPEG: a marker is 0xFF and a code; 0xFF00 and the restart markers 0xFFD0..D7 are part of a scan's data.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SOI, _EOI, _SOS, _COM = 0xD8, 0xD9, 0xDA, 0xFE

_PNG_PIXELS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))

# TIFF: tags that affect the pixels (TIFF 6.0 and the technical notes on JPEG and tiles).
_TIFF_PIXELS = frozenset(
    (*range(254, 260), 262, 266, 273, *range(277, 285), 292, 293, 317, *range(320, 326), 332, 338, 339, 347)
    + (*range(512, 522), *range(529, 533))
)
_TIFF_SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class Container:
    """The structure of an image file."""

    data: bytes
    """The file without the parts that do not affect the pixels of its first frame."""
    orientation: int = 1
    """EXIF orientation, 1..8: see `detr.image_processing.decode.image_orientation`."""
    seconds: float = 0.0
    """Estimated decoding time beyond what follows from the number and kind of pixels; infinite for too many parts."""
    jpeg_passes: int = 0
    """Scans of each strip of JPEG data in a TIFF file."""
    detail: str = ""
    """The cause of `seconds`, for messages: "450 scans"."""


def read_container(data: bytes) -> Container:
    """Parse the structure of an encoded image.

    Tolerates damage: for a damaged or unknown file it returns what could be parsed, and leaves it to the decoder to
    reject the file.
    """
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return _gif(data)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff(data)
    return Container(data)


def _too_many_parts(data: bytes) -> Container:
    return Container(data, seconds=math.inf, detail=f"more than {MAX_PARTS:,} parts")


# --- JPEG


def _jpeg(data: bytes) -> Container:
    orientation, drop = 1, []
    frame: _Frame | None = None
    seconds, scans, position = 0.0, 0, 2
    for _ in range(MAX_PARTS):
        match = _MARKER.search(data, position)
        if match is None:
            break
        code, position = data[match.end() - 1], match.end()
        if code == _EOI:  # what follows is a second image (a preview, a depth map) or not an image
            drop.append((position, len(data)))
            break
        if code in (0x01, _SOI):
            continue
        end = position + max(int.from_bytes(data[position : position + 2], "big"), 2)
        body = data[position + 2 : end]
        if code == _SOS:
            scans += 1
            seconds += frame.scan_s(body) if frame else 0.0
        elif code in _SOF:
            frame = _Frame.read(code, body)
        elif code == _COM or (0xE0 <= code <= 0xEF and not body.startswith((b"JFIF\0", b"Adobe"))):
            if code == 0xE1 and body.startswith(b"Exif\0\0") and orientation == 1:
                orientation = _exif_orientation(body[6:])
            if end <= len(data):
                drop.append((match.start(), end))
        position = end
    else:
        return _too_many_parts(data)
    kind = frame.kind if frame else ""
    seconds += (frame.pixels if frame else 0) * _PIXEL_S + len(data) * _BYTE_S
    return Container(_without(data, drop), orientation, seconds, detail=f"{kind}{scans:,} scans")


@dataclass(frozen=True)
class _Frame:
    """The fields of a JPEG frame header that determine the cost of a scan."""

    code: int
    pixels: int
    blocks: dict[int, int]
    """Component id → number of its blocks of 8 x 8 coefficients."""

    @classmethod
    def read(cls, code: int, body: bytes) -> "_Frame":
        height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
        components = [body[i : i + 3] for i in range(6, 6 + 3 * (body[5] if len(body) > 5 else 0), 3)]
        sampling = {part[0]: (part[1] >> 4 or 1, part[1] & 15 or 1) for part in components if len(part) == 3}
        across = max((h for h, _ in sampling.values()), default=1)
        down = max((v for _, v in sampling.values()), default=1)
        return cls(
            code,
            height * width,
            {
                key: math.ceil(width * h / across / 8) * math.ceil(height * v / down / 8)
                for key, (h, v) in sampling.items()
            },
        )

    @property
    def kind(self) -> str:
        arithmetic = "arithmetic-coded " if self.code > 0xC8 else ""
        return arithmetic + ("progressive, " if self.code in (0xC2, 0xCA) else "")

    def scan_s(self, header: bytes) -> float:
        """Estimate the seconds of a scan beyond the cost of its bytes."""
        count = header[0] if header else 0
        blocks = sum(self.blocks.get(key, 0) for key in header[1 : 1 + 2 * count : 2])
        first, last, approximation = (*header[1 + 2 * count : 4 + 2 * count], 0, 0, 0)[:3]
        coefficients = last - first + 1 if approximation >> 4 else 1  # a refinement scan visits each of them
        # Upper bound for arithmetic coding, where the number of decisions is not bounded by the number of bytes.
        arithmetic = 6 if self.code > 0xC8 else 1
        return _SCAN_S + blocks * (_BLOCK_S + _COEFFICIENT_S * max(coefficients, 1)) * arithmetic


# Measured with libjpeg-turbo 3.2, on a core that decodes 100 megapixels of baseline JPEG per second.
_PIXEL_S = 8e-9
_BYTE_S = 10e-9
_SCAN_S = 5e-6
_BLOCK_S = 50e-9
_COEFFICIENT_S = 2e-9


# --- PNG


def _png(data: bytes) -> Container:
    orientation, drop, position = 1, [], 8
    chunks = compressed = 0
    for _ in range(MAX_PARTS):
        length, name = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        end = position + 12 + length
        if len(name) < 4 or end > len(data):
            break
        if name == b"eXIf" and orientation == 1:
            orientation = _exif_orientation(data[position + 8 : end - 4])
        if name == b"IDAT":
            chunks, compressed = chunks + 1, compressed + length
        if name not in _PNG_PIXELS:
            drop.append((position, end))
        position = end
        if name == b"IEND":
            drop.append((position, len(data)))
            break
    else:
        return _too_many_parts(data)
    header = data[16:29] if data[12:16] == b"IHDR" else b""
    width, height, depth, kind, _, _, interlace = struct.unpack(">IIBBBBB", header.ljust(13, b"\0"))
    pixels, channels = width * height, _PNG_CHANNELS.get(kind, 1)
    raw = pixels * channels * depth / 8
    seconds = raw * _RAW_BYTE_S + (pixels * _INTERLACED_S if interlace else 0.0) + chunks * _CHUNK_S
    seconds += min(compressed, 2 * raw + 1000) * _DEFLATED_S  # data after the last pixel is not read
    detail = f"{'interlaced, ' if interlace else ''}{channels} x {depth} bits, {chunks:,} data chunks"
    return Container(_without(data, drop), orientation, seconds, detail=detail)


_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Measured with Pillow 13 and zlib 1.2.13.
_RAW_BYTE_S = 2e-9
_INTERLACED_S = 3e-9
_DEFLATED_S = 17e-9
_CHUNK_S = 3e-6


# --- WebP


def _webp(data: bytes) -> Container:
    orientation, first_s, position = 1, 0.0, 12
    for _ in range(MAX_PARTS):
        name, length = (
            data[position : position + 4],
            int.from_bytes(data[position + 4 : position + 8], "little"),
        )
        if len(name) < 4:
            break
        if name == b"EXIF" and orientation == 1:
            body = data[position + 8 : position + 8 + length]
            orientation = _exif_orientation(body[6:] if body.startswith(b"Exif\0\0") else body)
        if name in (b"VP8 ", b"VP8L") and not first_s:  # the first frame's pixels
            first_s = min(length, len(data)) * (5e-9 if name == b"VP8L" else 20e-9)
        position += (
            24 if name == b"ANMF" else 8 + length + length % 2
        )  # descend into an animation frame: its chunks follow its header
    else:
        return _too_many_parts(data)
    return Container(data, orientation, first_s)


# --- GIF


def _gif(data: bytes) -> Container:
    flags = data[10] if len(data) > 10 else 0
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    for _ in range(MAX_PARTS):
        if data[position : position + 1] != b"!":  # no extension: the first frame, or damage
            return Container(data)
        position += 2
        while data[position : position + 1] not in (b"\0", b""):
            position += 1 + data[position]
        position += 1
    return _too_many_parts(data)


# --- TIFF, also the format of EXIF data


def _tiff(data: bytes) -> Container:
    """Reduce the first directory to the tags that affect the pixels, and remove the link to the next directory.

    Otherwise Pillow would follow all directories, of which 20 MB can hold a million, copy the bytes that each tag
    claims, and apply the orientation by itself.
    """
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    big = data[2:4] in (b"+\0", b"\0+")
    count_bytes, entry_bytes, offset_bytes = (8, 20, 8) if big else (2, 12, 4)
    start = int.from_bytes(data[8:16] if big else data[4:8], order)
    first = start + count_bytes
    count = int.from_bytes(data[start:first], order)
    if not 0 < count <= 65535 or first + count * entry_bytes + offset_bytes > len(data):
        return Container(data)
    entries, claimed, values, strips = [], 0, 0, 1
    for position in range(first, first + count * entry_bytes, entry_bytes):
        entry = data[position : position + entry_bytes]
        if int.from_bytes(entry[:2], order) in _TIFF_PIXELS:
            number = int.from_bytes(entry[4 : 4 + offset_bytes], order)
            entries.append(entry)
            values += number
            if int.from_bytes(entry[:2], order) in (273, 324):  # offsets of strips or tiles
                strips = max(number, 1)
            claimed += number * _TIFF_SIZES.get(int.from_bytes(entry[2:4], order), 1)
    if claimed > len(data):
        return Container(data, seconds=math.inf, detail="tags that claim more bytes than the file has")
    pixels_only = bytearray(data)
    pixels_only[start:first] = len(entries).to_bytes(count_bytes, order)
    directory = b"".join([*entries, bytes(offset_bytes)])  # offset 0: no next directory
    pixels_only[first : first + len(directory)] = directory
    orientation = 1 if big else _exif_orientation(data)
    # JPEG data: libtiff stops after 100 scans of a strip.
    passes = min(math.ceil(data.count(b"\xff\xda") / strips), 100)
    return Container(bytes(pixels_only), orientation, values * _TIFF_VALUE_S, jpeg_passes=passes)


_TIFF_VALUE_S = 2e-6


def _exif_orientation(tiff: bytes) -> int:
    """Return the orientation in EXIF data (the first directory of a TIFF file); 1 if absent or invalid."""
    if tiff[:4] not in (b"II*\0", b"MM\0*"):
        return 1
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"
    start = int.from_bytes(tiff[4:8], order)
    count = int.from_bytes(tiff[start : start + 2], order)
    for entry in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        if int.from_bytes(tiff[entry : entry + 2], order) == _ORIENTATION_TAG:
            value = int.from_bytes(tiff[entry + 8 : entry + 10], order)
            is_short = int.from_bytes(tiff[entry + 2 : entry + 4], order) == 3
            return value if is_short and 1 <= value <= 8 else 1
    return 1


def _without(data: bytes, ranges: list[tuple[int, int]]) -> bytes:
    """Return the data without the ranges [start, end), which are in ascending order."""
    if not ranges:
        return data
    pieces, position = [], 0
    for start, end in ranges:
        pieces.append(data[position:start])
        position = end
    return b"".join([*pieces, data[position:]])
