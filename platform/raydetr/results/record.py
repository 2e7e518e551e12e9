"""The record of an evaluation, as stored in metrics.json and in a tag of the model version."""

from collections.abc import Mapping
from dataclasses import dataclass, field

SettingValue = str | int | float | bool


@dataclass(frozen=True)
class EvaluatedModel:
    """The model of an evaluation."""

    name: str | None
    """Registered name; None for a folder."""
    version: int | None
    """Registered version; None for a folder."""
    uri: str = field(default="", metadata={"key": "address"})
    """Model URI; see `registry.models.ResolvedModel`."""
    digest: str = ""
    """sha256 over the model's files; empty: not recorded."""


@dataclass(frozen=True)
class EvaluationData:
    """The data set of an evaluation."""

    uri: str = field(default="", metadata={"key": "address"})
    """URI of the shards; empty: not recorded."""
    digest: str = ""
    """Digest of the manifest."""


@dataclass(frozen=True)
class EvaluationRecord:
    """What is known about an evaluation. Records of earlier versions lack some of the fields."""

    metrics: Mapping[str, float] = field(default_factory=dict, metadata={"key": "figures"})
    """Name → value in 0..1; -1 if the data set has nothing to score."""
    images: int = 0
    settings: Mapping[str, SettingValue] = field(default_factory=dict)
    """Everything that the metrics depend on in addition to the model and the data."""
    model: EvaluatedModel = EvaluatedModel(None, None)
    data: EvaluationData = EvaluationData()
    key: str = ""
    """Digest that identifies the model, the data and the settings."""
    schema_version: int | None = None
    num_undecodable: int | None = None
    """Number of images that cannot be decoded."""
    undecodable: Mapping[int, str] = field(default_factory=dict)
    """Image id → reason, for some of these images."""
    predictions: str = ""
    """URI of the predictions."""
    analysis: str = ""
    """URI of the analysis."""
    report: str = ""
    """URI of the report; empty: none."""
    padding_share: float | None = None
    """Share of padding in the pixels of the model's input."""
    run_id: str | None = None
    """MLflow run of the evaluation."""
    date: str | None = None
    """Day of the evaluation, ISO 8601."""
