"""Draw detections on an image: boxes in the colour of their class, with readable labels that avoid each other."""

import colorsys
import zlib
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from detr.image_processing.decode import convert_to_rgb

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]

_GOLDEN_RATIO = 0.618033988749895


def draw_detections(
    image: Image.Image | torch.Tensor | np.ndarray,
    boxes_xyxy: Any,
    labels: Sequence[int | str] | Any,
    scores: Any = None,
    names: Mapping[int, str] | None = None,
    enlarge_below: int = 640,
) -> Image.Image:
    """Draw boxes and labels on a copy of an image.

    Args:
        image: a Pillow image, a uint8 tensor [3, height, width] or a uint8 array [height, width, 3].
        boxes_xyxy: float [n, 4], corners in pixels of the image, array, tensor or list. What lies outside of the
            image is cut off; boxes that are wholly outside or not finite are left out.
        labels: n classes, as indices or names; a class has the same colour in every image.
        scores: float [n] in 0..1, written after the name and deciding whose label gets the best place.
        names: class index to name (a model's `config.id2label`).
        enlarge_below: an image whose longer side is shorter than this is enlarged by a whole factor first, so that
            its labels can be read and do not cover it; 0 keeps the size.

    Returns:
        An RGB image, of the given size or enlarged.

    Raises:
        ValueError: the numbers of boxes, labels and scores differ.
    """
    canvas = _to_pil(image)
    boxes = _to_array(boxes_xyxy).reshape(-1, 4).astype(np.float64)
    classes = labels if isinstance(labels, list | tuple) else _to_array(labels).tolist()
    confidences = [None] * len(boxes) if scores is None else _to_array(scores).tolist()
    if not len(boxes) == len(classes) == len(confidences):
        raise ValueError(f"there are {len(boxes)} boxes, {len(classes)} labels and {len(confidences)} scores")

    factor = max(1, enlarge_below // max(canvas.size))
    canvas = canvas.resize((canvas.width * factor, canvas.height * factor), Image.Resampling.BICUBIC)
    boxes = boxes * factor
    extent = max(canvas.size)
    line = max(2, round(extent / 350))
    font: Any = ImageFont.load_default(size=min(48, max(13, round(extent / 50))))
    draw = ImageDraw.Draw(canvas)

    order = sorted(range(len(boxes)), key=lambda index: confidences[index] or 0)  # the best is drawn last
    visible = [
        (index, box) for index in order if (box := _visible_part(boxes[index], canvas.size)) is not None
    ]
    for index, box in visible:
        _draw_box(draw, box, class_color(classes[index]), line)
    placed: list[tuple[int, str, Box]] = []
    for index, box in reversed(visible):
        name = names.get(classes[index], str(classes[index])) if names else str(classes[index])
        score = confidences[index]
        text = _shorten(name if score is None else f"{name} {score:.2f}", font, canvas.width - 2 * line)
        ascent, descent = font.getmetrics()
        size = draw.textlength(text, font=font) + 2 * line, ascent + descent + line
        placed.append((index, text, _place_label(box, size, canvas.size, [place for _, _, place in placed])))
    for index, text, place in reversed(placed):
        color = class_color(classes[index])
        draw.rectangle(place, fill=color, outline=(0, 0, 0))
        draw.text((place[0] + line, place[1] + line / 2), text, fill=_text_color(color), font=font)
    return canvas


def class_color(label: int | str) -> Color:
    """The RGB colour of a class, by its index or name; neighbouring indices are far apart in hue."""
    index = zlib.crc32(label.encode()) if isinstance(label, str) else int(label)
    hue = index * _GOLDEN_RATIO % 1
    saturation, value = ((0.85, 0.95), (0.55, 1.0), (0.95, 0.75))[index // 8 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _draw_box(draw: ImageDraw.ImageDraw, box: Box, color: Color, width: int) -> None:
    """A frame in the class's colour between thin dark lines, seen on any background."""
    x0, y0, x1, y1 = box
    draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(0, 0, 0), width=width + 2)
    draw.rectangle(box, outline=color, width=width)


def _place_label(box: Box, label: tuple[float, float], image: tuple[int, int], taken: Sequence[Box]) -> Box:
    """The rectangle for a label of (width, height) at a box: above its left corner, or where least is covered."""
    (x0, y0, x1, y1), (width, height) = box, label
    columns = (x0, x1 - width, (x0 + x1 - width) / 2)
    rows = (y0 - height, y0, y1, y1 - height, (y0 + y1 - height) / 2)
    places = []
    for y, x in product(rows, columns):
        left, top = (
            max(0, min(start, room)) for start, room in ((x, image[0] - width), (y, image[1] - height))
        )
        places.append((left, top, left + width, top + height))
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))


def _shorten(text: str, font: Any, room: float) -> str:
    if font.getlength(text) <= room:
        return text
    while len(text) > 1 and font.getlength(text + "...") > room:
        text = text[:-1]
    return text + "..."


def _text_color(background: Color) -> Color:
    """Black or white, whichever contrasts more by WCAG's relative luminance (at least 4.5 : 1)."""
    red, green, blue = ((channel / 255) ** 2.2 for channel in background)
    return (0, 0, 0) if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else (255, 255, 255)


def _visible_part(box: np.ndarray, size: tuple[int, int]) -> Box | None:
    if not np.isfinite(box).all():
        return None
    x0, y0 = max(box[0], 0), max(box[1], 0)
    x1, y1 = min(box[2], size[0] - 1), min(box[3], size[1] - 1)
    return (float(x0), float(y0), float(x1), float(y1)) if x1 >= x0 and y1 >= y0 else None


def _overlap(a: Box, b: Box) -> float:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _to_pil(image: Image.Image | torch.Tensor | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return convert_to_rgb(image)
    pixels = image.permute(1, 2, 0).cpu().numpy() if isinstance(image, torch.Tensor) else image
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def _to_array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
