"""SVG overlays of objects and detections: ground truth solid, predictions dashed, labels placed without overlap."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise, product

import contourpy
import numpy as np
from PIL import Image

from raydetr.reports.page_matching import Item

FONT = 17
"""Height of labels in units of the overlay. Overlays are about 512 wide and shown at half to two thirds of that."""

MAX_COVERED = 0.4
"""A label is omitted if other labels cover more than this share of it."""

Rectangle = tuple[float, float, float, float]


class Overlay:
    """The overlay of one image.

    Args:
        size: (width, height) of the overlay.
        scale: units of the overlay per pixel of the image.
        names: category id → name.
    """

    def __init__(self, size: tuple[int, int], scale: float, names: Mapping[int, str]) -> None:
        self.size, self.scale, self.names = size, scale, names
        self._taken: list[Rectangle] = []

    def draw(self, items: Sequence[Item], kind: str, key: Sequence[bool]) -> tuple[str, str]:
        """Draw objects or detections as SVG.

        Args:
            items: objects or detections.
            kind: CSS class, `truth` or `found`.
            key: whether to emphasize each item. Emphasized items have a label, and the others are drawn faintly.

        Returns:
            The shapes, and the labels, which must be placed above the shapes of all kinds.
        """
        order = sorted(range(len(items)), key=lambda index: (key[index], items[index].score or 0))
        shapes = "".join(
            f'<g class="{kind} {"key" if key[index] else "other"}"><title>{self._text(items[index], kind)}</title>'
            f"{self._shape(items[index])}</g>"
            for index in order
        )
        labels = [self._label(items[index], kind) for index in reversed(order) if key[index]]
        return shapes, f'<g class="{kind} key">{"".join(reversed(labels))}</g>'

    def _text(self, item: Item, kind: str) -> str:
        name = self.names.get(item.category_id, f"category {item.category_id}")
        score = "" if item.score is None else f" {item.score:.2f}"
        source = "ground truth" if kind == "truth" else "predicted"
        return f"{source}: {escape(name)}{' (crowd)' if item.crowd else ''}{score}"

    def _box(self, item: Item) -> Rectangle:
        (x, y, w, h), (width, height) = item.box, self.size
        left, top = max(1.0, x * self.scale), max(1.0, y * self.scale)
        right, bottom = min(width - 1.0, (x + w) * self.scale), min(height - 1.0, (y + h) * self.scale)
        return left, top, max(right - left, 1), max(bottom - top, 1)

    def _shape(self, item: Item) -> str:
        x, y, w, h = self._box(item)
        frame = f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}"'
        outline = "" if item.mask is None else outlines(item.mask, self.size)
        mask = f'<path class=mask d="{outline}"/>' if outline else ""
        return f"{mask}<rect class=casing {frame}/><rect class=line {frame}/>"

    def _label(self, item: Item, kind: str) -> str:
        text = self.names.get(item.category_id, f"category {item.category_id}")
        text = text if len(text) <= 24 else text[:23] + "…"
        if item.score is not None:
            text += f" {item.score:.2f}"
        x, y, w, h = self._box(item)
        length = 0.62 * FONT * len(text) + 4
        # Tops of the candidate positions, in order of preference: near the top edge for ground truth, near the bottom
        # edge for predictions, so that the labels of a correct detection do not collide.
        near_top = (y, y - FONT, y + FONT, y + h - FONT, y + h, y + h / 2)
        near_bottom = (y + h - FONT - 3, y + h, y + h - 2 * FONT, y, y - FONT, y + h / 2)
        columns = (x + 3, x + w - length - 2, x + (w - length) / 2)
        candidates = []
        for top, left in product(near_top if kind == "truth" else near_bottom, columns):
            left = max(1.0, min(left, self.size[0] - length))
            top = max(0.0, min(top, self.size[1] - FONT - 2))
            candidates.append((left, top, left + length, top + FONT))
        label = min(candidates, key=lambda each: sum(_overlap(each, other) for other in self._taken))
        if sum(_overlap(label, other) for other in self._taken) > MAX_COVERED * length * FONT:
            return ""  # unreadable; the title of the shape still has the name, and an enlarged image has more space
        self._taken.append(label)
        return f'<text x="{label[0]:.1f}" y="{label[1] + FONT - 3:.1f}">{escape(text)}</text>'


def outlines(mask: np.ndarray, size: tuple[int, int]) -> str:
    """Return the SVG path around the parts of a mask.

    Args:
        mask: uint8 [height, width], 0 or 1.
        size: (width, height) of the overlay, to which the mask is scaled.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return ""
    scale = size[0] / mask.shape[1], size[1] / mask.shape[0]
    left, top = int(columns[0]), int(rows[0])
    part = Image.fromarray(mask[top : rows[-1] + 1, left : columns[-1] + 1] * np.uint8(255))
    extent = max(1, round(part.width * scale[0])), max(1, round(part.height * scale[1]))
    padded = np.pad(np.asarray(part.resize(extent, Image.Resampling.BOX), np.float32), 1)
    x0, y0 = round(left * scale[0]) - 1, round(top * scale[1]) - 1
    paths = []
    for line in contourpy.contour_generator(z=padded).lines(127.5):
        points = [(x0 + x, y0 + y) for x, y in np.asarray(line)[::2].round().astype(int).tolist()]
        distinct = [a for a, b in pairwise([*points, (-9, -9)]) if a != b]
        if len(distinct) > 2:
            paths.append("M" + "L".join(f"{x} {y}" for x, y in distinct) + "Z")
    return "".join(paths)


def _overlap(a: Rectangle, b: Rectangle) -> float:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
