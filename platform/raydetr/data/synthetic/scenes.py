"""Generate scenes with exact ground truth: shapes that partly occlude each other in front of sky, water and ground.

Classes differ only in shape: color, texture, size, rotation and position are drawn independently of the class. Every
mask contains the visible pixels. Boxes, polygons and the panoptic map are computed from the masks, so they agree
exactly.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import contourpy
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from raydetr.data.ingest.raw import RawAnnotation

THINGS = {"circle": 1, "square": 3, "triangle": 4, "star": 7}
"""Name → category id. The ids have gaps, as in COCO, so a category id is not a label."""
STUFF = {"sky": 21, "water": 22, "ground": 25}

MAX_SHAPES = 4
RADIUS = (0.11, 0.25)
"""Radius of a shape's circumscribed circle, relative to the image's side: shapes span 15 to 50 % of it."""
MIN_VISIBLE = 0.6
"""Minimum share of a shape that stays visible."""
MIN_CONTRAST = 70.0
"""Minimum RGB distance between a shape's color and the mean color of the pixels under it."""

_SUPERSAMPLING = 4

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Region:
    """The visible part of a thing or of stuff."""

    category_id: int
    mask: NDArray[np.bool_]
    """[size, size], at least one pixel."""

    @cached_property
    def area(self) -> int:
        """Number of visible pixels."""
        return int(np.count_nonzero(self.mask))

    @cached_property
    def bbox(self) -> list[int]:
        """[x, y, width, height], tight around the mask."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        x, y = int(columns[0]), int(rows[0])
        return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]


@dataclass(frozen=True)
class Scene:
    """An image and its ground truth."""

    pixels: NDArray[np.uint8]
    """[size, size, 3] RGB."""
    things: tuple[Region, ...]
    """Ordered from back to front."""
    stuff: tuple[Region, ...]
    """Things and stuff together cover every pixel exactly once."""


def make_scene(seed: int, index: int, size: int = 128) -> Scene:
    """Generate scene number `index` of a seed. The result depends only on the arguments.

    Args:
        seed: seed of the data set.
        index: 0 or more.
        size: height and width in pixels, at least 32.
    """
    rng = np.random.default_rng([seed, index])
    canvas, bands = _background(rng, size)
    names = list(THINGS)
    visible: list[tuple[int, NDArray[np.bool_]]] = []
    full_areas: list[int] = []
    for _ in range(int(rng.integers(1, MAX_SHAPES + 1))):
        name = names[int(rng.integers(len(names)))]
        placed = _place(rng, name, size, visible, full_areas)
        if placed is None:
            continue
        window, alpha = placed
        _paint(rng, canvas, window, alpha)
        mask = np.zeros((size, size), dtype=bool)
        mask[window] = alpha >= 0.5
        visible = [(category_id, other & ~mask) for category_id, other in visible]
        visible.append((THINGS[name], mask))
        full_areas.append(int(np.count_nonzero(mask)))
    free = ~np.logical_or.reduce([mask for _, mask in visible])
    stuff = [(category_id, band & free) for category_id, band in bands]
    return Scene(
        _photograph(rng, canvas),
        tuple(Region(category_id, mask) for category_id, mask in visible),
        tuple(Region(category_id, mask) for category_id, mask in stuff if mask.any()),
    )


def polygons(mask: NDArray[np.bool_]) -> list[list[float]]:
    """Trace a mask as COCO polygons, which pycocotools rasterizes to exactly this mask.

    A polygon runs through the midpoints of pixel edges. COCO has no holes, so a hole is joined to its outline by a cut
    of zero width.

    Args:
        mask: bool [height, width].
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    y, x = rows[0], columns[0]
    crop = np.pad(mask[y : rows[-1] + 1, x : columns[-1] + 1], 1).astype(np.float64)
    outlines = contourpy.contour_generator(z=crop, fill_type=contourpy.FillType.OuterOffset).filled(0.5, 2.0)
    result = []
    # contourpy's coordinates refer to pixel centers. Subtract one pixel of padding, add half a pixel to the corner.
    origin = np.array([x - 0.5, y - 0.5])
    for points, offsets in zip(*outlines):
        loops = [_corners(points[a : b - 1]) for a, b in pairwise(offsets)]
        outline = loops[0]
        for hole in loops[1:]:
            outline = _cut(outline, hole)
        result.append((outline + origin).ravel().tolist())
    return result


