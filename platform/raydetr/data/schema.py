"""The schema of a record in a shard, and its types.

A record is an image with its annotations. Nothing readable is dropped: a faulty image or object stays in the shards,
with its fault code.
"""

from typing import NotRequired, TypedDict

import pyarrow as pa

SCHEMA_VERSION = 2
"""Version of the record schema and of manifest.json; readers refuse any other."""

SEGMENTATION = pa.struct(
    [
        # COCO's three forms, each stored unchanged; the forms that are not used are null.
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
        ("category_id", pa.int64()),  # as in the JSON, not a contiguous label
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
        ("height", pa.int32()),  # as training sees it: rotated only if the record is repaired-orientation
        ("width", pa.int32()),
        ("image", pa.binary()),  # the original encoded bytes; null if there is no file
        ("objects", pa.list_(OBJECT)),
        ("panoptic_image", pa.binary()),
        ("segments", pa.list_(SEGMENT)),
        ("fault", pa.string()),
        ("extra", pa.string()),
        ("image_hash", pa.int64()),  # see `duplicates.image_hash`; null if the image has none
    ]
)
"""One record. A null in `area`, `bbox`, `category_id`, `id` or `iscrowd` means that the JSON lacks the field or that
its value cannot be read; an unreadable value is stored in `extra`."""


class StoredRle(TypedDict):
    """`SEGMENTATION.rle`: either `counts` or `runs` is None."""

    size: list[int]
    counts: bytes | None
    runs: list[int] | None


class Segmentation(TypedDict):
    """A value of `SEGMENTATION`: either `polygons` or `rle` is None."""

    polygons: list[list[float]] | None
    rle: StoredRle | None


class ObjectRow(TypedDict, total=False):
    """A value of `OBJECT`. A row that was read without some of the columns lacks their keys."""

    id: int | None
    category_id: int | None
    bbox: list[float] | None
    area: float | None
    iscrowd: int | None
    segmentation: Segmentation | None
    keypoints: list[float] | None
    fault: str | None
    extra: str | None


class SegmentRow(TypedDict, total=False):
    """A value of `SEGMENT`. A row that was read without some of the columns lacks their keys."""

    id: int | None
    category_id: int | None
    area: float | None
    bbox: list[float] | None
    iscrowd: int | None
    fault: str | None


class Record(TypedDict, total=False):
    """A row of `SCHEMA`. A row that was read without some of the columns lacks their keys."""

    image_id: int
    file_name: str
    height: int
    width: int
    image: bytes | None
    objects: list[ObjectRow] | None
    panoptic_image: bytes | None
    segments: list[SegmentRow] | None
    fault: str | None
    extra: str | None
    image_hash: int | None


class Category(TypedDict):
    """A checked category of a COCO file. Other keys of the file are retained."""

    id: int
    name: str
    supercategory: NotRequired[str]
    isthing: NotRequired[int]
