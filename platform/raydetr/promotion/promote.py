"""One promotion from addresses to a moved alias, or a refusal; what pipelines/promote.py runs.

The papers are looked at first (`registry.gate`), then the two versions' stored predictions are compared, then speed is
measured where a limit is given. The decision is an MLflow run with the comparison page, and a tag of both versions;
then the alias moves (`registry.promote`, `registry.ledger`).
"""

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raydetr import storage
from raydetr.config import PromoteConfig
from raydetr.data.shards import Manifest
from raydetr.data.stream.mask_targets import MaskKind
from raydetr.errors import DataError, RegistryError, StorageError
from raydetr.evaluation.ground_truth import read_truth
from raydetr.prediction.predict import read_predictions
from raydetr.promotion import gate, latency
from raydetr.promotion.compare import compare
from raydetr.promotion.gate import Candidate, Decision, Rule
from raydetr.promotion.ledger import Entry, Ledger, now
from raydetr.promotion.records import Promotion, keep_refusal, move, open_decision, read_candidate, undo
from raydetr.registry.models import files_digest, resolve
from raydetr.registry.tracking import client, end_run, registry_errors, resolve_uri
from raydetr.reports.page_comparison import write_comparison

PAGE = "comparison.html"


@dataclass(frozen=True)
class Judgement:
    """A decision and what it rests on."""

    decision: Decision
    digest: str = ""
    """Of the data that judged."""
    comparison: Mapping[str, Any] | None = None
    manifest: Manifest | None = None


def promote(config: PromoteConfig) -> dict[str, Any]:
    """Let the gate decide, keep the decision, and move the alias if it is let through; or undo.

    Returns:
        summary: model, alias, from_version, version, promoted, moved, reason, data_digest, rules, figures, page, run_id.

    Raises:
        ConfigError: a flag does not fit what is on file.
        RegistryError: unknown model, version or alias, nothing to undo.
    """
    uri = resolve_uri(config.tracking_uri)
    challenger = read_candidate(uri, config.model)
    if config.undo:
        done = undo(uri, challenger.name, config.alias, config.reason, config.dry_run)
        return _summary(config, done, Decision(True, (), "the last promotion is undone"))
    ledger = None if config.dry_run else Ledger(uri, challenger.name, config.alias)
    number = len(ledger.settle()) + 1 if ledger else 0
    champion = _champion(uri, challenger.name, config.alias)
    previous = None if champion is None else champion.version
    done = Promotion(challenger.name, config.alias, previous, challenger.version, challenger.evaluations)
    if previous == challenger.version:
        return _summary(config, done, Decision(True, (), f"{challenger.label} is the {config.alias} already"))
    with tempfile.TemporaryDirectory() as folder:
        judged = evaluate_promotion(config, uri, challenger, champion)
        decision = judged.decision
        has_page = _write_page(folder, config, judged, challenger, champion)
        if ledger is not None:
            pages = folder if has_page else ""
            run_id = open_decision(ledger, decision, previous, challenger.version, judged.digest, pages)
            if decision.promoted:
                entry = Entry(number, "promotion", previous, challenger.version, run_id, now())
                if not move(ledger, entry, previous):
                    judged = _overtaken(config, ledger, judged, previous)
                    decision = judged.decision
                    _write_page(folder, config, judged, challenger, champion)
                    open_decision(
                        ledger, decision, previous, challenger.version, judged.digest, pages, run_id
                    )
            if not decision.promoted:
                keep_refusal(ledger, run_id, previous, challenger.version, judged.digest)
                end_run(uri, run_id)
            done = replace(done, number=number if decision.promoted else 0, run_id=run_id)
        if config.report and has_page:
            storage.write_bytes(storage.absolute(config.report), Path(folder, PAGE).read_bytes())
    return _summary(config, done, decision, judged, has_page)


def evaluate_promotion(
    config: PromoteConfig, uri: str, challenger: Candidate, champion: Candidate | None
) -> Judgement:
    """Ask every rule; the comparison only where the papers are in order.

    Args:
        config: the flags.
        uri: MLflow address, for the models' files where latency is measured.
        challenger: to be promoted.
        champion: behind the alias; None where nothing is.
    """
    replaced = []
    if config.replace_champion and champion is not None:
        replaced = [gate.check_replacement(challenger, champion, _asked(config.data))]
        champion = None
    both = [challenger] if champion is None else [champion, challenger]
    digest = gate.choose_judge(challenger, champion, _asked(config.data))
    records = [each.evaluations[digest] for each in both if digest in each.evaluations]
    rules = replaced + gate.check_prerequisites(
        config, challenger, champion, digest, _missing_reports(both, digest)
    )
    if all(rule.passed for rule in rules):
        rules.append(gate.check_files(both, {each.version: _files_digest(uri, each) for each in both}))
    if not all(rule.passed for rule in rules):
        return Judgement(gate.decide(rules, "", config.reason), digest)
    manifest = None
    if champion is not None or config.max_latency_ms:
        manifest, rule = _load(records)
        rules.append(rule)
    if not all(rule.passed for rule in rules):
        return Judgement(gate.decide(rules, "", config.reason), digest)
    comparison, success = None, replaced[0].found + " is replaced" if replaced else gate.NO_CHAMPION
    if champion is not None and manifest is not None:
        old, new = (read_predictions(record["predictions"]) for record in records)
        comparison = compare(read_truth(manifest, _kind(records[-1])), old, new)
        rules.append(gate.check_figures(config, comparison, records[0], records[-1]))
        rules += gate.compare_rules(config, comparison)
        success = gate.describe(config, comparison)
    if config.max_latency_ms and manifest is not None:
        rules.append(_latency(config, uri, manifest, challenger, champion))
    return Judgement(gate.decide(rules, success, config.reason), digest, comparison, manifest)


