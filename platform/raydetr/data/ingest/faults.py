"""What is wrong with one image or one annotation: pure checks, each fault as (code, reason).

The codes, and what they do, are in `schema.FAULTS`.
"""

import io
import math
from collections.abc import Mapping, Sequence
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

Orientation = Literal["auto", "apply", "ignore"]

Problem = tuple[str, str]
"""A fault's code and what was found."""

EDGE_TOLERANCE = 1.0
"""Pixels that a box may reach over the image's edge unreported: rounding in annotation tools."""

_TIFF_BITS = 0x0102

_ENDINGS = {
    **dict.fromkeys(("jpg", "jpeg", "jpe"), ("JPEG", "MPO")),
    **dict.fromkeys(("tif", "tiff"), ("TIFF",)),
    **dict.fromkeys(("png", "apng"), ("PNG",)),
    **{ending: (ending.upper(),) for ending in ("webp", "bmp", "gif")},
}
"""Ending of a file's name → formats, by Pillow's names, that may be in it."""


@dataclass(frozen=True)
class ImageFacts:
    """What an encoded image is."""

    height: int
    """Of the decoder's output; where it cannot be decoded, the header's or the JSON's, else 0."""
    width: int
    frame: tuple[int, int] | None
    """(height, width) that the boxes refer to: the JSON's, else the image's; None where neither is known."""
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
    """Decode an image, once, and compare it with what the JSON says.

    Args:
        data: the encoded image; None where there is no file.
        json_height: as the JSON says; None where it says nothing.
        json_width: likewise.
        file_name: whose ending promises a format.
        orientation: what becomes of an EXIF rotation. auto: applied where the JSON has the size of the image as it
            is displayed and not as it is stored, since that is what the annotator saw.
    """
    claimed = None
    if json_height is not None and json_width is not None and min(json_height, json_width) > 0:
        # Larger than any decoder's output: a mistake, and too large for the columns.
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
    found: list[Problem] = []
    if size[0] * size[1] > DEFAULT_MAX_PIXELS:
        text = f"{size[0]} x {size[1]} pixels; at most {DEFAULT_MAX_PIXELS:,} are decoded"
        return ImageFacts(*size, claimed or size, (("image-too-large", text),))
    image_bits = None
    exif, of_header = container.orientation, _header_problems(container, data, file_name)
    shown = size[::-1] if exif >= 5 else size
    turned = exif != 1 and (
        orientation == "apply" or (orientation == "auto" and claimed == shown and shown != size)
    )
    stored, size = size, shown if turned else size
    try:
        image_bits = image_hash(decode_image(container, orientation="apply" if turned else "ignore"))
    except ImageCostError as error:
        return ImageFacts(*size, claimed or size, (("image-too-large", str(error)),))
    except ImageError as error:
        found.append((_decode_fault(data), str(error)))
    found += _size_problems((json_height, json_width), size)
    if turned:
        text = f"EXIF orientation {exif}: {stored[0]} x {stored[1]} as stored, {size[0]} x {size[1]} upright"
        found.append(("repaired-orientation", text))
    elif exif != 1:
        found.append(("exif-orientation", f"EXIF orientation {exif}: --orientation apply turns it upright"))
    return ImageFacts(*size, claimed or size, (*found, *of_header), image_bits)


def object_faults(
    fields: Mapping[str, Any],
    item: Mapping[str, Any],
    frame: tuple[int, int] | None,
    category_ids: frozenset[int],
) -> list[Problem]:
    """What is wrong with an annotation by itself.

    Args:
        fields: the annotation as the JSON has it.
        item: the columns read from it; null where a field could not be read.
        frame: (height, width) that its box refers to; None leaves out what needs it.
        category_ids: ids of the data set's categories.
    """
    found: list[Problem] = []
    unreadable = [key for key in ("category_id", "bbox") if item[key] is None]
    unreadable += [key for key in ("iscrowd",) if item[key] is None and fields.get(key) is not None]
    if unreadable:
        what = ", ".join(f"{key} {fields[key]!r:.80}" if key in fields else f"no {key}" for key in unreadable)
        found.append(("malformed-annotation", what))
    if item["area"] is None and fields.get("area") is not None:
        found.append(("unreadable-area", f"area {fields['area']!r:.80}"))
    if item["bbox"] is not None:
        found += _box_faults(item["bbox"], frame)
    if item["category_id"] is not None and item["category_id"] not in category_ids:
        known = ", ".join(map(str, sorted(category_ids)[:10])) + (", …" if len(category_ids) > 10 else "")
        found.append(("unknown-category", f"category_id {item['category_id']}; categories has {known}"))
    if (reason := _segmentation_fault(fields.get("segmentation"), item["segmentation"], frame)) is not None:
        found.append(("bad-segmentation", reason))
    elif not found and item["segmentation"] and not item["iscrowd"] and frame is not None:
        found += _mask_problems(item["segmentation"], item["bbox"])
    return found


