"""The promotion job of pipelines/promote.py: from model URIs to a moved alias or a refusal.

It checks the prerequisites (`gate`), compares the stored predictions of the two versions (`compare`), and measures
latency if a limit is given (`latency`). The decision is recorded as an MLflow run with the comparison page and as a tag
of both versions (`records`). Then the alias moves (`ledger`).
"""

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from raydetr import storage
from raydetr.config import PromoteConfig
from raydetr.data.shards import Manifest
from raydetr.errors import DataError, RegistryError, StorageError
from raydetr.evaluation.ground_truth import read_ground_truth
from raydetr.prediction.predict import read_predictions
from raydetr.promotion import gate, latency
from raydetr.promotion.compare import compare
from raydetr.promotion.gate import Candidate
from raydetr.promotion.ledger import Entry, Ledger, utc_now
from raydetr.promotion.records import Promotion, move, open_decision, read_candidate, record_refusal, undo
from raydetr.registry.models import files_digest, resolve
from raydetr.registry.tracking import client, end_run, registry_errors, resolve_uri
from raydetr.reports.page_comparison import write_comparison
from raydetr.reports.page_pictures import ground_truth_kind
from raydetr.results.comparison import Comparison
from raydetr.results.decision import Decision, Rule
from raydetr.results.record import EvaluationRecord
from raydetr.results.summary import PromotionSummary

PAGE = "comparison.html"


@dataclass(frozen=True)
class GateResult:
    """A decision of the gate and what it is based on."""

    decision: Decision
    digest: str = ""
    """Digest of the evaluation data."""
    comparison: Comparison | None = None
    manifest: Manifest | None = None


def promote(config: PromoteConfig) -> PromotionSummary:
    """Run the gate, record its decision, and move the alias if all rules pass; or undo the last promotion.

    Raises:
        ConfigError: a flag contradicts the stored evaluations.
        RegistryError: the model, version or alias does not exist, or there is nothing to undo.
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
        return _summary(config, done, Decision(True, (), f"{challenger.label} is already the {config.alias}"))
    with tempfile.TemporaryDirectory() as folder:
        result = evaluate_promotion(config, uri, challenger, champion)
        decision = result.decision
        has_page = _write_page(folder, config, result, challenger, champion)
        if ledger is not None:
            pages = folder if has_page else ""
            run_id = open_decision(ledger, decision, previous, challenger.version, result.digest, pages)
            if decision.promoted:
                entry = Entry(number, "promotion", previous, challenger.version, run_id, utc_now())
                if not move(ledger, entry, previous):
                    result = _refuse_overtaken(config, ledger, result, previous)
                    decision = result.decision
                    _write_page(folder, config, result, challenger, champion)
                    open_decision(
                        ledger, decision, previous, challenger.version, result.digest, pages, run_id
                    )
            if not decision.promoted:
                record_refusal(ledger, run_id, previous, challenger.version, result.digest)
                end_run(uri, run_id)
            done = replace(done, number=number if decision.promoted else 0, run_id=run_id)
        if config.report and has_page:
            storage.write_bytes(storage.absolute(config.report), Path(folder, PAGE).read_bytes())
    return _summary(config, done, decision, result, has_page)


def evaluate_promotion(
    config: PromoteConfig, uri: str, challenger: Candidate, champion: Candidate | None
) -> GateResult:
    """Check all rules of the gate. The versions are compared only if all prerequisites pass.

    Args:
        config: the flags.
        uri: MLflow URI, from which the models' files are read.
        challenger: version to promote.
        champion: version that the alias points to; None if the alias does not exist.
    """
    replaced = []
    if config.replace_champion and champion is not None:
        replaced = [gate.check_replacement(challenger, champion, _requested_digest(config.data))]
        champion = None
    versions = [challenger] if champion is None else [champion, challenger]
    digest = gate.choose_evaluation_data(challenger, champion, _requested_digest(config.data))
    records = [each.evaluations[digest] for each in versions if digest in each.evaluations]
    rules = replaced + gate.check_prerequisites(
        config, challenger, champion, digest, _missing_reports(versions, digest)
    )
    if all(rule.passed for rule in rules):
        rules.append(
            gate.check_files(versions, {each.version: _files_digest(uri, each) for each in versions})
        )
    if not all(rule.passed for rule in rules):
        return GateResult(gate.decide(rules, "", config.reason), digest)
    manifest = None
    if champion is not None or config.max_latency_ms:
        manifest, rule = _load(records)
        rules.append(rule)
    if not all(rule.passed for rule in rules):
        return GateResult(gate.decide(rules, "", config.reason), digest)
    comparison, success = None, replaced[0].found + " is replaced" if replaced else gate.NO_CHAMPION
    if champion is not None and manifest is not None:
        old, new = (read_predictions(record.predictions) for record in records)
        comparison = compare(read_ground_truth(manifest, ground_truth_kind(records[-1])), old, new)
        rules.append(gate.check_metrics(config, comparison, records[0], records[-1]))
        rules += gate.check_comparison(config, comparison)
        success = gate.describe(config, comparison)
    if config.max_latency_ms and manifest is not None:
        rules.append(_check_latency(config, uri, manifest, challenger, champion))
    return GateResult(gate.decide(rules, success, config.reason), digest, comparison, manifest)


def _champion(uri: str, name: str, alias: str) -> Candidate | None:
    with registry_errors(uri):
        version = client(uri).get_registered_model(name).aliases.get(alias)
    return None if version is None else read_candidate(uri, f"models:/{name}/{version}")


def _files_digest(uri: str, version: Candidate) -> str:
    try:
        return files_digest(uri, version.name, version.version)
    except RegistryError as error:
        return f"no readable files ({error})"


def _requested_digest(data: str) -> str:
    """Return the digest, or digest prefix, that `--data` specifies."""
    if not data or re.fullmatch("[0-9a-f]{8,64}", data):
        return data
    return Manifest.load(data).digest


def _missing_reports(versions: list[Candidate], digest: str) -> dict[int, str]:
    missing = {}
    for each in versions:
        report = each.evaluations.get(digest, EvaluationRecord()).report
        if not report or not storage.exists(report):
            missing[each.version] = report
    return missing


def _load(records: Sequence[EvaluationRecord]) -> tuple[Manifest | None, Rule]:
    """Load the evaluation data of the challenger's record, and check that it is unchanged since it was scored."""
    uri, recorded = records[-1].data.uri, [record.data.digest for record in records]
    try:
        manifest = Manifest.load(uri)
    except (DataError, StorageError) as error:
        return None, gate.check_data(recorded, str(error), uri)
    return manifest, gate.check_data(recorded, manifest.digest, uri)


