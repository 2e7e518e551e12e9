"""Check a single image or annotation. The checks are pure functions that return faults as (code, reason).

`data.fault_codes.FAULTS` lists the codes and their effects.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from detr.image_processing.container import Container, read_container
from detr.image_processing.decode import (
    DEFAULT_MAX_PIXELS,
    ImageCostError,
    ImageError,
    decode_image,
    image_size,
)
from detr.mask_codec import LARGEST_COORDINATE, box_of_rle, rle_runs
from raydetr.data.ingest.duplicates import image_hash
from raydetr.data.ingest.raw import RawAnnotation
from raydetr.data.schema import ObjectRow, Segmentation, StoredRle

Orientation = Literal["auto", "apply", "ignore"]

Problem = tuple[str, str]
"""The code of a fault, and what was found."""

EDGE_TOLERANCE = 1.0
"""Pixels by which a box may extend beyond the image without a report, because annotation tools round."""

_TIFF_BITS = 0x0102

_EXTENSIONS = {
    **dict.fromkeys(("jpg", "jpeg", "jpe"), ("JPEG", "MPO")),
    **dict.fromkeys(("tif", "tiff"), ("TIFF",)),
    **dict.fromkeys(("png", "apng"), ("PNG",)),
    **{extension: (extension.upper(),) for extension in ("webp", "bmp", "gif")},
}
"""File extension → Pillow's names of the formats that it stands for."""


@dataclass(frozen=True)
class ImageFacts:
    """The properties of an encoded image."""

    height: int
    """Height and width of the decoder's output. If it cannot be decoded: those of the header or the JSON, else 0."""
    width: int
    frame: tuple[int, int] | None
    """(height, width) that the boxes refer to: from the JSON, else from the image; None if both are unknown."""
    faults: tuple[Problem, ...]
    hash: int | None = None
    """See `duplicates.image_hash`."""


def inspect_image(
    data: bytes | None,
    json_height: int | None,
    json_width: int | None,
    file_name: str = "",
    orientation: Orientation = "auto",
) -> ImageFacts:
    """Decode an image once, and compare it with its entry in the JSON.

    Args:
        data: the encoded image; None if there is no file.
        json_height: height in the JSON; None if absent.
        json_width: width in the JSON; None if absent.
        file_name: name of the file; its extension is compared with the format.
        orientation: apply or ignore an EXIF rotation. auto: apply it if the size in the JSON is that of the displayed
            image and not of the stored one, since the annotator saw the displayed image.
    """
    claimed = None
    if json_height is not None and json_width is not None and min(json_height, json_width) > 0:
        # A larger side is a mistake, since no decoder outputs it, and it does not fit into the int32 columns.
        claimed = (json_height, json_width) if max(json_height, json_width) < 2**31 else None
    if data is None:
        return ImageFacts(*(claimed or (0, 0)), claimed, (("missing-file", "no such file"),))
    container = read_container(data)
    try:
        size = image_size(container)
    except ImageError as error:
        bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
        too_large = isinstance(error, ImageCostError) or isinstance(error.__cause__, bombs)
        code = "image-too-large" if too_large else "unreadable-image"
        return ImageFacts(*(claimed or (0, 0)), claimed, ((code, str(error)),))
    problems: list[Problem] = []
    if size[0] * size[1] > DEFAULT_MAX_PIXELS:
        text = f"{size[0]} x {size[1]} pixels; the maximum is {DEFAULT_MAX_PIXELS:,}"
        return ImageFacts(*size, claimed or size, (("image-too-large", text),))
    image_bits = None
    exif, of_header = container.orientation, _header_problems(container, data, file_name)
    shown = size[::-1] if exif >= 5 else size
    rotated = exif != 1 and (
        orientation == "apply" or (orientation == "auto" and claimed == shown and shown != size)
    )
    stored, size = size, shown if rotated else size
    try:
        image_bits = image_hash(decode_image(container, orientation="apply" if rotated else "ignore"))
    except ImageCostError as error:
        return ImageFacts(*size, claimed or size, (("image-too-large", str(error)),))
    except ImageError as error:
        problems.append((_decode_fault(data), str(error)))
    problems += _size_problems((json_height, json_width), size)
    if rotated:
        text = f"EXIF orientation {exif}: {stored[0]} x {stored[1]} as stored, {size[0]} x {size[1]} upright"
        problems.append(("repaired-orientation", text))
    elif exif != 1:
        problems.append(
            ("exif-orientation", f"EXIF orientation {exif}: --orientation apply rotates it upright")
        )
    return ImageFacts(*size, claimed or size, (*problems, *of_header), image_bits)


