"""Images with an EXIF orientation."""

import io

from PIL import Image, ImageDraw

ROTATED = 6
"""EXIF orientation: rotate the stored image by 90 degrees clockwise."""


def oriented(form: str, orientation: int = ROTATED, size: tuple[int, int] = (180, 120)) -> bytes:
    """Return an encoded image of (width, height) with a disc in the upper left corner of the stored pixels."""
    image = Image.new("RGB", size, (200, 200, 200))
    ImageDraw.Draw(image).ellipse((10, 10, size[0] // 3, size[0] // 3), fill=(220, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, form, exif=exif)
    return file.getvalue()
