"""Draw detections and segments on an image, in the color of their class, with labels that avoid each other."""

import colorsys
import zlib
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

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
        boxes_xyxy: float [n, 4], corners in pixels of the image; array, tensor or list. Boxes are clipped to the
            image; boxes that are completely outside or not finite are skipped.
        labels: n classes, as indices or names. A class has the same color in every image.
        scores: float [n] in 0..1, printed after the name. Labels of high scores are placed first.
        names: class index to name (a model's `config.id2label`).
        enlarge_below: an image whose longer side is shorter than this is enlarged by an integer factor first, so that
            its labels are readable and do not cover it. 0 keeps the size.

    Returns:
        An RGB image, of the original size or enlarged.

    Raises:
        ValueError: the numbers of boxes, labels and scores differ.
    """
    canvas = _to_pil(image)
    boxes = _to_array(boxes_xyxy).reshape(-1, 4).astype(np.float64)
    classes = labels if isinstance(labels, list | tuple) else _to_array(labels).tolist()
    confidences = [None] * len(boxes) if scores is None else _to_array(scores).tolist()
    if not len(boxes) == len(classes) == len(confidences):
        raise ValueError(f"there are {len(boxes)} boxes, {len(classes)} labels and {len(confidences)} scores")

    canvas, factor = _enlarge(canvas, enlarge_below)
    boxes = boxes * factor
    line, font = _line_and_font(canvas)
    draw = ImageDraw.Draw(canvas)

    # Ascending scores: the highest is drawn last, on top.
    order = sorted(range(len(boxes)), key=lambda index: confidences[index] or 0)
    visible = [
        (index, box) for index in order if (box := _visible_part(boxes[index], canvas.size)) is not None
    ]
    for index, box in visible:
        _draw_box(draw, box, class_color(classes[index]), line)
    placed: list[tuple[int, str, Box]] = []
    for index, box in reversed(visible):
        text, size = _label(classes[index], confidences[index], names, font, line, canvas.width)
        placed.append((index, text, _place_label(box, size, canvas.size, [place for _, _, place in placed])))
    for index, text, place in reversed(placed):
        _draw_label(draw, place, text, class_color(classes[index]), font, line)
    return canvas


def draw_segments(
    image: Image.Image | torch.Tensor | np.ndarray,
    segmentation: Any,
    segments_info: Sequence[Mapping[str, Any]],
    names: Mapping[int, str] | None = None,
    enlarge_below: int = 640,
    opacity: float = 0.5,
) -> Image.Image:
    """Draw a panoptic or instance segmentation, or masks, on a copy of an image.

    Every segment is tinted with the color of its class and has a dark outline, which separates neighbors of one class.
    Its label is placed where the segment is widest. A label that would overlap those of larger segments is omitted.

    Args:
        image: a Pillow image, a uint8 tensor [3, height, width] or a uint8 array [height, width, 3].
        segmentation: int [height, width], the segment id of each pixel, as `post_process_panoptic_segmentation`
            returns it. Pixels whose id is not in `segments_info` are not tinted. Or masks [n, height, width], one for
            each entry of `segments_info`, bool or positive on the segment; where masks overlap, the higher score is
            on top. Arrays, tensors or lists.
        segments_info: for each segment a dict with `id` (not for masks), `label_id` (or `category_id`, or `label`, a
            name) and optionally `score`, which is printed. Of fused segments, which share an id, the first entry is
            used.
        names: class index to name (a model's `config.id2label`).
        enlarge_below: as in `draw_detections`.
        opacity: of the tint, 0..1.

    Returns:
        An RGB image, of the original size or enlarged.

    Raises:
        ValueError: the size of the segmentation is not that of the image, the number of masks is not that of the
            segments, or a segment has no class.
    """
    canvas = _to_pil(image)
    indices, segments = _index_map(_to_array(segmentation), segments_info)
    if indices.shape != (canvas.height, canvas.width):
        raise ValueError(
            f"the segmentation is {indices.shape[0]} x {indices.shape[1]} pixels and the image {canvas.height} x "
            f"{canvas.width} (height x width): give target_sizes=[(height, width)] to the post-processing"
        )
    canvas, factor = _enlarge(canvas, enlarge_below)
    line, font = _line_and_font(canvas)
    indices = indices.repeat(factor, axis=0).repeat(factor, axis=1)
    classes = [_class_of(segment) for segment in segments]
    colors = np.array([(0, 0, 0), *map(class_color, classes)], np.float32)
    tint = np.array([0.0] + [opacity] * len(segments), np.float32)[indices][..., None]
    pixels = np.asarray(canvas, np.float32) * (1 - tint) + colors[indices] * tint
    canvas = Image.fromarray(
        np.where(_outlines(indices, line)[..., None], 0, pixels).round().astype(np.uint8)
    )
    draw = ImageDraw.Draw(canvas)
    placed: list[Box] = []
    areas = np.bincount(indices.ravel(), minlength=len(segments) + 1)[1:]
    for index in np.argsort(-areas, kind="stable").tolist():
        if not areas[index]:
            continue
        text, size = _label(classes[index], segments[index].get("score"), names, font, line, canvas.width)
        place = _place_inside(indices == index + 1, size, placed)
        if place is not None:
            _draw_label(draw, place, text, class_color(classes[index]), font, line)
            placed.append(place)
    return canvas


def class_color(label: int | str) -> Color:
    """Return the RGB color of a class, by its index or name; consecutive indices are far apart in hue."""
    index = zlib.crc32(label.encode()) if isinstance(label, str) else int(label)
    hue = index * _GOLDEN_RATIO % 1
    saturation, value = ((0.85, 0.95), (0.55, 1.0), (0.95, 0.75))[index // 8 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _draw_box(draw: ImageDraw.ImageDraw, box: Box, color: Color, width: int) -> None:
    """Draw a frame in the class's color between thin dark lines, visible on any background."""
    x0, y0, x1, y1 = box
    draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(0, 0, 0), width=width + 2)
    draw.rectangle(box, outline=color, width=width)


def _place_label(box: Box, label: tuple[float, float], image: tuple[int, int], taken: Sequence[Box]) -> Box:
    """Return the rectangle for a label of (width, height) at a box: above its top left corner if that is free.

    Otherwise it is the candidate that overlaps least with `taken`.
    """
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


def _place_inside(mask: np.ndarray, label: tuple[float, float], taken: Sequence[Box]) -> Box | None:
    """Return the rectangle for a label of (width, height) around the free point farthest from the mask's edge.

    None if no free place is found.
    """
    step = max(1, max(mask.shape) // 160)  # subsampled for speed: the place need not be exact
    small = np.pad(mask[::step, ::step], 1)
    depth = ndimage.distance_transform_edt(small)[1:-1, 1:-1]
    (width, height), (rows, columns) = label, mask.shape
    for _ in range(8):
        deepest = np.argwhere(depth == depth.max())
        row, column = deepest[len(deepest) // 2].tolist()
        if not depth[row, column]:
            return None
        left = max(0.0, min(column * step - width / 2, columns - 1 - width))
        top = max(0.0, min(row * step - height / 2, rows - 1 - height))
        place = (left, top, left + width, top + height)
        if not any(_overlap(place, other) for other in taken):
            return place
        reach_y, reach_x = int(height / step / 2) + 1, int(width / step / 4) + 1
        depth[max(0, row - reach_y) : row + reach_y + 1, max(0, column - reach_x) : column + reach_x + 1] = 0
    return None


def _index_map(
    segmentation: np.ndarray, segments_info: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray, list[Mapping[str, Any]]]:
    """Return an int map [height, width] of 1-based segment indices, 0 for no segment, and the segments in order."""
    if segmentation.ndim == 3:
        if len(segmentation) != len(segments_info):
            raise ValueError(f"there are {len(segmentation)} masks and {len(segments_info)} segments")
        indices = np.zeros(segmentation.shape[1:], np.int64)
        for index in sorted(range(len(segmentation)), key=lambda i: segments_info[i].get("score") or 0):
            indices[segmentation[index] > 0] = index + 1
        return indices, list(segments_info)
    if segmentation.ndim != 2:
        raise ValueError(
            f"the segmentation has shape {segmentation.shape}: expected [height, width] or [n, height, width]"
        )
    segments: dict[int, Mapping[str, Any]] = {}
    for segment in segments_info:
        segments.setdefault(int(segment["id"]), segment)
    indices = np.zeros(segmentation.shape, np.int64)
    for index, segment_id in enumerate(segments, 1):
        indices[segmentation == segment_id] = index
    return indices, list(segments.values())


def _class_of(segment: Mapping[str, Any]) -> int | str:
    for key in ("label_id", "category_id", "label"):
        if segment.get(key) is not None:
            value = segment[key]
            return value if isinstance(value, str) else int(value)
    raise ValueError(f"a segment is {dict(segment)}: expected label_id, category_id or label")


def _outlines(indices: np.ndarray, line: int) -> np.ndarray:
    """Return the borders between segments, bool [height, width], `line` pixels wide."""
    edges = np.zeros(indices.shape, bool)
    edges[:, 1:] |= indices[:, 1:] != indices[:, :-1]
    edges[1:] |= indices[1:] != indices[:-1]
    return ndimage.maximum_filter(edges, line)


def _enlarge(image: Image.Image, enlarge_below: int) -> tuple[Image.Image, int]:
    factor = max(1, enlarge_below // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC), factor


def _line_and_font(image: Image.Image) -> tuple[int, Any]:
    """Return a line width and a font that suit the image size."""
    extent = max(image.size)
    return max(2, round(extent / 350)), ImageFont.load_default(size=min(48, max(13, round(extent / 50))))


def _label(
    label: int | str, score: float | None, names: Mapping[int, str] | None, font: Any, line: int, room: int
) -> tuple[str, tuple[float, float]]:
    """Return the text of a label and its (width, height) in pixels."""
    name = names.get(label, str(label)) if names and isinstance(label, int) else str(label)
    text = _shorten(name if score is None else f"{name} {score:.2f}", font, room - 2 * line)
    ascent, descent = font.getmetrics()
    return text, (font.getlength(text) + 2 * line, ascent + descent + line)


def _draw_label(draw: ImageDraw.ImageDraw, place: Box, text: str, color: Color, font: Any, line: int) -> None:
    draw.rectangle(place, fill=color, outline=(0, 0, 0))
    draw.text((place[0] + line, place[1] + line / 2), text, fill=_text_color(color), font=font)


def _shorten(text: str, font: Any, room: float) -> str:
    if font.getlength(text) <= room:
        return text
    while len(text) > 1 and font.getlength(text + "...") > room:
        text = text[:-1]
    return text + "..."


def _text_color(background: Color) -> Color:
    """Return black or white, whichever contrasts more by WCAG's relative luminance (at least 4.5 : 1)."""
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
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16
        return (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)
