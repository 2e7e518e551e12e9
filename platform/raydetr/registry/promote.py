"""Evaluations on file, and what they lead to: the moves of an alias, kept on the versions concerned.

An evaluation is on file when the model version carries the tag `evaluation.<data digest>`, whose value is the
JSON of its record: `{"figures": {...}, "settings": {...}, "images": n, "run_id": "..."}`. Its report lies in the
version's directory as `reports/<first 12 digits>.html`, and the tag `report.<first 12 digits>` is its address.

Who may be promoted is decided in `gate`; here the alias moves, through the `ledger`.
"""

import getpass
import json
import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raydetr import storage
from raydetr.errors import RegistryError, StorageError
from raydetr.registry import gate
from raydetr.registry.gate import Contender, Decision
from raydetr.registry.ledger import DECISION_TAG, Entry, Ledger, now, text, undoable
from raydetr.registry.models import DIGEST_TAG, MODEL_ID_TAG, ResolvedModel, find_version, registered_version
from raydetr.registry.tracking import client, end_run, log_artifacts, registry_errors, set_tags

EVALUATION_TAG = "evaluation."
REPORT_TAG = "report."
REPORTS = "reports"
"""Folder of a version's directory."""
TAG_LENGTH = 5000
"""Longest value of a tag of a version in MLflow's database."""


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


def put_evaluation(model: ResolvedModel, data_digest: str, record: Mapping[str, Any]) -> None:
    """Put an evaluation of a registered version on file, with its report.

    Args:
        model: of a registered version.
        data_digest: digest of the manifest that was scored.
        record: JSON-able; one on file for this digest is replaced.

    Raises:
        RegistryError: the record is too long for MLflow, or MLflow refuses.
    """
    value = _as_tag(record)
    if len(value) > TAG_LENGTH:
        sizes = {key: len(json.dumps(part)) for key, part in record.items()}
        longest = max(sizes, key=lambda key: sizes[key])
        raise RegistryError(
            f"The evaluation of {model.address} on {data_digest[:12]} has {len(value)} characters as JSON, and MLflow "
            f"keeps {TAG_LENGTH} in a tag: shorten {longest!r}, which has {sizes[longest]}."
        )
    mlflow_client = client(model.uri)
    tags = {EVALUATION_TAG + data_digest: value}
    with registry_errors(model.uri):
        if report := record.get("report"):
            _keep_report(model, data_digest, str(report))
            tags[f"{REPORT_TAG}{data_digest[:12]}"] = str(report)
        for key, content in reversed(tags.items()):  # the evaluation last: where it is, the report is
            mlflow_client.set_model_version_tag(str(model.name), str(model.version), key, content)


def evaluation_room(record: Mapping[str, Any]) -> int:
    """Characters that an evaluation leaves of a tag's length; negative: it does not fit."""
    return TAG_LENGTH - len(_as_tag(record))


def _as_tag(record: Mapping[str, Any]) -> str:
    """A record as JSON, with as many of its undecodable images as fit: the predictions have them all."""
    named = dict(record.get("undecodable") or {})
    while len(value := json.dumps({**record, "undecodable": named}, sort_keys=True)) > TAG_LENGTH and named:
        named.popitem()
    return value if "undecodable" in record else json.dumps(record, sort_keys=True)


def evaluations(model: ResolvedModel) -> dict[str, dict[str, Any]]:
    """Evaluations on file of a registered version, data digest → record; none for a folder."""
    if model.version is None:
        return {}
    mlflow_client = client(model.uri)
    with registry_errors(model.uri):
        version = find_version(mlflow_client, model.uri, str(model.name), version=str(model.version))
    return _evaluations(version.tags)


def contender(uri: str, address: str) -> Contender:
    """What the gate needs to know of a registered version; its files stay where they are.

    Args:
        uri: MLflow address from `tracking.resolve_uri`.
        address: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Raises:
        ConfigError: no address of this form.
        RegistryError: nothing there, or it is a folder.
    """
    version = registered_version(address, uri)
    return Contender(
        name=version.name,
        version=int(version.version),
        digest=version.tags.get(DIGEST_TAG, ""),
        evaluations=_evaluations(version.tags),
        trained_on=version.tags.get(gate.TRAINED_ON_TAG, ""),
        chosen_on=version.tags.get(gate.CHOSEN_ON_TAG, ""),
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
    model = contender(uri, address)
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
    before = contender(uri, f"models:/{name}/{last.previous}")
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


def _evaluations(tags: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    return {
        key.removeprefix(EVALUATION_TAG): json.loads(value)
        for key, value in tags.items()
        if key.startswith(EVALUATION_TAG)
    }


def _keep_report(model: ResolvedModel, data_digest: str, report: str) -> None:
    """A copy in the version's directory, which outlives the output folder of the evaluation."""
    try:
        page = storage.read_bytes(report)
    except StorageError:
        return  # the gate says so when it matters
    mlflow_client = client(model.uri)
    model_id = mlflow_client.get_model_version(str(model.name), str(model.version)).tags.get(MODEL_ID_TAG)
    if model_id is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, REPORTS, f"{data_digest[:12]}.html")
        os.makedirs(os.path.dirname(file))
        with open(file, "wb") as stream:
            stream.write(page)
        mlflow_client.log_model_artifacts(model_id, folder)


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
