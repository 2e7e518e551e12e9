"""Promotions: the moves of an alias, recorded on the versions concerned.

Who may be promoted is decided in `gate`; here the alias moves, through the `ledger`.
"""

import getpass
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raydetr.errors import RegistryError
from raydetr.promotion.gate import Candidate, Decision
from raydetr.promotion.ledger import DECISION_TAG, Entry, Ledger, now, text, undoable
from raydetr.registry.evaluations import evaluations_of
from raydetr.registry.models import DIGEST_TAG, find_version, registered_version
from raydetr.registry.tags import CHOSEN_ON_TAG, TRAINED_ON_TAG
from raydetr.registry.tracking import client, end_run, log_artifacts, registry_errors, set_tags


@dataclass(frozen=True)
class Promotion:
    """What a move did."""

    name: str
    alias: str
    previous: int | None
    """Version the alias pointed to; None where it did not exist."""
    version: int
    evaluations: Mapping[str, Mapping[str, Any]]
    """The version's evaluations: data digest → record."""
    number: int = 0
    """Of the alias's moves; 0: it was there already."""
    run_id: str = ""
    """MLflow run of the decision."""


def read_candidate(uri: str, address: str) -> Candidate:
    """What the gate needs to know of a registered version; its files stay where they are.

    Args:
        uri: MLflow address from `tracking.resolve_uri`.
        address: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        ConfigError: no address of this form.
        RegistryError: nothing there, or it is a folder.
    """
    version = registered_version(address, uri)
    return Candidate(
        name=version.name,
        version=int(version.version),
        digest=version.tags.get(DIGEST_TAG, ""),
        evaluations=evaluations_of(version.tags),
        trained_on=version.tags.get(TRAINED_ON_TAG, ""),
        chosen_on=version.tags.get(CHOSEN_ON_TAG, ""),
    )


def promote(uri: str, address: str, alias: str) -> Promotion:
    """Move an alias to a model version that has an evaluation on file, whatever the alias pointed to.

    Without a comparison: for a first version, a demonstration, a test. `evaluation.promotion.promote` asks the gate.

    Args:
        uri: MLflow address from `tracking.resolve_uri`.
        address: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        alias: to move, e.g. `champion`.

    Raises:
        RegistryError: not a registered model, nothing there, no evaluation on file, or the alias moved meanwhile.
    """
    model = read_candidate(uri, address)
    if not model.evaluations:
        raise RegistryError(
            f"{model.name} version {model.version} has no evaluation on file, so {alias!r} stays where it is: "
            f"run pipelines/evaluate.py --model models:/{model.name}/{model.version} first."
        )
    ledger = Ledger(uri, model.name, alias)
    number, previous = len(ledger.settle()) + 1, ledger.position()
    if previous == model.version:
        return Promotion(model.name, alias, previous, model.version, model.evaluations)
    decision = Decision(True, (), "moved without a comparison")
    run_id = open_decision(ledger, decision, previous, model.version)
    entry = Entry(number, "promotion", previous, model.version, run_id, now())
    if not move(ledger, entry, previous):
        end_run(uri, run_id, "KILLED")
        raise RegistryError(f"{model.name}@{alias} was moved by somebody else meanwhile: promote again.")
    return Promotion(model.name, alias, previous, model.version, model.evaluations, number, run_id)


def undo(uri: str, name: str, alias: str, note: str = "", dry_run: bool = False) -> Promotion:
    """Move an alias back to where it was before the last promotion that is not undone yet.

    Raises:
        RegistryError: there is no such promotion or it was the first, the alias was moved by other means since, the
            version before is gone, or another promotion came first.
    """
    with registry_errors(uri):
        find_version(client(uri), uri, name, alias=alias)
    ledger = Ledger(uri, name, alias)
    entries, position = ledger.settle(), ledger.position()
    last = undoable(entries)
    if last is None or last.previous is None:
        raise RegistryError(
            f"{name}@{alias}: there is nothing to undo: "
            + ("no promotion is left." if last is None else f"version {last.version} was the first one.")
        )
    if position != last.version:
        raise RegistryError(
            f"{name}@{alias} is version {position}, but the last promotion (number {last.number}) made it version "
            f"{last.version}: it was moved by other means, so set it in MLflow by hand."
        )
    before = read_candidate(uri, f"models:/{name}/{last.previous}")
    reason = f"promotion {last.number} undone" + (f" ({note})" if note else "")
    if dry_run:
        return Promotion(name, alias, position, before.version, before.evaluations)
    run_id = open_decision(ledger, Decision(True, (), reason), position, before.version)
    number = len(entries) + 1
    if not move(ledger, Entry(number, "undo", position, before.version, run_id, now()), position):
        end_run(uri, run_id, "KILLED")
        raise RegistryError(f"{name}@{alias} was moved by somebody else meanwhile: look, and undo again.")
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
    """Put a decision on record as an MLflow run, which goes on until the alias is moved by it, or `tracking.end_run`.

    Args:
        ledger: of the alias.
        decision: what was decided.
        previous: version behind the alias.
        version: the challenger.
        digest: of the data that judged.
        pages: folder of files for the run's artifacts; empty: none.
        run_id: of the run, where it is there already and what it says changes.
    """
    before = "none" if previous is None else str(previous)
    title = f"{ledger.name}@{ledger.alias}: {before} to {version}"
    tags = {"alias": ledger.alias, "old_version": before, "new_version": str(version), "data.digest": digest}
    run_id = run_id or ledger.begin_decision(title, tags)
    about = {
        "alias": ledger.alias,
        "old": previous,
        "new": version,
        "data": digest,
        "at": now(),
        "by": _who(),
        "page": f"runs:/{run_id}/comparison.html" if pages else None,
        **decision.to_dict(),
    }
    set_tags(ledger.uri, run_id, {DECISION_TAG: text(about), "promoted": str(decision.promoted)})
    if pages:
        log_artifacts(ledger.uri, run_id, pages)
    return run_id


def move(ledger: Ledger, entry: Entry, expected: int | None) -> bool:
    """Move the alias as an entry says, if it still is where it was expected; whether it was moved."""
    if ledger.position() != expected or not ledger.claim(entry):
        return False
    ledger.settle()
    return True


def keep_refusal(ledger: Ledger, run_id: str, old: int | None, new: int, digest: str) -> None:
    """Note a refusal on both versions; one of the same pair and data that was there is replaced."""
    with registry_errors(ledger.uri):
        decision = ledger.client.get_run(run_id).data.tags[DECISION_TAG]
        ledger.note(f"refused.{old}-{new}.{digest[:12] or 'none'}", decision, old, new)


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