def _background(rng: np.random.Generator, size: int) -> tuple[Floats, list[tuple[int, NDArray[np.bool_]]]]:
    """Paint a canvas float32 [3, size, size] in 0..255 with bands of stuff: sky, often water, and ground."""
    rows = np.arange(size, dtype=np.float32)[:, None]
    horizon = size * rng.uniform(0.25, 0.6)
    shore = horizon + size * rng.uniform(0.1, 0.25) if rng.random() < 0.6 else horizon
    tops = {"sky": -math.inf, "water": horizon, "ground": shore}
    canvas = np.empty((3, size, size), dtype=np.float32)
    bands: list[tuple[int, NDArray[np.bool_]]] = []
    for name, top in tops.items():
        if name == "water" and shore == horizon:
            continue
        band = rows >= _wave(rng, size) + np.float32(top)
        bands = [(category_id, earlier & ~band) for category_id, earlier in bands]
        below = slice(int(band.any(1).argmax()), size)
        color = np.clip(np.array(_STUFF_COLORS[name]) + rng.uniform(-45, 45, 3), 0, 255)
        texture = _STUFF_TEXTURES[name](rng, *_grid(below, slice(0, size)))
        np.copyto(canvas[:, below], _shade(rng, texture, color), where=band[below])
        bands.append((STUFF[name], band))
    return canvas, bands


def _place(
    rng: np.random.Generator,
    name: str,
    size: int,
    visible: list[tuple[int, NDArray[np.bool_]]],
    full_areas: list[int],
) -> tuple[tuple[slice, slice], Floats] | None:
    """Find a position for a shape where all shapes behind it stay visible enough.

    Returns:
        The window of the shape and its opacity 0..1 there; None after ten failed attempts.
    """
    radius = size * rng.uniform(*RADIUS)
    angle = rng.uniform(0, 2 * math.pi)
    for _ in range(10):
        x, y = rng.uniform(radius, size - radius, 2)
        left, top = max(int(x - radius), 0), max(int(y - radius), 0)
        side = math.ceil(2 * radius) + 2
        window = (slice(top, min(top + side, size)), slice(left, min(left + side, size)))
        alpha = _shape(name, x - left, y - top, radius, angle, side)
        alpha = alpha[: window[0].stop - top, : window[1].stop - left]
        hidden = alpha >= 0.5
        if all(
            np.count_nonzero(mask) - np.count_nonzero(mask[window] & hidden) >= MIN_VISIBLE * full
            for (_, mask), full in zip(visible, full_areas)
        ):
            return window, alpha
    return None


