"""The ledger: the history of an alias, written with compare-and-set so that concurrent promotions cannot both succeed.

MLflow sets an alias unconditionally: of two concurrent writers, the last one wins and the first is not notified. But
MLflow writes a parameter of a run only once, because its name is in the primary key of the table. Of two processes that
write different values under one name, exactly one succeeds, on SQLite and on a server. So the moves of an alias are
numbered parameters of one run, the ledger. A promotion reads the ledger, decides, and appends the entry after the last
one that it has read. If that number is taken, another promotion has moved the alias meanwhile, and this one is refused.

Appending the entry is the commit point. The remaining steps follow from the entry (`settle`): moving the alias, tagging
the versions and finishing the decision's run. A process that dies in between leaves an unsettled entry, which the next
promotion settles first. So a crash neither blocks an alias nor leaves it at a version that contradicts the ledger.

The choice of the ledger's run must be unique too. The run's id is a tag of the experiment `promotion/<model>@<alias>`,
and MLflow creates an experiment of one name only once, together with its tags. The experiment also has one run per
decision.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from raydetr.conditional import wins
from raydetr.errors import RegistryError
from raydetr.mlflow_names import require_alias
from raydetr.registry.evaluations import TAG_LENGTH
from raydetr.registry.tracking import artifact_location, client, registry_errors, start_run
from raydetr.results.decision import DecisionRecord
from raydetr.results.json_form import from_json, to_json

LEDGERS = "promotion"
"""Experiment that contains the ledgers."""
DECISION_TAG = "decision"
"""Tag of a decision's run: the decision as JSON, which is copied to both versions."""
PROMOTION_TAG = "promotion."
"""Prefix of the tags of versions: `promotion.<alias>.<number>`, or `promotion.<alias>.refused.…`."""
_LEDGER_TAG = "ledger"
_SETTLED_TAG = "settled."


@dataclass(frozen=True)
class Entry:
    """One move of an alias."""

    number: int
    """1, 2, … without gaps."""
    kind: Literal["promotion", "undo"]
    previous: int | None
    """Version that the alias pointed to; None if it did not exist."""
    version: int
    """Version that the alias points to after the move."""
    run_id: str
    """Run of the decision, which distinguishes competing entries of one number."""
    at: str
    """Time in UTC."""


def experiment_name(name: str, alias: str) -> str:
    """Return the name of the experiment for the decisions on an alias of a model."""
    return f"{LEDGERS}/{name}@{alias}"


def last_undoable(entries: Sequence[Entry]) -> Entry | None:
    """Return the last promotion that has not been undone; None if there is none."""
    effective: list[Entry] = []
    for entry in entries:
        if entry.kind == "promotion":
            effective.append(entry)
        elif effective:
            effective.pop()
    return effective[-1] if effective else None


