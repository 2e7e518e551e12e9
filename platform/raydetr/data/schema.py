"""One record of a shard, and the table of everything that can be wrong with it.

A record is an image with what is known about it. Nothing readable is dropped: an image or object at fault
stays, with the code of its fault.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import pyarrow as pa

SCHEMA_VERSION = 2
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
        ("image_hash", pa.int64()),  # see `duplicates.image_hash`; null where there is none
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

Effect = Literal["note", "repaired", "used", "box-only", "untrained", "left-out"]
"""What a fault does. Every effect but `left-out` keeps the record or object in the shards and in evaluation.

- note: no fault, but worth knowing: counted and reported, not marked in the record, ignored by --on-fault.
- repaired: the meaning was plain and was read: marked and reported, used as read. `--on-fault fail` stops on it,
  `skip-image` keeps the image.
- used: reported, trained on as usual.
- box-only: trained on as a box; it has no mask.
- untrained: an object leaves the targets; an image keeps its slot in the plan with zero weight.
- left-out: cannot be part of any record; in the fault table only.
"""


@dataclass(frozen=True)
class FaultKind:
    """A code of the fault table."""

    code: str
    level: Literal["set", "image", "object", "segment"]
    text: str
    effect: Effect
    remedy: str = ""
    """What to do when many records have it, which a single cause then explains."""


FAULTS: dict[str, FaultKind] = {
    kind.code: kind
    for kind in (
        # An image or object with several faults carries the first of this order; the fault table has all.
        FaultKind(
            "missing-file",
            "image",
            "the image file does not exist",
            "untrained",
            "give --images the folder that the file names are relative to, or copy the missing files there",
        ),
        FaultKind(
            "file-outside",
            "image",
            "the file name leads out of the folder of images",
            "untrained",
            "give --images the folder that holds all files, or copy them into it; --follow-links reads what "
            "symbolic links in the folder point to",
        ),
        FaultKind(
            "shared-file",
            "image",
            "two image ids have one file",
            "untrained",
            "give all annotations of a file one image id",
        ),
        FaultKind(
            "shared-panoptic",
            "image",
            "two images have one panoptic PNG",
            "untrained",
            "give every image a panoptic PNG of its own",
        ),
        FaultKind(
            "ambiguous-image-id",
            "image",
            "one image id has several files",
            "untrained",
            "give every file an image id of its own",
        ),
        FaultKind("unreadable-image", "image", "the file is not an image or is damaged", "untrained"),
        FaultKind("unconvertible-image", "image", "the image cannot be converted to RGB", "untrained"),
        FaultKind("image-too-large", "image", "more pixels, or work, than the decoder accepts", "untrained"),
        FaultKind(
            "size-mismatch",
            "image",
            "the size in the JSON is not the image's",
            "untrained",
            "ingest the images that were annotated: boxes of a resized copy do not fit the original",
        ),
        # Before every fault that leaves an image trainable: `pixels.decode_record` asks for this code.
        FaultKind(
            "repaired-orientation",
            "image",
            "turned upright as its EXIF says, as it was annotated",
            "repaired",
        ),
        FaultKind("missing-panoptic", "image", "the panoptic PNG does not exist", "box-only"),
        FaultKind("unreadable-panoptic", "image", "the panoptic PNG is damaged or not RGB", "box-only"),
        FaultKind("panoptic-size", "image", "the panoptic PNG has another size than the image", "box-only"),
        FaultKind("mislabelled-image", "image", "the file's name promises another format", "used"),
        FaultKind("exif-orientation", "image", "EXIF asks for a rotation, which is not applied", "used"),
        FaultKind("unreadable-folder", "set", "folders or links that cannot be read, left out", "used"),
        FaultKind("unlabelled-segment", "image", "the PNG has ids that segments_info does not have", "used"),
        FaultKind("duplicate-image-id", "image", "another entry has the same image id", "left-out"),
        FaultKind("malformed-panoptic", "image", "a panoptic annotation cannot be read", "left-out"),
        FaultKind(
            "unknown-image",
            "object",
            "no image has this annotation's image_id",
            "left-out",
            "give the JSON whose images the annotations belong to",
        ),
        FaultKind(
            "malformed-annotation",
            "object",
            "a field is missing or of a wrong type",
            "untrained",
            "write id and category_id as integers, bbox as [x, y, width, height], iscrowd as 0 or 1",
        ),
        FaultKind("non-finite-box", "object", "NaN or infinity in the box", "untrained"),
        FaultKind("negative-box", "object", "negative width or height", "untrained"),
        FaultKind("empty-box", "object", "zero width or height", "untrained"),
        FaultKind(
            "box-outside",
            "object",
            "the box does not touch the image",
            "untrained",
            "write boxes in pixels of the image as it is in the folder",
        ),
        FaultKind(
            "unknown-category",
            "object",
            "no category has this category_id",
            "untrained",
            "list every category in categories, with the ids that the annotations use",
        ),
        FaultKind(
            "repeated-annotation", "object", "same id, category and box as an earlier one", "untrained"
        ),
        FaultKind("bad-segmentation", "object", "the segmentation is not a mask of this image", "box-only"),
        FaultKind("mask-unlike-box", "object", "the mask's box and the box are different places", "used"),
        FaultKind("duplicate-annotation-id", "object", "another annotation has the same id", "used"),
        FaultKind("box-over-edge", "object", "over 1 px beyond the image; clipped in training", "used"),
        FaultKind("unreadable-area", "object", "the area is no number; the box's is used", "used"),
        FaultKind(
            "repaired-name", "image", "the file has this name in another spelling or place", "repaired"
        ),
        FaultKind("repaired-image", "image", "id, height or width written in another form", "repaired"),
        FaultKind("repaired-field", "object", "a field written in another form", "repaired"),
        FaultKind("repaired-box", "object", "no box: it is that of the segmentation", "repaired"),
        FaultKind("repaired-segmentation", "object", "a segmentation written in another form", "repaired"),
        FaultKind("crowd-as-object", "object", "iscrowd 1, read as an object on request", "repaired"),
        FaultKind(
            "repaired-category", "set", "an unused category with the name of another, left out", "repaired"
        ),
        FaultKind("malformed-segment", "segment", "a segment without readable id or category", "untrained"),
        FaultKind(
            "duplicate-segment-id", "segment", "another segment of the image has the same id", "untrained"
        ),
        FaultKind("unknown-segment-category", "segment", "no category has this category_id", "untrained"),
        FaultKind("segment-not-in-png", "segment", "no pixel of the PNG has the segment's id", "untrained"),
        FaultKind("segment-area", "segment", "the area is not the number of pixels", "used"),
        FaultKind("segment-box", "segment", "the box is not that of the pixels", "used"),
        FaultKind("boxes-normalised", "set", "boxes from 0 to 1 instead of in pixels", "used"),
        FaultKind("boxes-as-corners", "set", "boxes x1, y1, x2, y2 instead of x, y, width, height", "used"),
        FaultKind("near-duplicate", "set", "nearly the same image in two splits", "used"),
        FaultKind("surplus-files", "set", "image files or PNGs that no JSON names", "note"),
        FaultKind("renumbered", "set", "ids changed, since another file has the same ones", "note"),
        FaultKind("crowds", "set", "iscrowd 1: not trained on", "note"),
        FaultKind("no-objects", "image", "nothing to detect", "note"),
        FaultKind("many-objects", "image", "more objects than the usual 100 queries", "note"),
        FaultKind("grey-image", "image", "grey, becomes RGB", "note"),
        FaultKind("cmyk-image", "image", "CMYK, becomes RGB", "note"),
        FaultKind("deep-image", "image", "more than 8 bits a channel, of which 8 are used", "note"),
        FaultKind("animated-image", "image", "animated, of which the first frame is used", "note"),
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

    @property
    def is_note(self) -> bool:
        """Whether it is remarkable only."""
        return FAULTS[self.code].effect == "note"

    @property
    def is_repaired(self) -> bool:
        """Whether what it names was read as it was meant."""
        return is_repaired(self.code)


def worst(codes: list[str]) -> str | None:
    """The code that a record or object with these faults carries; None without any."""
    faults = (code for code in codes if FAULTS[code].effect != "note")
    return min(faults, key=_SEVERITY.__getitem__, default=None)


def is_trained(code: str | None) -> bool:
    """Whether an image or object with this fault (None: without one) takes part in the loss."""
    return code is None or FAULTS[code].effect in ("note", "repaired", "used", "box-only")


def is_repaired(code: str | None) -> bool:
    """Whether an image or object with this code was read as it was meant."""
    return code is not None and FAULTS[code].effect == "repaired"


def without_notes(faults: Iterable[Fault]) -> list[Fault]:
    """Those that are faults indeed."""
    return [fault for fault in faults if not fault.is_note]