def _shape(name: str, x: float, y: float, radius: float, angle: float, side: int) -> Floats:
    """Draw a shape around (x, y): its opacity, float32 [side, side] in 0..1."""
    image = Image.new("L", (side * _SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(image)
    if name == "circle":
        # 0.9: about the mean extent of the other shapes in a circle of this radius.
        radius *= 0.9
        box = [(center + sign * radius) * _SUPERSAMPLING for sign in (-1, 1) for center in (x, y)]
        draw.ellipse(box, fill=255)
    else:
        corners = {"square": 4, "triangle": 3, "star": 10}[name]
        reach = [radius * (0.45 if name == "star" and corner % 2 else 1.0) for corner in range(corners)]
        turns = [angle + 2 * math.pi * corner / corners for corner in range(corners)]
        draw.polygon(
            [
                ((x + r * math.cos(t)) * _SUPERSAMPLING, (y + r * math.sin(t)) * _SUPERSAMPLING)
                for r, t in zip(reach, turns)
            ],
            fill=255,
        )
    return np.asarray(image.reduce(_SUPERSAMPLING), dtype=np.float32) / np.float32(255)


def _paint(rng: np.random.Generator, canvas: Floats, window: tuple[slice, slice], alpha: Floats) -> None:
    """Blend a shape with a random color and texture into the canvas, in place."""
    under = canvas[:, *window]
    mean = under[:, alpha >= 0.5].mean(1)
    for _ in range(20):
        color = rng.uniform(0, 255, 3)
        if np.linalg.norm(color - mean) >= MIN_CONTRAST:
            break
    yy, xx = _grid(*window)
    texture = _TEXTURES[int(rng.integers(len(_TEXTURES)))](rng, yy, xx)
    canvas[:, *window] = under + alpha * (_shade(rng, texture, color) - under)


def _photograph(rng: np.random.Generator, canvas: Floats) -> NDArray[np.uint8]:
    """Add light from one side and sensor noise: uint8 [size, size, 3]."""
    size = canvas.shape[1]
    yy, xx = _grid(slice(0, size), slice(0, size))
    light = 0.9 + _gradient(rng, yy, xx) * np.float32(rng.uniform(0, 0.25))
    noise = rng.standard_normal((size, size), dtype=np.float32) * np.float32(rng.uniform(1, 6))
    pixels = np.clip(canvas * light + noise, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _shade(rng: np.random.Generator, texture: Floats, color: NDArray[Any]) -> Floats:
    """Map a texture in 0..1 to colors around a base color: float32 [3, height, width]."""
    contrast = rng.uniform(-45, 45, (3, 1, 1)).astype(np.float32)
    return color.astype(np.float32)[:, None, None] + (texture - np.float32(0.5)) * contrast


def _grid(rows: slice, columns: slice) -> tuple[Floats, Floats]:
    """Return row and column numbers, float32 [height, 1] and [1, width]."""
    return (
        np.arange(rows.start, rows.stop, dtype=np.float32)[:, None],
        np.arange(columns.start, columns.stop, dtype=np.float32)[None, :],
    )


def _wave(rng: np.random.Generator, size: int) -> Floats:
    """Return a smooth random curve around 0 in pixels, float32 [size]."""
    x = np.arange(size, dtype=np.float32) * np.float32(2 * math.pi / size)
    curve = np.zeros(size, dtype=np.float32)
    for frequency in (1, 2, 5):
        amplitude, phase = rng.uniform(0, 0.04 * size / frequency), rng.uniform(0, 2 * math.pi)
        curve += np.float32(amplitude) * np.sin(frequency * x + np.float32(phase))
    return curve


# Textures take the rows and columns of `_grid` and return float32 [height, width] in 0..1.


def _direction(rng: np.random.Generator, yy: Floats, xx: Floats) -> Floats:
    angle = rng.uniform(0, 2 * math.pi)
    return np.float32(math.cos(angle)) * xx + np.float32(math.sin(angle)) * yy


def _gradient(rng: np.random.Generator, yy: Floats, xx: Floats) -> Floats:
    along = _direction(rng, yy, xx)
    along = along - along.min()
    return along / max(float(along.max()), 1.0)


def _stripes(rng: np.random.Generator, yy: Floats, xx: Floats) -> Floats:
    period = np.float32(2 * math.pi / rng.uniform(4, 12))
    return 0.5 + 0.5 * np.sin(_direction(rng, yy, xx) * period + np.float32(rng.uniform(0, 6)))


def _checks(rng: np.random.Generator, yy: Floats, xx: Floats) -> Floats:
    side, phase = rng.uniform(3, 9), rng.uniform(0, 9)
    return ((np.floor((yy + phase) / side) + np.floor((xx + phase) / side)) % 2).astype(np.float32)


def _dots(rng: np.random.Generator, yy: Floats, xx: Floats) -> Floats:
    pitch = rng.uniform(5, 11)
    dy, dx = (yy + rng.uniform(0, 9)) % pitch - pitch / 2, (xx + rng.uniform(0, 9)) % pitch - pitch / 2
    return (dy * dy + dx * dx < (0.3 * pitch) ** 2).astype(np.float32)


def _noise(cells: float, stretch: float = 1.0) -> Any:
    """Create a texture of smooth noise with about `cells` cells per 128 pixels, `stretch` times as wide as high."""

    def texture(rng: np.random.Generator, yy: Floats, xx: Floats) -> Floats:
        height, width = yy.shape[0], xx.shape[1]
        rows, columns = (max(2, round(cells * n / 128 / s) + 1) for n, s in ((height, 1.0), (width, stretch)))
        coarse = Image.fromarray(rng.random((rows, columns), dtype=np.float32))
        return np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))

    return texture


_TEXTURES = (_gradient, _stripes, _checks, _dots, _noise(24))
_STUFF_TEXTURES = {"sky": _noise(5), "water": _noise(40, stretch=6), "ground": _noise(48)}
_STUFF_COLORS = {"sky": (150, 185, 215), "water": (60, 110, 150), "ground": (120, 115, 75)}


def _corners(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Remove from a closed loop [n, 2] the points that lie on a straight line between their neighbors."""
    before, after = points - np.roll(points, 1, 0), np.roll(points, -1, 0) - points
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    return points[turns]


def _cut(outline: NDArray[np.float64], hole: NDArray[np.float64]) -> NDArray[np.float64]:
    """Join an outline and a hole in it into one loop, where they are nearest to each other."""
    distances = np.square(outline[:, None] - hole[None]).sum(-1)
    i, j = np.unravel_index(distances.argmin(), distances.shape)
    return np.concatenate([outline[: i + 1], hole[j:], hole[: j + 1], outline[i:]])


def panoptic_map(scene: Scene) -> tuple[NDArray[np.uint8], list[RawAnnotation]]:
    """Convert a scene to COCO's panoptic format.

    Returns:
        Colors uint8 [size, size, 3], where R + 256 G + 65536 B is the id of the segment; and segments_info.
    """
    colored = [(_STUFF_SEGMENTS[region.category_id], region) for region in scene.stuff]
    colored += zip(_THING_SEGMENTS, scene.things)
    number = np.zeros(scene.pixels.shape[:2], dtype=np.uint8)
    segments: list[RawAnnotation] = []
    for position, ((red, green, blue), region) in enumerate(colored):
        number[region.mask] = position
        segments.append(
            {
                "id": red + 256 * green + 65536 * blue,
                "category_id": region.category_id,
                "area": region.area,
                "bbox": region.bbox,
                "iscrowd": 0,
            }
        )
    palette = np.array([color for color, _ in colored], dtype=np.uint8)
    return palette[number], segments


# Segment colors of the panoptic map, easy to tell apart when the PNG is opened.
_STUFF_SEGMENTS = {
    STUFF["sky"]: (135, 190, 235),
    STUFF["water"]: (60, 100, 200),
    STUFF["ground"]: (110, 140, 60),
}
_THING_SEGMENTS = ((230, 60, 60), (250, 200, 50), (160, 60, 200), (250, 130, 30))
