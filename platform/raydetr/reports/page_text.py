"""The words of the evaluation's pages: what each figure and each kind of error means, to somebody new to them."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

BOX_FIGURES: dict[str, tuple[str, str]] = {
    "AP": (
        "Average precision (AP)",
        "The main figure: how well objects are found, named and placed, averaged over all classes and over ten "
        "demands on the overlap, IoU 0.50 to 0.95.",
    ),
    "AP50": ("AP at IoU 0.50", "As AP, where half an overlap is enough: are objects found and named?"),
    "AP75": ("AP at IoU 0.75", "As AP, where the overlap must be tight: are they placed well, too?"),
    "AP_small": ("AP of small objects", "Objects of less than 32 × 32 pixels."),
    "AP_medium": ("AP of medium objects", "Objects from 32 × 32 to 96 × 96 pixels."),
    "AP_large": ("AP of large objects", "Objects of more than 96 × 96 pixels."),
    "AR_1": (
        "Recall with 1 detection",
        "Share of the objects that are found when one detection of each class counts in an image.",
    ),
    "AR_10": ("Recall with 10 detections", "The same with ten detections of each class."),
    "AR_100": (
        "Recall with 100 detections",
        "The same with a hundred: what is missing here was never found.",
    ),
    "AR_small": ("Recall of small objects", "With 100 detections, of less than 32 × 32 pixels."),
    "AR_medium": ("Recall of medium objects", "With 100 detections, from 32 × 32 to 96 × 96 pixels."),
    "AR_large": ("Recall of large objects", "With 100 detections, of more than 96 × 96 pixels."),
}
"""COCO's name of a figure → what people call it, and what it says."""

PANOPTIC_FIGURES: dict[str, tuple[str, str]] = {
    "PQ": (
        "Panoptic quality (PQ)",
        "How well the whole image is divided into segments with the right names: SQ times RQ.",
    ),
    "SQ": ("Segmentation quality (SQ)", "How well the outlines of the segments that were found fit."),
    "RQ": ("Recognition quality (RQ)", "How many segments were found and named, without inventing others."),
}

MASK_AP = "As AP, with the overlap of outlines (masks) in place of boxes."

ERRORS: dict[str, tuple[str, str, str]] = {
    "missed": ("Missed", "an object that no detection fits", "missed objects"),
    "background": ("Invented", "a detection where there is no object", "invented objects"),
    "classification": ("Wrong class", "well placed on an object, but named wrongly", "wrong classes"),
    "localisation": (
        "Badly placed",
        "named rightly, but the overlap with the object is too small (IoU under 0.5)",
        "badly placed detections",
    ),
    "both": (
        "Wrong class, badly placed",
        "near an object, but neither the name nor the place is right",
        "detections with neither the right class nor the right place",
    ),
    "duplicate": (
        "Found twice",
        "one more detection of an object that a better one has found",
        "objects that are found twice",
    ),
}
"""Kind of error → its name, what it is, and its name in a sentence."""

IOU = (
    "<b>IoU</b> is the area that two boxes share, divided by the area that they cover together: 1 is the same box, "
    "0 are boxes apart."
)


def figure_text(name: str) -> tuple[str, str]:
    """The title of a figure and what it says, HTML; also of those of masks and of things and stuff."""
    for texts in (BOX_FIGURES, PANOPTIC_FIGURES):
        if name in texts:
            return texts[name]
    if name.removeprefix("mask_") in BOX_FIGURES:
        return (
            f"{BOX_FIGURES[name.removeprefix('mask_')][0]}, masks",
            MASK_AP if name == "mask_AP" else "Of masks.",
        )
    short, _, group = name.partition("_")
    if short in PANOPTIC_FIGURES and group in ("things", "stuff"):
        return f"{short} of {group}", PANOPTIC_FIGURES[short][1]
    return escape(name), ""


def number(value: float | None, digits: int = 3) -> str:
    """A figure in 0..1; a dash where the truth has nothing of the kind (-1) or there is none."""
    return "–" if value is None or value < 0 else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """A difference with its sign, a proper minus."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """`0.41 (0.38 to 0.44)`, with as many digits as the interval can tell apart."""
    if value is None or value < 0 or interval is None:
        return number(value)
    low, high = interval
    digits = 2 if high - low >= 0.02 else 3
    return f"{value:.{digits}f} ({max(low, 0):.{digits}f} to {high:.{digits}f})"


def percent(value: float) -> str:
    """A share as `41 %`; what is not all and not nothing never reads so."""
    rounded = round(100 * value)
    if rounded in (0, 100) and rounded != 100 * value:
        return "under 1 %" if rounded == 0 else "over 99 %"
    return f"{rounded} %"


def plural(count: int, name: str, more: str = "") -> str:
    """`1 image`, `2 images`, `1,200 classes`."""
    return f"{count:,} {name if count == 1 else more or name + 's'}"


def model_name(model: Mapping[str, Any]) -> str:
    """A registered model by name and version, another one by the last part of its address; HTML."""
    if model.get("version") is not None:
        return escape(f"{model['name']} version {model['version']}")
    return escape(_last(str(model.get("address") or "a model")))


def data_name(data: Mapping[str, Any]) -> str:
    """The last part of a data set's address; HTML."""
    return escape(_last(str(data.get("address") or "a data set")))


def _last(address: str) -> str:
    return address.rstrip("/").rsplit("/", 1)[-1] or address
