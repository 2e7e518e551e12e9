"""Read and write COCO's panoptic PNGs, whose colors are segment ids: id = R + 256 G + 256 * 256 B."""

import struct
import zlib

import numpy as np
from kornia_rs import io as kornia_io
from PIL import Image

from detr.image_processing.decode import DEFAULT_MAX_PIXELS, open_image


def read_panoptic_colors(png: bytes) -> np.ndarray:
    """Read the colors uint8 [height, width, 3] of a panoptic PNG; the values of a gray one, of 8 or 16 bits, are ids.

    Raises:
        ImageError: the bytes are not a PNG, damaged, or would take too long to decode. It is a ValueError.
    """
    # kornia-rs decodes the same pixels as Pillow, but faster (`make bench BENCH='--only quality'`). It decodes only the
    # pixel format that is requested, so the header is checked first.
    if len(png) > 26 and png[12:16] == b"IHDR":
        width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
        if (depth, kind) == (8, 2) and 0 < width * height <= DEFAULT_MAX_PIXELS:  # eight bits, RGB
            try:
                return np.asarray(kornia_io.decode_image_png_u8(png, (height, width), "rgb"))
            except (
                Exception
            ):  # kornia-rs has no error class of its own; Pillow names the reason, or reads the file
                pass
    image = open_image(png, formats=("PNG",))
    if image.mode in ("1", "L", "LA", "I") or image.mode.startswith("I;16"):
        ids = np.asarray(image.getchannel("L") if image.mode == "LA" else image).astype("<u4")
        return ids.view(np.uint8).reshape(*ids.shape, 4)[..., :3]
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def read_panoptic_png(png: bytes) -> np.ndarray:
    """Read the ids int32 [height, width] of a panoptic PNG; 0 is void. Errors: see `read_panoptic_colors`."""
    colors = read_panoptic_colors(png)
    # RGBX has four bytes per pixel, which are read as one little-endian integer: a third of the time of rgb_to_id.
    pixels = np.frombuffer(Image.fromarray(colors).tobytes("raw", "RGBX"), "<i4")
    return (pixels & 0xFFFFFF).reshape(colors.shape[:2])


def write_panoptic_png(ids: np.ndarray) -> bytes:
    """Encode ids int [height, width], 0 being void, as a panoptic PNG."""
    height, width = ids.shape
    colors = (
        np.ascontiguousarray(ids, "<u4").view(np.uint8).reshape(height, width, 4)[..., :3].reshape(height, -1)
    )
    # PNG's filter 2 (Up) stores each row as its difference from the row above: nearly all zeros. Pillow tries every
    # filter for each row, which is slower to write and to read (`make bench BENCH='--only png'`) and saves no bytes here.
    rows = np.empty((height, 1 + 3 * width), np.uint8)
    rows[:, 0] = 2
    rows[:1, 1:] = colors[:1]
    np.subtract(colors[1:], colors[:-1], out=rows[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # eight bits, RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
