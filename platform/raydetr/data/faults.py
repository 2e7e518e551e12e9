"""What is wrong with one image or one annotation: pure checks, each fault as (code, reason).

The codes, and what they do, are in `schema.FAULTS`.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from pycocotools import mask

from detr.image_processing.decode import (
    DEFAULT_MAX_PIXELS,
    ImageCostError,
    ImageError,
    decode_image,
    image_size,
)
from detr.image_processing.masks import LARGEST_COORDINATE
from raydetr.data.duplicates import image_hash

Problem = tuple[str, str]
"""A fault's code and what was found."""

EDGE_TOLERANCE = 1.0
"""Pixels that a box may reach over the image's edge unreported: rounding in annotation tools."""

_EXIF_ORIENTATION = 0x0112
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
    data: bytes | None, json_height: int | None, json_width: int | None, file_name: str = ""
) -> ImageFacts:
    """Decode an image, once, and compare it with what the JSON says.

    Args:
        data: the encoded image; None where there is no file.
        json_height: as the JSON says; None where it says nothing.
        json_width: likewise.
        file_name: whose ending promises a format.
    """
    claimed = None
    if json_height is not None and json_width is not None and min(json_height, json_width) > 0:
        # Larger than any decoder's output: a mistake, and too large for the columns.
        claimed = (json_height, json_width) if max(json_height, json_width) < 2**31 else None
    if data is None:
        return ImageFacts(*(claimed or (0, 0)), claimed, (("missing-file", "no such file"),))
    try:
        size = image_size(data)
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
    try:
        image_bits = image_hash(decode_image(data))
    except ImageCostError as error:
        return ImageFacts(*size, claimed or size, (("image-too-large", str(error)),))
    except ImageError as error:
        found.append((_decode_fault(data), str(error)))
    if (json_height, json_width) != (None, None) and (json_height, json_width) != size:
        text = (
            f"the JSON says {json_height} x {json_width}, the image is {size[0]} x {size[1]} (height x width)"
        )
        found.append(("size-mismatch", text))
    found += _header_problems(data, file_name)
    return ImageFacts(*size, claimed or size, tuple(found), image_bits)


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
    unreadable = [key for key in ("id", "category_id", "bbox") if item[key] is None]
    unreadable += [key for key in ("area", "iscrowd") if item[key] is None and fields.get(key) is not None]
    if unreadable:
        what = ", ".join(f"{key} {fields[key]!r:.80}" if key in fields else f"no {key}" for key in unreadable)
        found.append(("malformed-annotation", what))
    if item["bbox"] is not None:
        found += _box_faults(item["bbox"], frame)
    if item["category_id"] is not None and item["category_id"] not in category_ids:
        found.append(("unknown-category", f"category_id {item['category_id']}"))
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


def rle_runs(counts: bytes) -> list[int]:
    """The run lengths of a compressed RLE: COCO's variable-length code of differences (maskApi.c, rleFrString).

    Raises:
        ValueError: it does not end on a whole number or holds a character outside of the code.
    """
    runs: list[int] = []
    position = 0
    while position < len(counts):
        value = shift = 0
        more = True
        while more:
            if position == len(counts):
                raise ValueError("it ends within a number")
            digit = counts[position] - 48
            if not 0 <= digit < 64:
                raise ValueError(f"character {counts[position]} at {position}")
            value |= (digit & 31) << shift
            more = bool(digit & 32)
            position += 1
            shift += 5
        if digit & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs


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
        return f"RLE of {rle['size']} in an image of {list(frame)}"
    try:
        runs = rle["runs"] if rle["counts"] is None else rle_runs(rle["counts"])
    except ValueError as error:
        return f"RLE counts are damaged: {error}"
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
        height, width = rle["size"]
        counts = (
            rle["counts"]
            or mask.frPyObjects({"size": rle["size"], "counts": rle["runs"]}, height, width)["counts"]
        )
        left, top, w, h = mask.toBbox({"size": rle["size"], "counts": counts}).tolist()
        right, bottom = left + w, top + h
    x, y, w, h = box
    # A line or a point as mask has no area of its own: both are taken half a pixel larger on each side.
    overlap = max(min(right, x + w) - max(left, x) + 1, 0.0) * max(min(bottom, y + h) - max(top, y) + 1, 0.0)
    union = (right - left + 1) * (bottom - top + 1) + (w + 1) * (h + 1) - overlap
    if overlap >= 0.5 * union or (min(w, h) < 4 and overlap > 0):
        return []
    spans = [round(value, 1) for value in (left, top, right - left, bottom - top)]
    return [("mask-unlike-box", f"bbox {[round(value, 1) for value in box]}, but the mask spans {spans}")]


def _header_problems(data: bytes, file_name: str) -> list[Problem]:
    """What an image's header says that is worth reporting."""
    found: list[Problem] = []
    with Image.open(io.BytesIO(data)) as image:
        if (orientation := _orientation(image)) != 1:
            found.append(("exif-orientation", f"EXIF orientation {orientation}"))
        promised = _ENDINGS.get(file_name.rpartition(".")[2].lower())
        if promised is not None and image.format not in promised:
            found.append(("mislabelled-image", f"named {file_name}, but in format {image.format}"))
        if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
            found.append(("grey-image", f"mode {image.mode}"))
        if image.mode != "F" and (bits := _bits(image, data)) > 8:
            found.append(("deep-image", f"{bits} bits a channel"))
        if image.mode in ("CMYK", "YCCK"):
            found.append(("cmyk-image", f"mode {image.mode}"))
        if image.format in ("GIF", "PNG", "WEBP") and getattr(image, "is_animated", False):
            found.append(("animated-image", f"{getattr(image, 'n_frames', 2)} frames"))
    return found


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits of a channel as they are stored: Pillow opens 16-bit colour as 8-bit RGB."""
    if image.format == "PNG":
        return data[24]  # after the signature: length and name of IHDR, width, height, bit depth
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(_TIFF_BITS, 1)
        return int(max(bits) if isinstance(bits, tuple) else bits)
    return 16 if image.mode.startswith("I") else 8


def _orientation(image: Image.Image) -> int:
    # The base class's method: PNG's own decodes the whole image to look for EXIF after its pixels.
    try:
        orientation = Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing about orientation
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