def as_int(value: Any) -> int | None:
    """An integer of 64 bits, also from a float without a fraction; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return value
    return None


def as_numbers(value: Any) -> list[float] | None:
    """A list of numbers as floats; None for anything else."""
    if not isinstance(value, list):
        return None
    try:
        return [float(x) for x in value] if all(type(x) in (int, float) for x in value) else None
    except OverflowError:  # an integer past the range of float64
        return None


def read_segmentation(value: Any) -> dict[str, Any] | None:
    """A segmentation in its original form: polygons, compressed or uncompressed RLE; None if it is none of them."""
    if isinstance(value, list):
        polygons = [as_numbers(polygon) for polygon in value]
        return None if None in polygons else {"polygons": polygons, "rle": None}
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


def rle_covers(rle: Mapping[str, Any]) -> bool:
    """Whether the runs of an RLE of `read_segmentation` cover the pixels of its size, each once."""
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
    # As training clips it: a box whose clipped width or height is zero has nothing to learn.
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + width, frame[1]), min(y + height, frame[0])
    if left >= right or top >= bottom:
        return [("box-outside", text)]
    over = max(-x, -y, x + width - frame[1], y + height - frame[0])
    return [("box-over-edge", f"{text}, by {over:.2f}")] if over > EDGE_TOLERANCE else []


def _segmentation_fault(
    original: Any, segmentation: Mapping[str, Any] | None, frame: tuple[int, int] | None
) -> str | None:
    """Why a segmentation is not a mask of its image; None when it is one, or is absent."""
    if segmentation is None:
        return None if original is None else f"neither polygons nor RLE: {original!r:.80}"
    if segmentation["polygons"] is not None:
        for number, polygon in enumerate(segmentation["polygons"]):
            if len(polygon) < 6 or len(polygon) % 2:
                return f"polygon {number} has {len(polygon)} coordinates"
            if not all(map(math.isfinite, polygon)):
                return f"polygon {number} has NaN or infinite coordinates"
            if (largest := max(map(abs, polygon))) > LARGEST_COORDINATE:
                return f"polygon {number} has the coordinate {largest:g}"
        return None
    rle = segmentation["rle"]
    if frame is not None and rle["size"] != list(frame):
        reason = f"RLE of {rle['size']} in an image of {list(frame)}"
        if rle["size"] == list(frame)[::-1]:
            reason += ": COCO's size is [height, width]; is it written as width, height?"
        return reason
    return _rle_fault(rle)


def _rle_fault(rle: Mapping[str, Any]) -> str | None:
    try:
        runs = rle["runs"] if rle["counts"] is None else rle_runs(rle["counts"]).tolist()
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
    """Of an image that is not decoded: damaged, or of pixels without a way to RGB."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception:  # Pillow's readers raise whatever damaged bytes lead to
        return "unreadable-image"
    return "unconvertible-image"


def _mask_problems(segmentation: Mapping[str, Any], box: Sequence[float]) -> list[Problem]:
    """Whether the box of a mask is elsewhere than the annotation's box: an intersection over union under a half."""
    if (polygons := segmentation["polygons"]) is not None:
        if not polygons:
            return []
        xs, ys = [x for p in polygons for x in p[::2]], [y for p in polygons for y in p[1::2]]
        left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    else:
        rle = segmentation["rle"]
        original = {"size": rle["size"], "counts": rle["runs"] if rle["counts"] is None else rle["counts"]}
        left, top, w, h = box_of_rle(original, "an object")
        right, bottom = left + w, top + h
    x, y, w, h = box
    # A line or a point as mask has no area of its own: both are taken half a pixel larger on each side.
    overlap = max(min(right, x + w) - max(left, x) + 1, 0.0) * max(min(bottom, y + h) - max(top, y) + 1, 0.0)
    union = (right - left + 1) * (bottom - top + 1) + (w + 1) * (h + 1) - overlap
    if overlap >= 0.5 * union or (min(w, h) < 4 and overlap > 0):
        return []
    spans = [round(value, 1) for value in (left, top, right - left, bottom - top)]
    return [("mask-unlike-box", f"bbox {[round(value, 1) for value in box]}, but the mask spans {spans}")]


def _size_problems(claimed: tuple[int | None, int | None], size: tuple[int, int]) -> list[Problem]:
    """Whether the (height, width) of the JSON is the image's; a side that is absent or 0 says nothing."""
    given = [(side, actual) for side, actual in zip(claimed, size, strict=True) if side]
    if any(side != actual for side, actual in given):
        text = (
            f"the JSON says {claimed[0]} x {claimed[1]}, the image is {size[0]} x {size[1]} (height x width)"
        )
        if claimed == size[::-1]:
            text += ": are they swapped in the JSON, or was the image turned after it was annotated?"
        return [("size-mismatch", text)]
    if len(given) < 2 and claimed != (None, None):
        return [("repaired-image", f"the JSON says {claimed[0]} x {claimed[1]}: the image's is used")]
    return []


def _header_problems(container: Container, data: bytes, file_name: str) -> list[Problem]:
    """What an image's header says that is worth reporting."""
    found: list[Problem] = []
    with Image.open(
        io.BytesIO(container.data)
    ) as image:  # without metadata, which Pillow may read for minutes
        promised = _ENDINGS.get(file_name.rpartition(".")[2].lower())
        if promised is not None and image.format not in promised:
            found.append(("mislabelled-image", f"named {file_name}, but in format {image.format}"))
        if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
            found.append(("grey-image", f"mode {image.mode}"))
        if image.mode != "F" and (bits := _bits(image, data)) > 8:
            found.append(("deep-image", f"{bits} bits a channel"))
        if image.mode in ("CMYK", "YCCK"):
            found.append(("cmyk-image", f"mode {image.mode}"))
        if image.format in ("GIF", "PNG", "WEBP") and _is_animated(data):
            found.append(("animated-image", "the first frame is used"))
    return found


def _is_animated(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return bool(getattr(image, "is_animated", False))


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits of a channel as they are stored: Pillow opens 16-bit colour as 8-bit RGB."""
    if image.format == "PNG":
        return data[24]  # after the signature: length and name of IHDR, width, height, bit depth
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(_TIFF_BITS, 1)
        return int(max(bits) if isinstance(bits, tuple) else bits)
    return 16 if image.mode.startswith("I") else 8