def object_faults(
    fields: RawAnnotation,
    item: ObjectRow,
    frame: tuple[int, int] | None,
    category_ids: frozenset[int],
) -> list[Problem]:
    """Check an annotation by itself, after `repairs`: a negative or NaN area, for example, was removed there.

    Args:
        fields: the annotation as it is in the JSON.
        item: the columns read from it; None for a field that could not be read.
        frame: (height, width) that its box refers to; None skips the checks that need it.
        category_ids: category ids of the data set.
    """
    problems: list[Problem] = []
    unreadable = [key for key in ("category_id", "bbox") if item[key] is None]
    unreadable += [key for key in ("iscrowd",) if item[key] is None and fields.get(key) is not None]
    if unreadable:
        what = ", ".join(
            f"{key} {fields.get(key)!r:.80}" if key in fields else f"no {key}" for key in unreadable
        )
        problems.append(("malformed-annotation", what))
    if item["area"] is None and fields.get("area") is not None:
        problems.append(("unreadable-area", f"area {fields['area']!r:.80}"))
    if item["bbox"] is not None:
        problems += _box_faults(item["bbox"], frame)
    if item["category_id"] is not None and item["category_id"] not in category_ids:
        known = ", ".join(map(str, sorted(category_ids)[:10])) + (", …" if len(category_ids) > 10 else "")
        problems.append(("unknown-category", f"category_id {item['category_id']}; categories has {known}"))
    if (reason := _segmentation_fault(fields.get("segmentation"), item["segmentation"], frame)) is not None:
        problems.append(("bad-segmentation", reason))
    elif (
        not problems
        and (mask := item["segmentation"])
        and (box := item["bbox"])
        and not item["iscrowd"]
        and frame
    ):
        problems += _mask_problems(mask, box)
    return problems


def as_int(value: Any) -> int | None:
    """Convert an int, or a float without a fraction, to an integer of at most 64 bits; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return value
    return None


def as_numbers(value: Any) -> list[float] | None:
    """Convert a list of numbers to floats; None for anything else."""
    if not isinstance(value, list):
        return None
    try:
        return [float(x) for x in value] if all(type(x) in (int, float) for x in value) else None
    except OverflowError:  # an integer outside the range of float64
        return None


def read_segmentation(value: Any) -> Segmentation | None:
    """Read a segmentation as it is: polygons, compressed RLE or uncompressed RLE; None if it is none of these."""
    if isinstance(value, list):
        polygons = []
        for polygon in value:
            if (numbers := as_numbers(polygon)) is None:
                return None
            polygons.append(numbers)
        return {"polygons": polygons, "rle": None}
    if not isinstance(value, dict) or set(value) != {"size", "counts"}:
        return None
    size, counts = value["size"], value["counts"]
    if not _are_ints(size, 2**31) or len(size) != 2:
        return None
    if isinstance(counts, str) and counts.isascii():
        return {"polygons": None, "rle": {"size": size, "counts": counts.encode("ascii"), "runs": None}}
    if _are_ints(counts, 2**63):
        return {"polygons": None, "rle": {"size": size, "counts": None, "runs": counts}}
    return None


def rle_covers(rle: StoredRle) -> bool:
    """Whether the runs of an RLE from `read_segmentation` cover each pixel of its size exactly once."""
    return _rle_fault(rle) is None


def _box_faults(box: Sequence[float], frame: tuple[int, int] | None) -> list[Problem]:
    text = f"bbox {[round(value, 2) for value in box]}"
    if not all(map(math.isfinite, box)):
        return [("non-finite-box", text)]
    x, y, width, height = box
    if width < 0 or height < 0:
        return [("negative-box", text)]
    if width == 0 or height == 0:
        return [("empty-box", text)]
    if frame is None:
        return []
    text += f" in an image of {frame[1]} x {frame[0]}"
    # Clipped as in training: a box whose clipped width or height is 0 cannot be trained on.
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + width, frame[1]), min(y + height, frame[0])
    if left >= right or top >= bottom:
        return [("box-outside", text)]
    over = max(-x, -y, x + width - frame[1], y + height - frame[0])
    return [("box-over-edge", f"{text}, by {over:.2f}")] if over > EDGE_TOLERANCE else []


def _segmentation_fault(
    original: Any, segmentation: Segmentation | None, frame: tuple[int, int] | None
) -> str | None:
    """Explain why a segmentation is not a mask of its image; None if it is one or is absent."""
    if segmentation is None:
        return None if original is None else f"neither polygons nor RLE: {original!r:.80}"
    if (rle := segmentation["rle"]) is None:
        for number, polygon in enumerate(segmentation["polygons"] or ()):
            if len(polygon) < 6 or len(polygon) % 2:
                return f"polygon {number} has {len(polygon)} coordinates"
            if not all(map(math.isfinite, polygon)):
                return f"polygon {number} has NaN or infinite coordinates"
            if (largest := max(map(abs, polygon))) > LARGEST_COORDINATE:
                return f"polygon {number} has the coordinate {largest:g}"
        return None
    if frame is not None and rle["size"] != list(frame):
        reason = f"RLE of {rle['size']} in an image of {list(frame)}"
        if rle["size"] == list(frame)[::-1]:
            reason += ": size must be [height, width]; are they swapped?"
        return reason
    return _rle_fault(rle)


def _rle_fault(rle: StoredRle) -> str | None:
    try:
        runs = (rle["runs"] or []) if rle["counts"] is None else rle_runs(rle["counts"]).tolist()
    except ValueError as error:
        return f"RLE counts are damaged: {error}"
    if min(rle["size"]) < 1 or math.prod(rle["size"]) >= 2**31:
        return f"RLE of {rle['size']}"
    if min(runs, default=0) < 0 or sum(runs) != math.prod(rle["size"]):
        return f"RLE runs cover {sum(runs)} pixels of {math.prod(rle['size'])}"
    return None


def _are_ints(value: Any, limit: int) -> bool:
    return isinstance(value, list) and all(type(x) is int and -limit <= x < limit for x in value)


def _decode_fault(data: bytes) -> str:
    """Return the code of an image that cannot be decoded: damaged, or not convertible to RGB."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception:  # on damaged bytes Pillow's readers raise exceptions of any type
        return "unreadable-image"
    return "unconvertible-image"


