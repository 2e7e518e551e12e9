"""Summaries of commands, which they print and write to `--json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raydetr.results.comparison import Change
from raydetr.results.decision import Rule
from raydetr.results.json_form import FLAT, to_json


@dataclass(frozen=True)
class EvaluationSummary:
    """Summary of an evaluation."""

    model: str
    """Model URI."""
    data: str
    """URI of the shards."""
    data_digest: str
    task: str
    images: int
    undecodable: int
    padding_share: float
    """Share of padding in the pixels of the model's input."""
    metrics: Mapping[str, float] = field(metadata={"key": "figures"})
    """Name → value in 0..1; -1 if the data set has nothing to score."""
    run_id: str
    """MLflow run."""
    predictions: str
    report: str
    output: str
    already_scored: bool
    """Whether the record of an earlier evaluation was used."""

    def to_output(self) -> dict[str, Any]:
        """Return what the command prints and writes to `--json`: each metric is also a key of its own."""
        content: dict[str, Any] = {}
        for key, value in to_json(self).items():
            content |= {**value, key: value} if key == "figures" else {key: value}
        return content


@dataclass(frozen=True)
class PromotionSummary:
    """Summary of a promotion or an undo."""

    model: str
    """Registered name."""
    alias: str
    from_version: int | Literal["none"]
    """Version that the alias pointed to; `none`: the alias did not exist."""
    version: int
    promoted: bool
    """Whether the gate decided to move the alias."""
    moved: bool
    """Whether the alias was moved; not in a dry run."""
    reason: str
    data_digest: str
    """Digest of the evaluation data; empty: none."""
    page: str
    """URI of the comparison page; empty: none."""
    run_id: str
    """MLflow run of the decision; empty: none."""
    rules: tuple[Rule, ...]
    metrics: Mapping[str, Change] = field(metadata={"key": "figures"})
    """Metrics of the comparison; empty without one."""
    evaluations: Mapping[str, Mapping[str, float]]
    """Data digest → metrics of the version."""


@dataclass(frozen=True)
class TrainingSummary:
    """Summary of a training run, which is also stored as summary.json in its output folder."""

    run_id: str
    """MLflow run."""
    steps: int
    model_step: int
    """Step of the checkpoint that became the model."""
    images: int
    """Number of images trained on; an image counts in each epoch."""
    non_finite: int
    """Number of steps skipped because of a non-finite loss or gradient."""
    skipped_images: int
    """Number of images that could not be decoded."""
    seconds: float
    """Duration of the last command of the run."""
    images_per_second: float
    first_loss: float | None
    """Mean of the first 20 losses; None if none of them is finite."""
    last_loss: float | None
    """Mean of the last 20 losses; None if none of them is finite."""
    data_digest: str
    """Digest of the training data."""
    model_folder: str
    validation: Mapping[str, float] = field(metadata=FLAT)
    """`val_AP`, … of the model's step; empty without validation."""
    model: str | None = None
    """URI of the registered version; None: not registered."""
    model_version: int | None = None
