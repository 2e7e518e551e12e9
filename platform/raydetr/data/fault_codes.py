"""The fault codes of ingest: what each means, and what a fault does to its image or object."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypedDict

import pyarrow as pa

FAULT_SCHEMA = pa.schema(
    [
        ("level", pa.string()),
        ("code", pa.string()),
        ("file", pa.string()),  # file name of the image, or of the JSON if the fault concerns no image
        ("image_id", pa.int64()),
        ("annotation_id", pa.int64()),
        ("reason", pa.string()),
    ]
)
"""One row of faults.parquet: a fault, where it is, and what was found."""


class FaultRow(TypedDict):
    """A row of `FAULT_SCHEMA`."""

    level: str
    code: str
    file: str
    image_id: int | None
    annotation_id: int | None
    reason: str


Effect = Literal["note", "repaired", "used", "box-only", "untrained", "left-out"]
"""What a fault does. With every effect but `left-out`, the record or object stays in the shards and in evaluation.

- note: not a fault, but worth knowing: counted and reported, not marked in the record, ignored by --on-fault.
- repaired: the value had only one possible meaning and was converted to it: marked and reported, used as converted.
  `--on-fault fail` stops on it; `--on-fault skip-image` does not skip the image.
- used: reported, and trained on as usual.
- box-only: trained on as a box without a mask.
- untrained: an object is excluded from the targets; an image keeps its slot in the plan with zero weight.
- left-out: cannot be part of any record; listed in the fault table only.
"""


@dataclass(frozen=True)
class FaultKind:
    """A code of the fault table."""

    code: str
    level: Literal["set", "image", "object", "segment"]
    text: str
    effect: Effect
    remedy: str = ""
    """What to do when many records have this fault, which usually has a single cause then."""


FAULTS: dict[str, FaultKind] = {
    kind.code: kind
    for kind in (
        # An image or object with several faults carries the first one in this order; the fault table lists all.
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
            "the file name points outside the image folder",
            "untrained",
            "give --images the folder that holds all files, or copy them into it; --follow-links follows "
            "symbolic links out of the folder",
        ),
        FaultKind(
            "shared-file",
            "image",
            "two image ids refer to the same file",
            "untrained",
            "give all annotations of a file the same image id",
        ),
        FaultKind(
            "shared-panoptic",
            "image",
            "two images refer to the same panoptic PNG",
            "untrained",
            "give every image its own panoptic PNG",
        ),
        FaultKind(
            "ambiguous-image-id",
            "image",
            "several files have the same image id",
            "untrained",
            "give every file its own image id",
        ),
        FaultKind("unreadable-image", "image", "the file is not an image or is damaged", "untrained"),
        FaultKind("unconvertible-image", "image", "the image cannot be converted to RGB", "untrained"),
        FaultKind(
            "image-too-large", "image", "more pixels or decoding work than the decoder accepts", "untrained"
        ),
        FaultKind(
            "size-mismatch",
            "image",
            "the size in the JSON differs from the size of the image",
            "untrained",
            "ingest the images that were annotated: boxes of a resized copy do not fit the original",
        ),
        # Must precede every fault that leaves an image trainable: a record carries only its first code, and
        # `pixels.decode_record` rotates an image only if it finds this one.
        FaultKind(
            "repaired-orientation",
            "image",
            "rotated upright by its EXIF orientation, as it was annotated",
            "repaired",
        ),
        FaultKind("missing-panoptic", "image", "the panoptic PNG does not exist", "box-only"),
        FaultKind("unreadable-panoptic", "image", "the panoptic PNG is damaged or not RGB", "box-only"),
        FaultKind("panoptic-size", "image", "the panoptic PNG and the image differ in size", "box-only"),
        FaultKind("mislabelled-image", "image", "the file extension belongs to another format", "used"),
        FaultKind("exif-orientation", "image", "the EXIF rotation is not applied", "used"),
        FaultKind("unreadable-folder", "set", "folders or links that cannot be read; skipped", "used"),
        FaultKind("unlabelled-segment", "image", "the PNG has ids that segments_info lacks", "used"),
        FaultKind("duplicate-image-id", "image", "another entry has the same image id", "left-out"),
        FaultKind("malformed-panoptic", "image", "a panoptic annotation cannot be read", "left-out"),
        FaultKind(
            "unknown-image",
            "object",
            "no image has this annotation's image_id",
            "left-out",
            "give the JSON that lists the images of these annotations",
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
            "write boxes in pixels of the image file in the folder",
        ),
        FaultKind(
            "unknown-category",
            "object",
            "no category has this category_id",
            "untrained",
            "list every category in categories, with the ids that the annotations use",
        ),
        FaultKind(
            "repeated-annotation", "object", "same id, category and box as an earlier annotation", "untrained"
        ),
        FaultKind("bad-segmentation", "object", "the segmentation is not a mask of this image", "box-only"),
        FaultKind("mask-unlike-box", "object", "the mask and the box cover different areas", "used"),
        FaultKind("duplicate-annotation-id", "object", "another annotation has the same id", "used"),
        FaultKind(
            "box-over-edge",
            "object",
            "the box extends over 1 px beyond the image; clipped in training",
            "used",
        ),
        FaultKind(
            "unreadable-area", "object", "the area is not a number; the area of the box is used", "used"
        ),
        FaultKind(
            "repaired-name", "image", "the file has this name in another spelling or subfolder", "repaired"
        ),
        FaultKind("repaired-image", "image", "id, height or width in a nonstandard form", "repaired"),
        FaultKind("repaired-field", "object", "a field in a nonstandard form", "repaired"),
        FaultKind("repaired-box", "object", "no box; the box of the segmentation is used", "repaired"),
        FaultKind("repaired-segmentation", "object", "a segmentation in a nonstandard form", "repaired"),
        FaultKind(
            "crowd-as-object", "object", "iscrowd 1, read as an object (--crowds-as-objects)", "repaired"
        ),
        FaultKind(
            "repaired-category",
            "set",
            "an unused category with the same name as another; dropped",
            "repaired",
        ),
        FaultKind("malformed-segment", "segment", "a segment without a readable id or category", "untrained"),
        FaultKind(
            "duplicate-segment-id", "segment", "another segment of the image has the same id", "untrained"
        ),
        FaultKind("unknown-segment-category", "segment", "no category has this category_id", "untrained"),
        FaultKind("segment-not-in-png", "segment", "no pixel of the PNG has the segment's id", "untrained"),
        FaultKind("segment-area", "segment", "the area differs from the number of pixels", "used"),
        FaultKind("segment-box", "segment", "the box differs from the extent of the pixels", "used"),
        FaultKind("boxes-normalised", "set", "boxes in 0 to 1 instead of pixels", "used"),
        FaultKind("boxes-as-corners", "set", "boxes x1, y1, x2, y2 instead of x, y, width, height", "used"),
        FaultKind("near-duplicate", "set", "nearly the same image in two splits", "used"),
        FaultKind("surplus-files", "set", "image files or PNGs that no JSON lists", "note"),
        FaultKind("renumbered", "set", "ids changed because another file uses the same ones", "note"),
        FaultKind("crowds", "set", "iscrowd 1: not trained on", "note"),
        FaultKind("no-objects", "image", "no objects", "note"),
        FaultKind("many-objects", "image", "more objects than the usual 100 queries", "note"),
        FaultKind("grey-image", "image", "grayscale; converted to RGB", "note"),
        FaultKind("cmyk-image", "image", "CMYK; converted to RGB", "note"),
        FaultKind("deep-image", "image", "more than 8 bits per channel; converted to 8", "note"),
        FaultKind("animated-image", "image", "animated; only the first frame is used", "note"),
    )
}
"""Code → meaning and effect, which decides whether an object or an image is used. Ordered by severity within a level."""

_SEVERITY = {code: rank for rank, code in enumerate(FAULTS)}


@dataclass(frozen=True)
class Fault:
    """One fault: a row of faults.parquet."""

    code: str
    file: str
    image_id: int | None
    annotation_id: int | None
    reason: str

    def row(self) -> FaultRow:
        """Convert to a row of `FAULT_SCHEMA`."""
        return {
            "level": FAULTS[self.code].level,
            "code": self.code,
            "file": self.file,
            "image_id": self.image_id,
            "annotation_id": self.annotation_id,
            "reason": self.reason,
        }

    @property
    def is_note(self) -> bool:
        """Whether this is only a note, not a fault."""
        return FAULTS[self.code].effect == "note"

    @property
    def is_repaired(self) -> bool:
        """Whether the value was repaired."""
        return is_repaired(self.code)


def worst(codes: list[str]) -> str | None:
    """Return the most severe code, which the record or object carries; None if all are notes or there are none."""
    faults = (code for code in codes if FAULTS[code].effect != "note")
    return min(faults, key=_SEVERITY.__getitem__, default=None)


def is_trained(code: str | None) -> bool:
    """Whether an image or object with this fault code (None: no fault) takes part in the loss."""
    return code is None or FAULTS[code].effect in ("note", "repaired", "used", "box-only")


def is_repaired(code: str | None) -> bool:
    """Whether this code means that the image or object was repaired."""
    return code is not None and FAULTS[code].effect == "repaired"


def without_notes(faults: Iterable[Fault]) -> list[Fault]:
    """Filter out the notes."""
    return [fault for fault in faults if not fault.is_note]
