"""Encoded images are decoded into RGB pixels; other bytes are rejected with a reason."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from detr.image_processing import decode
from detr.image_processing.decode import (
    ImageError,
    convert_to_rgb,
    decode_image,
    image_orientation,
    image_size,
)

simplejpeg = pytest.importorskip("simplejpeg")
DATA = Path(__file__).parents[3].parent / "shared" / "data"


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def random_pixels(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def interleaved(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 37), (24, 17)])
def test_lossless_rgb_is_decoded_exactly(format, height, width):
    pixels = random_pixels(0, height, width)
    image = decode_image(encode(Image.fromarray(pixels), format))
    assert image.dtype == torch.uint8
    assert image.shape == (3, height, width)
    assert np.array_equal(interleaved(image), pixels)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_decoded_images_are_interleaved_in_memory(format):
    image = decode_image(encode(Image.fromarray(random_pixels(0, 9, 7)), format))
    assert image.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr"])
@pytest.mark.parametrize(
    "options", [{"quality": 75}, {"quality": 95, "progressive": True, "subsampling": 0}, {"keep_rgb": True}]
)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 333), (64, 48)])
def test_jpegs_decode_to_the_same_pixels_as_with_pillow(mode, options, height, width, monkeypatch):
    image = Image.fromarray(random_pixels(1, height, width)).convert(mode)
    data = encode(image, "JPEG", **options)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    for decoder in (None, simplejpeg):
        monkeypatch.setattr(decode, "simplejpeg", decoder)
        assert np.array_equal(interleaved(decode_image(data)), expected)


def test_real_jpegs_decode_to_the_same_pixels_as_with_pillow():
    files = sorted((DATA / "coco128").glob("*2017/*.jpg"))[:20]
    if not files:
        pytest.skip(f"no images under {DATA}")
    for file in files:
        data = file.read_bytes()
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(interleaved(decode_image(data)), expected), file
        assert image_size(data) == expected.shape[:2]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("transparency", [None, 3])
def test_conversion_by_strips_equals_conversion_of_the_whole_image(mode, transparency, monkeypatch):
    generator = np.random.default_rng(0)
    rgba = Image.fromarray(generator.integers(0, 256, (23, 17, 4), np.uint8), "RGBA")
    if mode == "I;16":
        image = Image.fromarray(generator.integers(0, 65536, (23, 17), np.uint16))
    else:
        image = rgba.quantize(50) if mode == "P" else rgba.convert(mode)
    if transparency is not None and mode in ("L", "P"):
        image.info["transparency"] = transparency
    file = io.BytesIO()
    image.save(file, "TIFF" if mode == "CMYK" else "PNG")
    expected = np.array(convert_to_rgb(Image.open(io.BytesIO(file.getvalue()))))
    monkeypatch.setattr(decode, "_STRIP_PIXELS", 17 * 5)
    converted, convert = [], decode.convert_to_rgb
    monkeypatch.setattr(decode, "convert_to_rgb", lambda part: converted.append(part.size) or convert(part))
    assert np.array_equal(decode_image(file.getvalue()).permute(1, 2, 0).numpy(), expected)
    assert converted == ([] if mode == "I;16" else [*[(17, 5)] * 4, (17, 3)])


def test_gray_is_repeated_in_all_channels():
    gray = random_pixels(2, 6, 8, 1)[..., 0]
    for image in (Image.fromarray(gray), Image.fromarray(gray > 127)):
        values = np.array(image.convert("L"))
        assert np.array_equal(interleaved(decode_image(encode(image))), np.dstack([values] * 3))


def test_transparency_is_composited_on_white():
    pixels = random_pixels(3, 16, 16, 4)
    image = interleaved(decode_image(encode(Image.fromarray(pixels))))
    alpha = pixels[..., 3:] / 255
    expected = alpha * pixels[..., :3] + (1 - alpha) * 255
    assert np.abs(image - expected).max() <= 1
    assert (image[pixels[..., 3] == 0] == 255).all()


def test_transparent_gray_and_palette_images_are_composited_too():
    gray_alpha = Image.new("LA", (4, 4), (10, 0))
    assert (decode_image(encode(gray_alpha)) == 255).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert decode_image(encode(palette))[:, 0, 0].tolist() == [9, 8, 7]
    assert (decode_image(encode(palette, transparency=1)) == 255).all()


def test_16_bit_gray_keeps_its_range():
    values = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    for format in ("PNG", "TIFF"):
        image = interleaved(decode_image(encode(Image.fromarray(values), format)))
        assert np.array_equal(image, np.dstack([values >> 8] * 3))


def test_pixels_without_a_defined_range_are_rejected():
    with pytest.raises(ImageError, match="floating-point"):
        decode_image(encode(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF"))
    with pytest.raises(ImageError, match=r"32-bit pixels from -5 to 70000"):
        convert_to_rgb(Image.fromarray(np.array([[-5, 70000]], np.int32)))


def test_an_rgb_image_is_not_copied():
    image = Image.new("RGB", (3, 3))
    assert convert_to_rgb(image) is image


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", range(9))
def test_exif_orientation_is_applied_only_on_request(format, value, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = value
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    pixels = Image.fromarray(random_pixels(5, 10, 20))
    data = encode(pixels, format, exif=exif, **options)
    stored = Image.open(io.BytesIO(encode(pixels, format, **options))).convert("RGB")
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert image_orientation(data) == (value or 1)
    for decoder in (None, simplejpeg):
        monkeypatch.setattr(decode, "simplejpeg", decoder)
        for orientation, expected in (("ignore", np.array(stored)), ("apply", np.array(upright))):
            image = decode_image(data, orientation=orientation)
            assert np.array_equal(interleaved(image), expected)
            assert image.permute(1, 2, 0).is_contiguous()
            assert image_size(data, orientation=orientation) == expected.shape[:2]
    assert np.array_equal(interleaved(decode_image(data)), np.array(stored))


def test_an_unknown_orientation_is_rejected():
    with pytest.raises(ValueError, match=r"orientation is 'upright': expected one of \('apply', 'ignore'\)"):
        decode_image(encode(Image.new("RGB", (3, 3))), orientation="upright")


def test_the_first_frame_of_an_animation_is_decoded():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", bytes(1000)])
def test_bytes_that_are_not_an_image_are_rejected(data):
    with pytest.raises(ImageError, match=r"not an image|header"):
        decode_image(data)
    with pytest.raises(ImageError, match=r"not an image|header"):
        image_size(data)


def test_a_damaged_jpeg_decodes_as_with_pillow():
    rng = np.random.default_rng(8)
    clean = encode(Image.fromarray(random_pixels(8, 60, 80)), "JPEG")
    readable = 0
    for _ in range(60):
        data = bytearray(clean)
        data[rng.integers(700, len(data))] = rng.integers(256)
        try:
            expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        except OSError:
            continue
        assert np.array_equal(interleaved(decode_image(bytes(data))), expected)
        readable += 1
    assert readable > 20


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_truncated_images_are_rejected(format):
    data = encode(Image.fromarray(random_pixels(6, 40, 30)), format)
    for length in np.random.default_rng(6).integers(0, len(data) - 20, 25):
        with pytest.raises(ImageError):
            decode_image(data[:length])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns about EXIF and TIFF tags
def test_damaged_bytes_are_decoded_or_raise_an_image_error(format):
    rng = np.random.default_rng(7)
    clean = encode(Image.fromarray(random_pixels(7, 20, 30)), format)
    rejected = 0
    for _ in range(150):
        data = bytearray(clean)
        for position in rng.integers(0, len(data), 4):
            data[position] = rng.integers(256)
        try:
            image = decode_image(bytes(data), max_pixels=10_000_000)
        except ImageError:
            rejected += 1
        else:
            assert image.dtype == torch.uint8
            assert image.shape[0] == 3
    assert rejected < 150 or format == "PNG"  # the chunks of a PNG have checksums


@pytest.mark.parametrize("format", ["EPS", "ICO", "PDF", "JPEG2000"])
def test_unsupported_formats_are_not_opened(format):
    with pytest.raises(ImageError, match=r"not an image that can be read \(JPEG"):
        decode_image(encode(Image.new("RGB", (32, 32)), format))


def test_the_pixel_limit_is_checked_before_decoding():
    data = encode(Image.new("RGB", (100, 100)))
    assert decode_image(data, max_pixels=10_000).shape == (3, 100, 100)
    header_only = data[:100]
    with pytest.raises(ImageError, match="100 x 100 = 10,000 pixels, more than the limit of 9,999"):
        decode_image(header_only, max_pixels=9_999)


def test_a_header_that_claims_a_gigantic_image_is_rejected():
    data = bytearray(encode(Image.new("L", (8, 8)), "BMP"))
    data[18:26] = (50_000).to_bytes(4, "little") * 2
    with pytest.raises(ImageError):
        decode_image(bytes(data))
