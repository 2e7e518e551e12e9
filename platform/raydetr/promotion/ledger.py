"""The history of an alias, and why two promotions at once cannot both win.

MLflow sets an alias unconditionally: of two that set it, the last wins and the first never knows. But it writes a
parameter of a run once (the primary key of its table): of two that write different values under one name, exactly one
succeeds, on SQLite as on a server. So the moves of an alias are numbered parameters of one run, the ledger. A
promotion reads the ledger first, decides, and then writes the entry after the last one it has read; where that is
taken, the alias moved meanwhile, and the promotion is refused.

Writing the entry is the deed. Moving the alias, noting it on the versions and ending the decision's run follow from it
(`settle`): whoever dies in between leaves an entry that is not settled, and the next promotion settles it before
anything else. So no crash blocks an alias or leaves it where the ledger does not say.

Which run is the ledger must be unique too: it is named by a tag of the experiment `promotion/<model>@<alias>`, written
with the experiment itself, whose name MLflow gives once. That experiment also has a run for each decision.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from raydetr.conditional import wins
from raydetr.errors import RegistryError
from raydetr.mlflow_names import require_alias
from raydetr.registry.tracking import artifact_location, client, registry_errors, start_run

LEDGERS = "promotion"
"""Experiment of the ledgers."""
DECISION_TAG = "decision"
"""Of a decision's run: the JSON that both versions get."""
PROMOTION_TAG = "promotion."
"""Beginning of the tags of versions: `promotion.<alias>.<number>`, or `….refused.…`."""
_LEDGER_TAG = "ledger"
_SETTLED_TAG = "settled."


@dataclass(frozen=True)
class Entry:
    """One move of an alias."""

    number: int
    """From 1 on, without gaps."""
    kind: Literal["promotion", "undo"]
    previous: int | None
    """Version that the alias pointed to; None: it did not exist."""
    version: int
    """Version that it points to since."""
    run_id: str
    """Of the decision; entries of one number differ in it."""
    at: str
    """Time, UTC."""


def experiment_name(name: str, alias: str) -> str:
    """Experiment of the decisions on an alias of a model."""
    return f"{LEDGERS}/{name}@{alias}"


def undoable(entries: Sequence[Entry]) -> Entry | None:
    """The last promotion that no undo has taken back; None where there is none."""
    standing: list[Entry] = []
    for entry in entries:
        if entry.kind == "promotion":
            standing.append(entry)
        elif standing:
            standing.pop()
    return standing[-1] if standing else None


class Ledger:
    """The ledger of one alias."""

    def __init__(self, uri: str, name: str, alias: str) -> None:
        """Find it, or begin it.

        Raises:
            ConfigError: no alias can have this name.
            RegistryError: MLflow refuses, or the ledger's run was deleted.
        """
        require_alias(alias, "--alias")
        self.uri, self.name, self.alias = uri, name, alias
        self.client = client(uri)
        self.experiment = experiment_name(name, alias)
        with registry_errors(uri):
            self.run_id = self._find() or self._begin()

    def entries(self) -> list[Entry]:
        """All moves, the first one first."""
        with registry_errors(self.uri):
            params = self.client.get_run(self.run_id).data.params
        return [Entry(number=int(key), **json.loads(params[key])) for key in sorted(params, key=int)]

    def position(self) -> int | None:
        """The version behind the alias now, None where it does not exist."""
        with registry_errors(self.uri):
            version = self.client.get_registered_model(self.name).aliases.get(self.alias)
        return None if version is None else int(version)

    def claim(self, entry: Entry) -> bool:
        """Write an entry; False where its number is taken by another one.

        Raises:
            RegistryError: MLflow does not answer, so that nobody knows; the same command finds out.
        """
        from mlflow.exceptions import MlflowException

        content = asdict(entry)
        number = content.pop("number")
        refusal: MlflowException | None = None

        def write() -> bool:
            nonlocal refusal
            try:
                self.client.log_param(self.run_id, f"{number:04d}", json.dumps(content))
            except MlflowException as error:  # taken, or the answer was lost
                refusal = error
            return refusal is None

        def read() -> Entry:
            written = {known.number: known for known in self.entries()}
            if number not in written:
                raise RegistryError(
                    f"MLflow at {self.uri}: {self.name}@{self.alias}: entry {number} of the ledger (run {self.run_id}) "
                    f"cannot be written: {refusal and refusal.message}"
                ) from refusal
            return written[number]

        return wins(write, read, entry)

    def settle(self) -> list[Entry]:
        """Make the alias and the versions' tags what the last entry says and end its decision's run, unless that was
        done; all entries."""
        written = None
        while True:
            entries = self.entries()
            if not entries:
                return entries
            last = entries[-1]
            mark = f"{_SETTLED_TAG}{last.number:04d}"
            with registry_errors(self.uri):
                ledger = self.client.get_run(self.run_id)
                if mark in ledger.data.tags and written in (None, last.number):
                    return entries
                with _unless_deleted():
                    self.client.set_registered_model_alias(self.name, self.alias, str(last.version))
                decision = self.client.get_run(last.run_id)
                noted = decision.data.tags.get(DECISION_TAG, "{}")
                self.note(f"{last.number:04d}", noted, last.previous, last.version)
                if decision.info.lifecycle_stage == "active":
                    self.client.set_terminated(last.run_id)
                self.client.set_tag(self.run_id, mark, "yes")
            # Once more: had this process slept before it set the alias, it overwrote that of a later entry.
            written = last.number

    def note(self, key: str, decision: str, *versions: int | None) -> None:
        """Keep a decision as a tag of versions; those that were deleted meanwhile are passed over."""
        for version in {each for each in versions if each is not None}:
            with _unless_deleted():
                self.client.set_model_version_tag(
                    self.name, str(version), f"{PROMOTION_TAG}{self.alias}.{key}", decision
                )

    def begin_decision(self, title: str, tags: Mapping[str, str]) -> str:
        """A run for a decision; its id."""
        return start_run(self.uri, self.experiment, title, {}, tags)

    def _find(self) -> str | None:
        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            return None
        run_id = found.tags.get(_LEDGER_TAG)
        if run_id is None or self.client.get_run(run_id).info.lifecycle_stage != "active":
            raise RegistryError(
                f"MLflow at {self.uri}: the experiment {self.experiment!r} has lost its ledger (run {run_id}): restore "
                "that run, or rename the experiment to begin a new history."
            )
        return str(run_id)

    def _begin(self) -> str:
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
            found = self._find()
            if found != run_id:  # another process was first
                self.client.delete_run(run_id)
            return str(found)
        return run_id


@contextlib.contextmanager
def _unless_deleted() -> Iterator[None]:
    """Pass over a version that is no longer there."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def now() -> str:
    """The time as entries have it: UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def text(decision: Mapping[str, Any]) -> str:
    """A decision as the value of a tag; what is too long for MLflow's 5000 characters loses its passed rules."""
    full = json.dumps(decision)
    if len(full) > 5000:
        full = json.dumps({**decision, "rules": [r for r in decision["rules"] if not r["passed"]]})
    return (
        full
        if len(full) <= 5000
        else json.dumps({**decision, "rules": [], "reason": decision["reason"][:2000]})
    )
