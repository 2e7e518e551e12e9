"""The decoding time is estimated from the structure of a file, and parts that do not affect pixels are removed."""

import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from detr.image_processing import decode
from detr.image_processing.container import MAX_PARTS, read_container
from detr.image_processing.decode import (
    DEFAULT_MAX_COST,
    DEFAULT_MAX_PIXELS,
    WEB_FORMATS,
    ImageCostError,
    ImageError,
    check_cost,
    decode_cost,
    decode_image,
    image_size,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def segment(code: int, body: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", len(body) + 2) + body


def jpeg_of_scans(height: int, width: int, scans: int, frame: int = 0xC2) -> bytes:
    """Build a gray JPEG: a scan of DC coefficients, one of AC coefficients, and refinement scans."""
    parts = [b"\xff\xd8", segment(0xDB, b"\0" + bytes([1] * 64))]
    parts.append(segment(frame, struct.pack(">BHHB", 8, height, width, 1) + bytes([1, 0x11, 0])))
    parts.append(segment(0xC4, b"\0" + bytes([1] + [0] * 15) + b"\0"))
    parts.append(segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\0"))
    for number in range(scans):
        bits = max(13 - number, 0) << 4 | max(12 - number, 0) if number > 1 else 0x0D if number else 0
        parts.append(segment(0xDA, bytes([1, 1, 0, *((1, 63) if number else (0, 0)), bits])) + b"\0\0")
    return b"".join([*parts, b"\xff\xd9"])


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@pytest.mark.parametrize("decoder", ["simplejpeg", "Pillow"])
@pytest.mark.parametrize(("scans", "frame"), [(450, 0xC2), (120_000, 0xC2), (100, 0xCA)])
def test_a_jpeg_with_too_many_scans_is_rejected_before_decoding(scans, frame, decoder, monkeypatch):
    if decoder == "Pillow":
        monkeypatch.setattr(decode, "simplejpeg", None)
    data = jpeg_of_scans(9450, 9468, scans, frame)
    start = time.process_time()
    with pytest.raises(ImageCostError, match=f"{scans:,} scans|more than {MAX_PARTS:,} parts"):
        decode_image(data)
    with pytest.raises(ImageCostError):
        check_cost(data)
    assert time.process_time() - start < 5


def test_normal_photos_of_maximum_size_are_within_the_cost_limit():
    side = int(DEFAULT_MAX_PIXELS**0.5)
    for scans in (1, 10, 20):
        assert check_cost(jpeg_of_scans(side, side, scans)) < DEFAULT_MAX_COST


def test_the_cost_grows_with_scans_and_pixels():
    costs = [decode_cost(jpeg_of_scans(1000, 1000, scans)) for scans in (3, 30, 300, 3000)]
    assert costs[3] / costs[2] == pytest.approx(10, rel=0.2)
    assert costs == sorted(costs)
    assert decode_cost(jpeg_of_scans(2000, 2000, 30)) / costs[1] == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_the_cost_limit_applies_to_every_format(format):
    data = encode(Image.fromarray(PIXELS), format)
    cost = decode_cost(data)
    assert 0 < cost < 0.01
    assert check_cost(data) == cost
    decode_image(data, max_cost=cost)
    with pytest.raises(ImageCostError, match=rf"{format} image would take .*30 x 40 pixels.*max_cost"):
        decode_image(data, max_cost=cost * 0.99)


def test_the_cost_of_an_animation_is_that_of_its_first_frame():
    frames = [Image.fromarray(PIXELS + np.uint8(n)) for n in range(40)]
    for format in ("GIF", "WEBP", "PNG"):
        one = decode_cost(encode(frames[0], format))
        many = decode_cost(encode(frames[0], format, save_all=True, append_images=frames[1:]))
        assert many < 3 * one


def test_interlacing_and_depth_cost_more():
    def png(depth: int, kind: int, interlaced: int) -> bytes:
        header = struct.pack(">IIBBBBB", 3000, 3000, depth, kind, 0, 0, interlaced)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)

    assert decode_cost(png(8, 2, 1)) > decode_cost(png(8, 2, 0)) > decode_cost(png(8, 0, 0))
    assert decode_cost(png(16, 6, 0)) > decode_cost(png(8, 6, 0))


def test_metadata_never_reaches_the_decoder():
    image, exif = Image.fromarray(PIXELS), Image.Exif()
    exif[0x010E] = "x" * 1000
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "y" * 1000, zip=True)
    plain = encode(image, "PNG")
    noisy = encode(image, "PNG", exif=exif, pnginfo=text, icc_profile=b"z" * 500)
    assert read_container(noisy + b"trailing").data == plain
    plain = encode(image, "JPEG", quality=90)
    noisy = encode(image, "JPEG", quality=90, exif=exif, comment=b"c", icc_profile=b"z" * 500)
    assert read_container(noisy + plain).data == plain


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_that_claims_more_bytes_than_the_file_has_allocates_no_memory(order):
    """Pillow would copy the bytes that each of the 5,000 tags claims."""
    entries = b"".join(struct.pack(order + "HHII", tag, 7, 60_000, 8) for tag in range(5000))
    tiff = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8)
    tiff += struct.pack(order + "H", 5000) + entries + bytes(4)
    jpeg = encode(Image.fromarray(PIXELS), "JPEG")
    jpeg = jpeg[:2] + segment(0xE1, b"Exif\0\0" + tiff) + jpeg[2:]
    tracemalloc.start()
    image_size(jpeg)
    decode_image(jpeg)
    with pytest.raises(ImageError):
        decode_image(tiff)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def test_tiff_tags_that_claim_more_bytes_than_the_file_has_are_rejected():
    data = bytearray(encode(Image.fromarray(PIXELS), "TIFF"))
    start = int.from_bytes(data[4:8], "little")
    for entry in range(start + 2, start + 2 + 12 * data[start], 12):
        if data[entry : entry + 2] == struct.pack("<H", 279):
            data[entry + 4 : entry + 8] = struct.pack("<I", 10_000_000)
    for call in (image_size, decode_image, decode_cost):
        with pytest.raises(ImageCostError, match="tags that claim more bytes than the file has"):
            call(bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8" + segment(0xFE, b"") * (MAX_PARTS + 1),
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"tEXt", b"") * (MAX_PARTS + 1),
        b"RIFF\0\0\0\0WEBP" + b"XXXX\0\0\0\0" * (MAX_PARTS + 1),
        b"GIF89a" + bytes(7) + b"!\xfe\0" * (MAX_PARTS + 1),
    ],
    ids=WEB_FORMATS + ("GIF",),
)
def test_a_file_with_too_many_parts_is_rejected(data):
    for call in (image_size, decode_image, decode_cost):
        with pytest.raises(ImageCostError, match=f"more than {MAX_PARTS:,} parts"):
            call(data)


def test_accepted_formats_can_be_restricted():
    data = encode(Image.fromarray(PIXELS), "BMP")
    for call in (image_size, decode_image, decode_cost, check_cost):
        with pytest.raises(ImageError, match=r"not an image that can be read \(JPEG, PNG, WEBP\)"):
            call(data, formats=WEB_FORMATS)
    with pytest.raises(ImageError, match=r"\(PNG\)"):
        decode_image(encode(Image.fromarray(PIXELS), "JPEG"), formats=("PNG",))
