"""COCO's panoptic PNGs, whose colours are the ids of segments: id = R + 256 G + 256 * 256 B."""

from io import BytesIO

import numpy as np
from PIL import Image


def read_panoptic_png(png: bytes) -> np.ndarray:
    """Ids int32 [height, width] of a panoptic PNG; 0 is void.

    Raises:
        OSError, SyntaxError, ValueError: what Pillow raises for bytes that are no image, and damaged ones.
    """
    with Image.open(BytesIO(png)) as image:
        colors = image if image.mode == "RGB" else image.convert("RGB")
        # Pillow holds the three colours of a pixel in four bytes, which as they are make one number.
        pixels = np.frombuffer(colors.tobytes("raw", "RGBX"), "<i4")
        return (pixels & 0xFFFFFF).reshape(image.height, image.width)


def write_panoptic_png(ids: np.ndarray) -> bytes:
    """A panoptic PNG of ids int [height, width], 0 being void."""
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(colors).save(file, "PNG")
    return file.getvalue()
