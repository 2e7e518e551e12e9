"""Promotions: alias moves through the `ledger`, recorded in MLflow and on the versions.

The `gate` decides whether a version may be promoted.
"""

import getpass
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from raydetr.errors import RegistryError
from raydetr.promotion.gate import Candidate
from raydetr.promotion.ledger import DECISION_TAG, Entry, Ledger, last_undoable, to_tag, utc_now
from raydetr.registry.evaluations import evaluations_of
from raydetr.registry.models import DIGEST_TAG, find_version, registered_version
from raydetr.registry.tags import CHOSEN_ON_TAG, TRAINED_ON_TAG
from raydetr.registry.tracking import client, end_run, log_artifacts, registry_errors, set_tags
from raydetr.results.decision import Decision, DecisionRecord
from raydetr.results.record import EvaluationRecord


@dataclass(frozen=True)
class Promotion:
    """Result of a promotion or an undo."""

    name: str
    alias: str
    previous: int | None
    """Version that the alias pointed to; None if it did not exist."""
    version: int
    evaluations: Mapping[str, EvaluationRecord]
    """The version's evaluations: data digest → record."""
    number: int = 0
    """Number of the entry in the ledger; 0: the alias did not move."""
    run_id: str = ""
    """MLflow run of the decision."""


def read_candidate(uri: str, model_uri: str) -> Candidate:
    """Read what the gate needs to know about a registered version, without downloading its files.

    Args:
        uri: MLflow URI from `tracking.resolve_uri`.
        model_uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        ConfigError: the model URI does not have one of these forms.
        RegistryError: the version does not exist, or the URI is that of a folder.
    """
    version = registered_version(model_uri, uri)
    return Candidate(
        name=version.name,
        version=version.version,
        digest=version.tags.get(DIGEST_TAG, ""),
        evaluations=evaluations_of(version.tags),
        trained_on=version.tags.get(TRAINED_ON_TAG, ""),
        chosen_on=version.tags.get(CHOSEN_ON_TAG, ""),
    )


def undo(uri: str, name: str, alias: str, note: str = "", dry_run: bool = False) -> Promotion:
    """Move an alias back to the version before the last promotion that has not been undone.

    Args:
        uri: MLflow URI from `tracking.resolve_uri`.
        name: registered model.
        alias: alias to move.
        note: remark of the user, stored with the decision.
        dry_run: check, but change nothing.

    Raises:
        RegistryError: there is no such promotion or it was the first one, the alias was moved outside the ledger, the
            previous version was deleted, or a concurrent promotion moved the alias.
    """
    with registry_errors(uri):
        find_version(client(uri), uri, name, alias=alias)
    ledger = Ledger(uri, name, alias)
    entries, position = ledger.settle(), ledger.position()
    last = last_undoable(entries)
    if last is None or last.previous is None:
        raise RegistryError(
            f"{name}@{alias}: there is nothing to undo: "
            + ("no promotion is left." if last is None else f"version {last.version} was the first one.")
        )
    if position != last.version:
        raise RegistryError(
            f"{name}@{alias} is version {position}, but the last promotion (number {last.number}) moved it to version "
            f"{last.version}. It was moved outside the ledger: set the alias in MLflow by hand."
        )
    before = read_candidate(uri, f"models:/{name}/{last.previous}")
    reason = f"promotion {last.number} undone" + (f" ({note})" if note else "")
    if dry_run:
        return Promotion(name, alias, position, before.version, before.evaluations)
    run_id = open_decision(ledger, Decision(True, (), reason), position, before.version)
    number = len(entries) + 1
    if not move(ledger, Entry(number, "undo", position, before.version, run_id, utc_now()), position):
        end_run(uri, run_id, "KILLED")
        raise RegistryError(
            f"{name}@{alias} was moved by another process meanwhile: check the alias, and undo again if necessary."
        )
    return Promotion(name, alias, position, before.version, before.evaluations, number, run_id)


def open_decision(
    ledger: Ledger,
    decision: Decision,
    previous: int | None,
    version: int,
    digest: str = "",
    pages: str = "",
    run_id: str = "",
) -> str:
    """Record a decision in an MLflow run. `Ledger.settle` or `tracking.end_run` finishes the run.

    Args:
        ledger: ledger of the alias.
        decision: the decision.
        previous: version that the alias points to.
        version: the challenger.
        digest: digest of the evaluation data.
        pages: folder whose files become artifacts of the run; empty: none.
        run_id: existing run to update; empty: start a new one.

    Returns:
        The id of the run.
    """
    before = "none" if previous is None else str(previous)
    title = f"{ledger.name}@{ledger.alias}: {before} to {version}"
    tags = {"alias": ledger.alias, "old_version": before, "new_version": str(version), "data.digest": digest}
    run_id = run_id or ledger.start_decision(title, tags)
    record = DecisionRecord(
        alias=ledger.alias,
        old=previous,
        new=version,
        data=digest,
        at=utc_now(),
        by=_user_and_host(),
        page=f"runs:/{run_id}/comparison.html" if pages else None,
        decision=decision,
    )
    set_tags(ledger.uri, run_id, {DECISION_TAG: to_tag(record), "promoted": str(decision.promoted)})
    if pages:
        log_artifacts(ledger.uri, run_id, pages)
    return run_id


def move(ledger: Ledger, entry: Entry, expected: int | None) -> bool:
    """Append an entry and move the alias, if it still points to the expected version; return whether it was moved."""
    if ledger.position() != expected or not ledger.claim(entry):
        return False
    ledger.settle()
    return True


def record_refusal(ledger: Ledger, run_id: str, old: int | None, new: int, digest: str) -> None:
    """Store a refusal as a tag of both versions; it replaces an earlier refusal of the same versions and data."""
    with registry_errors(ledger.uri):
        decision = ledger.client.get_run(run_id).data.tags[DECISION_TAG]
        ledger.note(f"refused.{old}-{new}.{digest[:12] or 'none'}", decision, old, new)


def _user_and_host() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container, the user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
