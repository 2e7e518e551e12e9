"""One record of a shard, and the table of everything that can be wrong with it.

A record is an image with what is known about it. Nothing readable is dropped: an image or object at fault
stays, with the code of its fault.
"""

from dataclasses import asdict, dataclass
from typing import Literal

import pyarrow as pa

SCHEMA_VERSION = 1
"""Version of the record schema and of manifest.json; readers refuse any other."""

SEGMENTATION = pa.struct(
    [
        # COCO's three forms, each kept as it was; the others are null.
        ("polygons", pa.list_(pa.list_(pa.float64()))),
        (
            "rle",
            pa.struct(
                [
                    ("size", pa.list_(pa.int32())),
                    ("counts", pa.binary()),  # compressed: COCO's ASCII string
                    ("runs", pa.list_(pa.int64())),  # uncompressed: the list of run lengths
                ]
            ),
        ),
    ]
)

OBJECT = pa.struct(
    [
        ("id", pa.int64()),
        ("category_id", pa.int64()),  # the data set's own
        ("bbox", pa.list_(pa.float64())),  # x, y, width, height in pixels
        ("area", pa.float64()),
        ("iscrowd", pa.int8()),
        ("segmentation", SEGMENTATION),
        ("keypoints", pa.list_(pa.float64())),
        ("fault", pa.string()),
        ("extra", pa.string()),  # JSON object of the fields that have no column, or null
    ]
)

SEGMENT = pa.struct(
    [
        ("id", pa.int64()),
        ("category_id", pa.int64()),
        ("area", pa.float64()),
        ("bbox", pa.list_(pa.float64())),
        ("iscrowd", pa.int8()),
        ("fault", pa.string()),
    ]
)

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("height", pa.int32()),  # of the decoder's output: EXIF rotation is not applied
        ("width", pa.int32()),
        ("image", pa.binary()),  # the original encoded bytes; null where there is no file
        ("objects", pa.list_(OBJECT)),
        ("panoptic_image", pa.binary()),
        ("segments", pa.list_(SEGMENT)),
        ("fault", pa.string()),
        ("extra", pa.string()),
    ]
)
"""One record. Nulls in `area`, `bbox`, `category_id`, `id`, `iscrowd`: absent from, or unreadable in, the JSON
(what was there instead is in `extra`)."""

FAULT_SCHEMA = pa.schema(
    [
        ("level", pa.string()),
        ("code", pa.string()),
        ("file", pa.string()),  # the image's file name, or the JSON's where no image is concerned
        ("image_id", pa.int64()),
        ("annotation_id", pa.int64()),
        ("reason", pa.string()),
    ]
)
"""One row of faults.parquet: a fault, where it is, and what was found there."""

Effect = Literal["used", "box-only", "untrained", "left-out"]
"""What a fault does. Every effect but `left-out` keeps the record or object in the shards and in evaluation.

- used: reported, trained on as usual.
- box-only: trained on as a box; it has no mask.
- untrained: an object leaves the targets; an image keeps its slot in the plan with zero weight.
- left-out: cannot be part of any record; in the fault table only.
"""


@dataclass(frozen=True)
class FaultKind:
    """A code of the fault table."""

    code: str
    level: Literal["image", "object"]
    text: str
    effect: Effect


FAULTS: dict[str, FaultKind] = {
    kind.code: kind
    for kind in (
        # An image or object with several faults carries the first of this order; the fault table has all.
        FaultKind("missing-file", "image", "the image file does not exist", "untrained"),
        FaultKind("unreadable-image", "image", "the file is not an image or is damaged", "untrained"),
        FaultKind("unconvertible-image", "image", "the image cannot be converted to RGB", "untrained"),
        FaultKind("image-too-large", "image", "more pixels than the decoder accepts", "untrained"),
        FaultKind("size-mismatch", "image", "the size in the JSON is not the image's", "untrained"),
        FaultKind("exif-orientation", "image", "EXIF asks for a rotation, which is not applied", "used"),
        FaultKind("duplicate-image-id", "image", "another entry has the same image id", "left-out"),
        FaultKind("unknown-image", "object", "no image has this annotation's image_id", "left-out"),
        FaultKind("malformed-annotation", "object", "a field is missing or of a wrong type", "untrained"),
        FaultKind("non-finite-box", "object", "NaN or infinity in the box", "untrained"),
        FaultKind("negative-box", "object", "negative width or height", "untrained"),
        FaultKind("empty-box", "object", "zero width or height", "untrained"),
        FaultKind("box-outside", "object", "the box does not touch the image", "untrained"),
        FaultKind("unknown-category", "object", "no category has this category_id", "untrained"),
        FaultKind(
            "repeated-annotation", "object", "same id, category and box as an earlier one", "untrained"
        ),
        FaultKind("bad-segmentation", "object", "the segmentation is not a mask of this image", "box-only"),
        FaultKind("duplicate-annotation-id", "object", "another annotation has the same id", "used"),
        FaultKind("box-over-edge", "object", "over 1 px beyond the image; clipped in training", "used"),
    )
}
"""Code → what it means and does: the one place that decides. The order is that of severity within a level."""

_SEVERITY = {code: rank for rank, code in enumerate(FAULTS)}


@dataclass(frozen=True)
class Fault:
    """One fault that was found: a row of faults.parquet."""

    code: str
    file: str
    image_id: int | None
    annotation_id: int | None
    reason: str

    def row(self) -> dict[str, object]:
        """The row of `FAULT_SCHEMA`."""
        return {"level": FAULTS[self.code].level, **asdict(self)}


def worst(codes: list[str]) -> str | None:
    """The code that a record or object with these faults carries; None without any."""
    return min(codes, key=_SEVERITY.__getitem__, default=None)


def is_trained(code: str | None) -> bool:
    """Whether an image or object with this fault (None: without one) takes part in the loss."""
    return code is None or FAULTS[code].effect in ("used", "box-only")
