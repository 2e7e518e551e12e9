"""Detect boxes in the wrong format, from the statistics of all boxes, since a single box proves nothing."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from raydetr.data.fault_codes import Fault
from raydetr.data.schema import Record

MIN_BOXES = 10
"""Minimum number of boxes for a conclusion."""


@dataclass(frozen=True)
class BoxStatistics:
    """Counts of boxes with finite numbers in images of known size.

    boxes: number of boxes.
    normalised: boxes with all four numbers in 0 to 1.
    beyond: boxes that extend over 1 pixel beyond their image, read as x, y, width, height.
    corners: boxes that lie inside their image, read as corners x1, y1, x2, y2.
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

    def add(self, record: Record) -> "BoxStatistics":
        """Return the counts with the boxes of a record added."""
        width, height = record["width"], record["height"]
        if not width or not height:
            return self
        read = [item["bbox"] for item in record["objects"] or ()]
        boxes = [box for box in read if box is not None and all(map(math.isfinite, box))]
        return self + BoxStatistics(
            len(boxes),
            sum(all(0 <= value <= 1 for value in box) for box in boxes),
            sum(x + w > width + 1 or y + h > height + 1 for x, y, w, h in boxes),
            sum(0 <= x < w <= width + 1 and 0 <= y < h <= height + 1 for x, y, w, h in boxes),
        )

    def format_faults(self, file: str) -> Iterable[Fault]:
        """Report the format that the boxes seem to have, if it is not COCO's."""
        if self.boxes < MIN_BOXES:
            return
        if self.normalised >= 0.9 * self.boxes:
            reason = (
                f"{self.normalised:,} of {self.boxes:,} boxes lie between 0 and 1 and look normalized. COCO boxes are "
                "in pixels: multiply them by the image's width and height"
            )
            yield Fault("boxes-normalised", file, None, None, reason)
        elif self.corners >= 0.98 * self.boxes and self.beyond >= 0.1 * self.boxes:
            reason = (
                f"{self.beyond:,} of {self.boxes:,} boxes extend beyond their image, but {self.corners:,} lie inside "
                "if read as corners x1, y1, x2, y2. COCO boxes are x, y, width, height: subtract x1 and y1"
            )
            yield Fault("boxes-as-corners", file, None, None, reason)