def _champion(uri: str, name: str, alias: str) -> Candidate | None:
    with registry_errors(uri):
        version = client(uri).get_registered_model(name).aliases.get(alias)
    return None if version is None else read_candidate(uri, f"models:/{name}/{version}")


def _files_digest(uri: str, version: Candidate) -> str:
    try:
        return files_digest(uri, version.name, version.version)
    except RegistryError as error:
        return f"no files that can be read ({error})"


def _asked(data: str) -> str:
    """The digest, or its beginning, that `--data` means."""
    if not data or re.fullmatch("[0-9a-f]{8,64}", data):
        return data
    return Manifest.load(data).digest


def _missing_reports(both: list[Candidate], digest: str) -> dict[int, str]:
    missing = {}
    for each in both:
        report = str(each.evaluations.get(digest, {}).get("report") or "")
        if not report or not storage.exists(report):
            missing[each.version] = report
    return missing


def _load(records: list[Mapping[str, Any]]) -> tuple[Manifest | None, Rule]:
    """The data of the newest record, and the rule that they are still what was scored."""
    address, recorded = records[-1]["data"]["address"], [record["data"]["digest"] for record in records]
    try:
        manifest = Manifest.load(address)
    except (DataError, StorageError) as error:
        return None, gate.check_data(recorded, str(error), address)
    return manifest, gate.check_data(recorded, manifest.digest, address)


def _kind(record: Mapping[str, Any]) -> MaskKind:
    """Of the truth that an evaluation was scored with."""
    task = record["settings"].get("task", "detection")
    return "none" if task == "detection" else task


def _latency(
    config: PromoteConfig, uri: str, manifest: Manifest, challenger: Candidate, champion: Candidate | None
) -> Rule:
    who = {"challenger": challenger} | ({} if champion is None else {"champion": champion})
    folders = {key: resolve(f"models:/{each.name}/{each.version}", uri).folder for key, each in who.items()}
    masks = config.metric.startswith(("mask_", "PQ"))  # then the head is what is judged
    measured = latency.measure(folders, manifest, config.latency_images, masks=masks)
    return gate.check_latency(config, measured, latency.where(config.latency_images))


def _overtaken(config: PromoteConfig, ledger: Ledger, judged: Judgement, previous: int | None) -> Judgement:
    """The decision once the alias turns out to have moved."""
    position, entries = ledger.position(), ledger.settle()
    version = "none" if position is None else f"version {position}"
    found = f"{version} since {entries[-1].at}" if entries else version
    rule = gate.check_unmoved(config.alias, previous, found)
    return replace(judged, decision=gate.decide([*judged.decision.rules, rule], "", config.reason))


def _write_page(
    folder: str,
    config: PromoteConfig,
    judged: Judgement,
    challenger: Candidate,
    champion: Candidate | None,
) -> bool:
    """The comparison as a page in a folder, where there was one; whether there was."""
    if judged.comparison is None or judged.manifest is None or champion is None:
        return False
    old, new = champion.evaluations[judged.digest], challenger.evaluations[judged.digest]
    write_comparison(
        os.path.join(folder, PAGE),
        old,
        new,
        judged.comparison,
        judged.manifest,
        read_predictions(old["predictions"]),
        read_predictions(new["predictions"]),
        judged.decision.to_dict(),
        config.metric,
    )
    return True


def _summary(
    config: PromoteConfig,
    done: Promotion,
    decision: Decision,
    judged: Judgement | None = None,
    has_page: bool = False,
) -> dict[str, Any]:
    return {
        "model": done.name,
        "alias": done.alias,
        "from_version": "none" if done.previous is None else done.previous,
        "version": done.version,
        "promoted": decision.promoted,
        "moved": bool(done.number),
        "reason": decision.reason,
        "data_digest": judged.digest if judged else "",
        "page": f"runs:/{done.run_id}/{PAGE}"
        if has_page and done.run_id
        else config.report
        if has_page
        else "",
        "run_id": done.run_id,
        "rules": decision.to_dict()["rules"],
        "figures": dict(judged.comparison["figures"]) if judged and judged.comparison else {},
        "evaluations": {digest: record["figures"] for digest, record in done.evaluations.items()},
    }
