"""Images with an EXIF orientation."""

import io

from PIL import Image, ImageDraw

ROTATED = 6
"""EXIF: what is stored has to be turned by 90 degrees clockwise."""


def oriented(form: str, orientation: int = ROTATED, size: tuple[int, int] = (180, 120)) -> bytes:
    """An encoded image of (width, height) with a disc in its upper left corner, as it is stored."""
    image = Image.new("RGB", size, (200, 200, 200))
    ImageDraw.Draw(image).ellipse((10, 10, size[0] // 3, size[0] // 3), fill=(220, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, form, exif=exif)
    return file.getvalue()
