"""The analysis of predictions on a data set, as stored in analysis.json.

Metrics are in 0..1, or -1 if the ground truth has nothing to score. Files of earlier versions may lack the parts that
have a default.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from raydetr.results.json_form import FLAT


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of a category."""

    id: int
    """Category id."""
    name: str
    objects: int
    """Objects in the ground truth, without crowds."""
    images: int
    """Images with objects of the class."""
    metrics: Mapping[str, float] = field(metadata=FLAT)
    """`AP`, `AP50`, …, with masks `mask_AP` and `mask_AP50`, with segments `PQ`, `SQ` and `RQ`."""
    isthing: bool = True
    best_threshold: float | None = None
    """Score threshold with the best F1 at IoU 0.5; -1: none."""
    best_f1: float | None = None


@dataclass(frozen=True)
class Curves:
    """Precision over recall of boxes; a precision is -1 if it is missing."""

    recall: tuple[float, ...]
    """Recall of each point, 0..1, ascending."""
    overall: Mapping[str, tuple[float, ...]] = field(metadata={"key": "all"})
    """IoU threshold `0.50` or `0.75`, or `mean` of all thresholds → mean precision of the classes."""
    classes: Mapping[int, tuple[float, ...]]
    """Category id → precision at IoU 0.5, for categories that have objects."""


@dataclass(frozen=True)
class Confusion:
    """Confusion matrix of objects and detections that are matched regardless of their class."""

    names: tuple[str, ...]
    """Names of the classes, then `background`."""
    counts: tuple[tuple[int, ...], ...]
    """[ground-truth class][predicted class]."""
    iou: float
    """Minimum IoU of a match."""
    min_score: float
    """Minimum score of a detection."""


@dataclass(frozen=True)
class CalibrationBin:
    """Detections whose score is in a range."""

    low: float
    high: float
    confidence: float
    """Mean score."""
    accuracy: float
    """Share of the detections that match an object at IoU 0.5."""
    count: int


@dataclass(frozen=True)
class Calibration:
    """How well scores agree with the share of correct detections."""

    ece: float
    """Expected calibration error."""
    mce: float
    """Maximum calibration error."""
    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True)
class ErrorBreakdown:
    """Errors by kind; see `evaluation.errors_by_kind`."""

    counts: Mapping[str, int]
    costs: Mapping[str, float] = field(metadata={"key": "cost"})
    """Kind → how much higher `ap50` would be without its errors."""
    ap50: float = field(metadata={"key": "AP50"})
    """AP50 of the detections with at least `min_score`."""
    min_score: float
    """Minimum score of the detections."""


@dataclass(frozen=True)
class SliceMetrics:
    """Metrics of boxes of the images in a slice."""

    name: str
    images: int
    objects: int
    ap: float = field(metadata={"key": "AP"})
    ap50: float = field(metadata={"key": "AP50"})


@dataclass(frozen=True)
class Analysis:
    """Metrics of predictions, their confidence intervals, and the error breakdown."""

    metrics: Mapping[str, float] = field(metadata={"key": "figures"})
    """`AP`, … (`METRIC_NAMES`), with masks `mask_AP`, …, with segments `PQ`, `SQ`, `RQ`, `PQ_things`, …"""
    images: int
    undecodable: int = 0
    """Number of images that cannot be decoded. Their objects count as missed."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """`AP`, `AP50`, `AP75`, `mask_AP`, `PQ` → ends of the confidence interval."""
    confidence: float = 0.95
    """Level of the intervals."""
    resamples: int = 0
    """Number of bootstrap resamples of the images."""
    classes: tuple[ClassMetrics, ...] = ()
    """Categories, ascending by id."""
    curves: Curves | None = None
    confusion: Confusion | None = None
    calibration: Calibration | None = None
    """Calibration of all detections."""
    errors: ErrorBreakdown | None = None
    duplicates: float | None = None
    """Second detections with a score of at least 0.5 as a share of the objects."""
    slices: Mapping[str, tuple[SliceMetrics, ...]] = field(default_factory=dict)
    """Criterion → its slices."""
    worst: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Kind of error → ids of the images with the most of it, worst first."""