class Ledger:
    """The ledger of one alias."""

    def __init__(self, uri: str, name: str, alias: str) -> None:
        """Find the ledger, or create it.

        Raises:
            ConfigError: the alias is not valid in MLflow.
            RegistryError: MLflow returns an error, or the ledger's run was deleted.
        """
        require_alias(alias, "--alias")
        self.uri, self.name, self.alias = uri, name, alias
        self.client = client(uri)
        self.experiment = experiment_name(name, alias)
        with registry_errors(uri):
            self.run_id = self._find() or self._create()

    def entries(self) -> list[Entry]:
        """Read all moves of the alias, ascending by number."""
        with registry_errors(self.uri):
            params = self.client.get_run(self.run_id).data.params
        return [
            from_json(Entry, {**json.loads(params[key]), "number": int(key)})
            for key in sorted(params, key=int)
        ]

    def position(self) -> int | None:
        """Return the version that the alias points to now; None if the alias does not exist."""
        with registry_errors(self.uri):
            version = self.client.get_registered_model(self.name).aliases.get(self.alias)
        return None if version is None else int(version)

    def claim(self, entry: Entry) -> bool:
        """Append an entry; return False if another entry already has its number.

        Raises:
            RegistryError: MLflow does not respond, so the outcome is unknown. Rerun the command to find out.
        """
        from mlflow.exceptions import MlflowException

        content = to_json(entry)
        number = content.pop("number")
        refusal: MlflowException | None = None

        def write() -> bool:
            nonlocal refusal
            try:
                self.client.log_param(self.run_id, f"{number:04d}", json.dumps(content))
            except MlflowException as error:  # the number is taken, or the response was lost
                refusal = error
            return refusal is None

        def read() -> Entry:
            written = {each.number: each for each in self.entries()}
            if number not in written:
                raise RegistryError(
                    f"MLflow at {self.uri}: {self.name}@{self.alias}: entry {number} of the ledger (run {self.run_id}) "
                    f"cannot be written: {refusal and refusal.message}"
                ) from refusal
            return written[number]

        return wins(write, read, entry)

    def settle(self) -> list[Entry]:
        """Complete the last entry, if that is not done yet, and return all entries.

        This moves the alias, tags both versions and finishes the decision's run. Each step is idempotent, so any
        process may repeat them.
        """
        settled = None
        while True:
            entries = self.entries()
            if not entries:
                return entries
            last = entries[-1]
            mark = f"{_SETTLED_TAG}{last.number:04d}"
            with registry_errors(self.uri):
                ledger = self.client.get_run(self.run_id)
                if mark in ledger.data.tags and settled in (None, last.number):
                    return entries
                with _unless_deleted():
                    self.client.set_registered_model_alias(self.name, self.alias, str(last.version))
                decision = self.client.get_run(last.run_id)
                content = decision.data.tags.get(DECISION_TAG, "{}")
                self.note(f"{last.number:04d}", content, last.previous, last.version)
                if decision.info.lifecycle_stage == "active":
                    self.client.set_terminated(last.run_id)
                self.client.set_tag(self.run_id, mark, "yes")
            # Check again: if this process was suspended before it set the alias, another one may have settled a later
            # entry meanwhile, whose alias was then overwritten here. Setting it again repairs that.
            settled = last.number

    def note(self, key: str, decision: str, *versions: int | None) -> None:
        """Store a decision as a tag of the versions; skip versions that were deleted meanwhile."""
        for version in {each for each in versions if each is not None}:
            with _unless_deleted():
                self.client.set_model_version_tag(
                    self.name, str(version), f"{PROMOTION_TAG}{self.alias}.{key}", decision
                )

    def start_decision(self, title: str, tags: Mapping[str, str]) -> str:
        """Start the run of a decision and return its id."""
        return start_run(self.uri, self.experiment, title, {}, tags)

    def _find(self) -> str | None:
        """Return the id of the ledger's run; None if the ledger does not exist yet."""
        experiment = self.client.get_experiment_by_name(self.experiment)
        if experiment is None:
            return None
        run_id = experiment.tags.get(_LEDGER_TAG)
        if run_id is None or self.client.get_run(run_id).info.lifecycle_stage != "active":
            raise RegistryError(
                f"MLflow at {self.uri}: the ledger of the experiment {self.experiment!r} was deleted (run {run_id}): "
                "restore that run, or rename the experiment to start a new history."
            )
        return str(run_id)

    def _create(self) -> str:
        """Create the ledger's run and its experiment; if another process created them first, return its run."""
        from mlflow.exceptions import MlflowException

        title = f"ledger of {self.name}@{self.alias}"
        run_id = start_run(self.uri, LEDGERS, title, {}, {})
        self.client.set_terminated(run_id)
        try:
            self.client.create_experiment(
                self.experiment, artifact_location(self.uri, self.experiment), {_LEDGER_TAG: run_id}
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            existing = self._find()
            if existing != run_id:  # another process was first
                self.client.delete_run(run_id)
            return str(existing)
        return run_id


@contextlib.contextmanager
def _unless_deleted() -> Iterator[None]:
    """Ignore the error that a version no longer exists."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def utc_now() -> str:
    """Return the current UTC time in the format of entries, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def to_tag(record: DecisionRecord) -> str:
    """Convert a decision to JSON that fits in a tag of `TAG_LENGTH` characters.

    A decision that is too long loses its passed rules; if it is still too long, it loses all rules and the end of its
    reason.
    """
    decision = record.decision
    failed = tuple(rule for rule in decision.rules if not rule.passed)
    shorter = replace(decision, rules=failed), replace(decision, rules=(), reason=decision.reason[:2000])
    tag = json.dumps(to_json(record))
    for each in shorter:
        if len(tag) > TAG_LENGTH:
            tag = json.dumps(to_json(replace(record, decision=each)))
    return tag
