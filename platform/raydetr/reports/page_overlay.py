"""Objects and detections over an image, as SVG: truth in solid lines, predictions dashed, labels that avoid each other."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise, product

import contourpy
import numpy as np
from PIL import Image

from raydetr.reports.page_matching import Item

FONT = 17
"""Height of labels in the picture's units; pictures are about 512 wide and shown at half to two thirds of that."""

CROWDED = 0.4
"""Share of a label under others from which on it is left out."""

Place = tuple[float, float, float, float]


class Overlay:
    """What is drawn over one image.

    Args:
        size: (width, height) of the drawing.
        scale: the drawing's units for one pixel of the image.
        names: category id → name.
    """

    def __init__(self, size: tuple[int, int], scale: float, names: Mapping[int, str]) -> None:
        self.size, self.scale, self.names = size, scale, names
        self._taken: list[Place] = []

    def draw(self, items: Sequence[Item], kind: str, key: Sequence[bool]) -> tuple[str, str]:
        """Objects or detections as SVG.

        Args:
            items: what to draw.
            kind: CSS class, `truth` or `found`.
            key: which of them the picture is about: these have a label; the others are drawn faintly.

        Returns:
            the shapes, and the labels, which belong above the shapes of all kinds.
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
        return f"{'truth' if kind == 'truth' else 'predicted'}: {escape(name)}{' (crowd)' if item.crowd else ''}{score}"

    def _box(self, item: Item) -> Place:
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
        long = 0.62 * FONT * len(text) + 4
        above = (y, y - FONT, y + FONT, y + h - FONT, y + h, y + h / 2)  # tops, the preferred ones first
        below = (y + h - FONT - 3, y + h, y + h - 2 * FONT, y, y - FONT, y + h / 2)
        columns = (x + 3, x + w - long - 2, x + (w - long) / 2)
        places = []
        for top, left in product(above if kind == "truth" else below, columns):
            left = max(1.0, min(left, self.size[0] - long))
            top = max(0.0, min(top, self.size[1] - FONT - 2))
            places.append((left, top, left + long, top + FONT))
        place = min(places, key=lambda each: sum(_overlap(each, other) for other in self._taken))
        if sum(_overlap(place, other) for other in self._taken) > CROWDED * long * FONT:
            return ""  # it could not be read; the name is still the drawing's title, and a larger picture has room
        self._taken.append(place)
        return f'<text x="{place[0]:.1f}" y="{place[1] + FONT - 3:.1f}">{escape(text)}</text>'


def outlines(mask: np.ndarray, size: tuple[int, int]) -> str:
    """The SVG path around the parts of a mask.

    Args:
        mask: uint8 [height, width], 0 or 1.
        size: (width, height) of the drawing, to which the mask is scaled.
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
        kept = [a for a, b in pairwise([*points, (-9, -9)]) if a != b]
        if len(kept) > 2:
            paths.append("M" + "L".join(f"{x} {y}" for x, y in kept) + "Z")
    return "".join(paths)


def _overlap(a: Place, b: Place) -> float:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