def _check_latency(
    config: PromoteConfig, uri: str, manifest: Manifest, challenger: Candidate, champion: Candidate | None
) -> Rule:
    versions = {"challenger": challenger} | ({} if champion is None else {"champion": champion})
    folders = {
        key: resolve(f"models:/{each.name}/{each.version}", uri).folder for key, each in versions.items()
    }
    masks = config.metric.startswith(("mask_", "PQ"))  # measure with the mask head that the metric evaluates
    measured = latency.measure(folders, manifest, config.latency_images, masks=masks)
    return gate.check_latency(config, measured, latency.describe_setup(config.latency_images))


def _refuse_overtaken(
    config: PromoteConfig, ledger: Ledger, result: GateResult, previous: int | None
) -> GateResult:
    """Turn a positive decision into a refusal because a concurrent promotion has moved the alias."""
    position, entries = ledger.position(), ledger.settle()
    version = "none" if position is None else f"version {position}"
    found = f"{version} since {entries[-1].at}" if entries else version
    rule = gate.check_unmoved(config.alias, previous, found)
    return replace(result, decision=gate.decide([*result.decision.rules, rule], "", config.reason))


def _write_page(
    folder: str,
    config: PromoteConfig,
    result: GateResult,
    challenger: Candidate,
    champion: Candidate | None,
) -> bool:
    """Write the comparison page to a folder; return False if there was no comparison."""
    if result.comparison is None or result.manifest is None or champion is None:
        return False
    old, new = champion.evaluations[result.digest], challenger.evaluations[result.digest]
    write_comparison(
        os.path.join(folder, PAGE),
        old,
        new,
        result.comparison,
        result.manifest,
        read_predictions(old.predictions),
        read_predictions(new.predictions),
        result.decision,
        config.metric,
    )
    return True


def _summary(
    config: PromoteConfig,
    done: Promotion,
    decision: Decision,
    result: GateResult | None = None,
    has_page: bool = False,
) -> PromotionSummary:
    page = ""
    if has_page:
        page = f"runs:/{done.run_id}/{PAGE}" if done.run_id else config.report
    return PromotionSummary(
        model=done.name,
        alias=done.alias,
        from_version="none" if done.previous is None else done.previous,
        version=done.version,
        promoted=decision.promoted,
        moved=bool(done.number),
        reason=decision.reason,
        data_digest=result.digest if result else "",
        page=page,
        run_id=done.run_id,
        rules=decision.rules,
        metrics=result.comparison.metrics if result and result.comparison else {},
        evaluations={digest: record.metrics for digest, record in done.evaluations.items()},
    )
