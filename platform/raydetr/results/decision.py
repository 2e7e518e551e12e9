"""The decision of the gate on a promotion, and its record in MLflow."""

from dataclasses import dataclass, field

from raydetr.results.json_form import FLAT


@dataclass(frozen=True)
class Rule:
    """Result of one rule: its name, whether it passed, what was found, and what is required (`limit`)."""

    rule: str
    passed: bool
    found: str
    limit: str


@dataclass(frozen=True)
class Decision:
    """Whether the alias moves, and why."""

    promoted: bool
    rules: tuple[Rule, ...]
    reason: str


@dataclass(frozen=True)
class DecisionRecord:
    """A decision as stored in MLflow: a tag of its run, which is copied to both versions."""

    alias: str
    old: int | None
    """Version that the alias pointed to; None if it did not exist."""
    new: int
    """The challenger."""
    data: str
    """Digest of the evaluation data; empty: none."""
    at: str
    """Time in UTC."""
    by: str
    """User and host."""
    page: str | None
    """URI of the comparison page; None: none."""
    decision: Decision = field(metadata=FLAT)