def _mask_problems(segmentation: Segmentation, box: Sequence[float]) -> list[Problem]:
    """Report a mask whose bounding box has an IoU under 0.5 with the annotation's box."""
    if (rle := segmentation["rle"]) is None:
        polygons = segmentation["polygons"]
        if not polygons:
            return []
        xs, ys = [x for p in polygons for x in p[::2]], [y for p in polygons for y in p[1::2]]
        left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    else:
        original = {"size": rle["size"], "counts": rle["runs"] if rle["counts"] is None else rle["counts"]}
        left, top, w, h = box_of_rle(original, "an object")
        right, bottom = left + w, top + h
    x, y, w, h = box
    # A mask that is a line or a point has no area, so both boxes are enlarged by half a pixel on each side.
    overlap = max(min(right, x + w) - max(left, x) + 1, 0.0) * max(min(bottom, y + h) - max(top, y) + 1, 0.0)
    union = (right - left + 1) * (bottom - top + 1) + (w + 1) * (h + 1) - overlap
    if overlap >= 0.5 * union or (min(w, h) < 4 and overlap > 0):
        return []
    spans = [round(value, 1) for value in (left, top, right - left, bottom - top)]
    return [("mask-unlike-box", f"bbox {[round(value, 1) for value in box]}, but the mask spans {spans}")]


def _size_problems(claimed: tuple[int | None, int | None], size: tuple[int, int]) -> list[Problem]:
    """Compare the (height, width) of the JSON with the image. A side that is absent or 0 is not compared."""
    given = [(side, actual) for side, actual in zip(claimed, size, strict=True) if side]
    if any(side != actual for side, actual in given):
        text = (
            f"the JSON says {claimed[0]} x {claimed[1]}, the image is {size[0]} x {size[1]} (height x width)"
        )
        if claimed == size[::-1]:
            text += ": are they swapped in the JSON, or was the image rotated after it was annotated?"
        return [("size-mismatch", text)]
    if len(given) < 2 and claimed != (None, None):
        return [
            ("repaired-image", f"the JSON says {claimed[0]} x {claimed[1]}: the size of the image is used")
        ]
    return []


def _header_problems(container: Container, data: bytes, file_name: str) -> list[Problem]:
    """Report notable properties of an image's header."""
    problems: list[Problem] = []
    # container.data has no metadata, which Pillow could take minutes to read.
    with Image.open(io.BytesIO(container.data)) as image:
        expected = _EXTENSIONS.get(file_name.rpartition(".")[2].lower())
        if expected is not None and image.format not in expected:
            problems.append(("mislabelled-image", f"named {file_name}, but the format is {image.format}"))
        if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
            problems.append(("grey-image", f"mode {image.mode}"))
        if image.mode != "F" and (bits := _bits(image, data)) > 8:
            problems.append(("deep-image", f"{bits} bits per channel"))
        if image.mode in ("CMYK", "YCCK"):
            problems.append(("cmyk-image", f"mode {image.mode}"))
        if image.format in ("GIF", "PNG", "WEBP") and _is_animated(data):
            problems.append(("animated-image", "the first frame is used"))
    return problems


def _is_animated(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return bool(getattr(image, "is_animated", False))


def _bits(image: Image.Image, data: bytes) -> int:
    """Return the stored bits per channel. Pillow does not report them: it opens 16-bit color as 8-bit RGB."""
    if image.format == "PNG":
        return data[
            24
        ]  # bit depth: signature (8 bytes), length and name of IHDR (8), width and height (8) precede it
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(_TIFF_BITS, 1)
        return int(max(bits) if isinstance(bits, tuple) else bits)
    return 16 if image.mode.startswith("I") else 8
