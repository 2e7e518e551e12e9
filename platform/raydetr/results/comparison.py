"""The comparison of two models on one data set, from `promotion.compare`.

Metrics are in 0..1, or -1 if the ground truth has nothing to score.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from raydetr.results.json_form import FLAT


@dataclass(frozen=True)
class Change:
    """The change of a metric from the old to the new model."""

    old: float
    new: float
    delta: float
    low: float
    high: float
    """Ends of the confidence interval of `delta`."""
    probability_better: float | None = None
    """Share of the resamples with a delta above 0; None for a class."""

    @property
    def is_measured(self) -> bool:
        """Whether the ground truth has something to score."""
        return min(self.old, self.new) >= 0


@dataclass(frozen=True)
class ClassChange:
    """The change of a metric of one class."""

    id: int
    """Category id."""
    name: str
    objects: int
    """Objects of the metric: segments for `PQ`, objects with a mask for `mask_AP`."""
    change: Change = field(metadata=FLAT)


@dataclass(frozen=True)
class ChangedImages:
    """Image ids, the largest change first."""

    better: tuple[int, ...] = ()
    worse: tuple[int, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The comparison of two models."""

    metrics: Mapping[str, Change] = field(metadata={"key": "figures"})
    """`AP`, `AP50`, `AP75`, `mask_AP`, `PQ`, if both models have the metric."""
    classes: Mapping[str, tuple[ClassChange, ...]]
    """Each name in `metrics` → categories that have objects of the metric, ascending by id."""
    images: int
    """Number of images of the data set."""
    resamples: int
    """Number of bootstrap resamples of the images."""
    confidence: float
    """Level of the confidence intervals, e.g. 0.95."""
    deltas: Mapping[str, float] = field(default_factory=dict)
    """Every metric that both models have → new minus old; 0 if the ground truth has nothing to score."""
    changed: ChangedImages = ChangedImages()
