"""Texts of the evaluation reports: explanations of the metrics and kinds of errors, and number formats."""

from collections.abc import Sequence
from html import escape

from raydetr.results.record import EvaluatedModel, EvaluationData

BOX_METRICS: dict[str, tuple[str, str]] = {
    "AP": (
        "Average precision (AP)",
        "The main metric: how well objects are detected, classified and localized, averaged over all classes and over "
        "ten IoU thresholds from 0.50 to 0.95.",
    ),
    "AP50": (
        "AP at IoU 0.50",
        "AP with a low IoU threshold: are objects detected and classified correctly?",
    ),
    "AP75": ("AP at IoU 0.75", "AP with a high IoU threshold: are objects also localized precisely?"),
    "AP_small": ("AP of small objects", "Objects of less than 32 × 32 pixels."),
    "AP_medium": ("AP of medium objects", "Objects from 32 × 32 to 96 × 96 pixels."),
    "AP_large": ("AP of large objects", "Objects of more than 96 × 96 pixels."),
    "AR_1": (
        "Recall with 1 detection",
        "Share of objects found with at most one detection per class and image.",
    ),
    "AR_10": ("Recall with 10 detections", "With at most ten detections per class and image."),
    "AR_100": (
        "Recall with 100 detections",
        "With at most 100 detections per class and image. Objects that are missing here were not found at all.",
    ),
    "AR_small": ("Recall of small objects", "With 100 detections, of less than 32 × 32 pixels."),
    "AR_medium": ("Recall of medium objects", "With 100 detections, from 32 × 32 to 96 × 96 pixels."),
    "AR_large": ("Recall of large objects", "With 100 detections, of more than 96 × 96 pixels."),
}
"""COCO's name of a metric → title and explanation."""

PANOPTIC_METRICS: dict[str, tuple[str, str]] = {
    "PQ": (
        "Panoptic quality (PQ)",
        "How well the whole image is divided into segments of the right class: SQ times RQ.",
    ),
    "SQ": ("Segmentation quality (SQ)", "How well the outlines of matched segments fit."),
    "RQ": (
        "Recognition quality (RQ)",
        "How many segments were detected and classified correctly, without false positives.",
    ),
}

MASK_AP = "AP computed from the overlap of masks instead of boxes."

ERRORS: dict[str, tuple[str, str, str]] = {
    "missed": ("Missed", "an object that no detection matches", "missed objects"),
    "background": ("False positive", "a detection where there is no object", "false positives"),
    "classification": (
        "Misclassified",
        "the detection overlaps an object well, but its class is wrong",
        "misclassified objects",
    ),
    "localisation": (
        "Misplaced",
        "the class is right, but the overlap with the object is too small (IoU under 0.5)",
        "misplaced detections",
    ),
    "both": (
        "Misclassified and misplaced",
        "the detection is near an object, but class and overlap are wrong",
        "misclassified and misplaced detections",
    ),
    "duplicate": (
        "Duplicate",
        "an additional detection of an object that a better one matches",
        "duplicate detections",
    ),
}
"""Kind of error → title, explanation, and name in a sentence."""

IOU = (
    "<b>IoU</b> (intersection over union) is the area that two boxes share, divided by the area that they cover "
    "together: 1 for equal boxes, 0 for boxes without overlap."
)


def metric_text(name: str) -> tuple[str, str]:
    """Return the title and the explanation of a metric of boxes, masks or segments, both HTML."""
    for texts in (BOX_METRICS, PANOPTIC_METRICS):
        if name in texts:
            return texts[name]
    if name.removeprefix("mask_") in BOX_METRICS:
        return (
            f"{BOX_METRICS[name.removeprefix('mask_')][0]}, masks",
            MASK_AP if name == "mask_AP" else "Of masks.",
        )
    short, _, group = name.partition("_")
    if short in PANOPTIC_METRICS and group in ("things", "stuff"):
        return f"{short} of {group}", PANOPTIC_METRICS[short][1]
    return escape(name), ""


def number(value: float | None, digits: int = 3) -> str:
    """Format a metric in 0..1; a dash if it is missing or -1, that is, without ground truth."""
    return "–" if value is None or value < 0 else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """Format a difference with its sign, using the typographic minus."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """Format as `0.41 (0.38 to 0.44)`, with the digits that the width of the interval justifies."""
    if value is None or value < 0 or interval is None:
        return number(value)
    low, high = interval
    digits = 2 if high - low >= 0.02 else 3
    return f"{value:.{digits}f} ({max(low, 0):.{digits}f} to {high:.{digits}f})"


def percent(value: float) -> str:
    """Format a share as `41 %`. Only an exact 0 or 1 becomes `0 %` or `100 %`."""
    rounded = round(100 * value)
    if rounded in (0, 100) and rounded != 100 * value:
        return "under 1 %" if rounded == 0 else "over 99 %"
    return f"{rounded} %"


def plural(count: int, name: str, more: str = "") -> str:
    """Format a count with its noun: `1 image`, `2 images`, `1,200 classes`."""
    return f"{count:,} {name if count == 1 else more or name + 's'}"


def model_name(model: EvaluatedModel) -> str:
    """Return the name and version of a registered model, or the last part of another model's URI; HTML."""
    if model.version is not None:
        return escape(f"{model.name} version {model.version}")
    return escape(_last(model.uri or "a model"))


def data_name(data: EvaluationData) -> str:
    """Return the last part of a data set's URI; HTML."""
    return escape(_last(data.uri or "a data set"))


def _last(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1] or uri
