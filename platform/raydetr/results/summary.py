"""Summaries of commands, which they print and write to `--json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raydetr.results.json_form import to_json


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
