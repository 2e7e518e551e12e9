"""Images that cost more to decode than their bytes and pixels suggest."""

import io
import random
import struct
import zlib

from PIL import Image


def progressive_jpeg(height: int, width: int, scans: int) -> bytes:
    """A valid gray progressive JPEG. All scans but two refine coefficients that are all zero."""
    blocks = -(-height // 8) * -(-width // 8)
    # Huffman tables. DC: code "0" is no difference. AC: code "0" ends 2^14 bands or more, five bits end shorter runs.
    runs = [0xE0, *(r << 4 for r in range(14))]
    parts = [
        b"\xff\xd8",
        _segment(0xDB, b"\0" + bytes([1]) * 64),
        _segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + bytes([1, 0x11, 0])),
        _segment(0xC4, bytes([0x00, 1, *[0] * 15, 0])),
        _segment(0xC4, bytes([0x10, 1, 0, 0, 0, 14, *[0] * 11, *runs])),
        _segment(0xDA, bytes([1, 1, 0x00, 0, 0, 0x00])) + _bits("0" * blocks),
    ]
    end_of_bands, left = [], blocks
    while left:
        size = min(13, left.bit_length() - 1)
        run = min(left, 2 ** (size + 1) - 1)
        end_of_bands.append(f"{16 + size:05b}" + (f"{run - 2**size:0{size}b}" if size else ""))
        left -= run
    data = _bits("".join(end_of_bands))
    for scan in range(scans - 1):
        high, low = (0, 13) if scan == 0 else (max(14 - scan, 1), max(13 - scan, 0))
        parts.append(_segment(0xDA, bytes([1, 1, 0x00, 1, 63, high << 4 | low])) + data)
    return b"".join([*parts, b"\xff\xd9"])


def palette_png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.new("P", (width, height)).save(file, "PNG")
    return file.getvalue()


def interlaced_png(height: int, width: int) -> bytes:
    """An interlaced PNG with the pixels of `palette_png`. Pillow cannot write such files."""
    passes = [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]
    packer = zlib.compressobj(1)
    rows = []
    for x, y, dx, dy in passes:
        across, down = -(-(width - x) // dx), -(-(height - y) // dy)
        if across > 0:
            rows += [packer.compress(bytes(1 + across)) for _ in range(down)]
    data = b"".join([*rows, packer.flush()])
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)),
        (b"IDAT", data),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def animated_webp(height: int, width: int, frames: int) -> bytes:
    file = io.BytesIO()
    images = [
        Image.new("RGB", (width, height), (random.Random(i).randrange(256), 0, 0)) for i in range(frames)
    ]
    images[0].save(file, "WEBP", save_all=True, append_images=images[1:], lossless=True)
    return file.getvalue()


def _segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def _bits(bits: str) -> bytes:
    padded = bits + "1" * (-len(bits) % 8)
    return int(padded, 2).to_bytes(len(padded) // 8, "big").replace(b"\xff", b"\xff\0")
