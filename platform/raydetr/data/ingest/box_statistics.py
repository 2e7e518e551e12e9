"""Boxes in the wrong format: what no single box proves, but all of them together do."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from raydetr.data.schema import Fault

LEAST_BOXES = 10
"""Fewer boxes prove nothing."""


@dataclass(frozen=True)
class BoxStatistics:
    """Counts over boxes with finite numbers, of images of known size.

    boxes: how many.
    normalised: with all four numbers from 0 to 1.
    beyond: that reach beyond their image by more than a pixel, as x, y, width, height.
    corners: that are boxes within their image if taken as x1, y1, x2, y2.
    """

    boxes: int = 0
    normalised: int = 0
    beyond: int = 0
    corners: int = 0

    def __add__(self, other: "BoxStatistics") -> "BoxStatistics":
        return BoxStatistics(
            self.boxes + other.boxes,
            self.normalised + other.normalised,
            self.beyond + other.beyond,
            self.corners + other.corners,
        )

    def add(self, record: Mapping[str, Any]) -> "BoxStatistics":
        """With the boxes of a record."""
        width, height = record["width"], record["height"]
        if not width or not height:
            return self
        boxes = [item["bbox"] for item in record["objects"]]
        boxes = [box for box in boxes if box is not None and all(map(math.isfinite, box))]
        return self + BoxStatistics(
            len(boxes),
            sum(all(0 <= value <= 1 for value in box) for box in boxes),
            sum(x + w > width + 1 or y + h > height + 1 for x, y, w, h in boxes),
            sum(0 <= x < w <= width + 1 and 0 <= y < h <= height + 1 for x, y, w, h in boxes),
        )

    def suspicions(self, file: str) -> Iterable[Fault]:
        """What the numbers say about the format, in words."""
        if self.boxes < LEAST_BOXES:
            return
        if self.normalised >= 0.9 * self.boxes:
            reason = (
                f"{self.normalised:,} of {self.boxes:,} boxes lie between 0 and 1: they look normalised; COCO's are "
                "in pixels: multiply by the image's width and height"
            )
            yield Fault("boxes-normalised", file, None, None, reason)
        elif self.corners >= 0.98 * self.boxes and self.beyond >= 0.1 * self.boxes:
            reason = (
                f"{self.beyond:,} of {self.boxes:,} boxes reach beyond their image, and {self.corners:,} would not "
                "as corners x1, y1, x2, y2: COCO's are x, y, width, height: subtract x1 and y1"
            )
            yield Fault("boxes-as-corners", file, None, None, reason)
