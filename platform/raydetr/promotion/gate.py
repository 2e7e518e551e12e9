"""The gate: the rules that decide whether an alias moves from a champion to a challenger. All functions are pure.

There are two groups of rules, checked in this order:

1. Prerequisites: both versions are evaluated on the same data, with equal settings and a report, and neither version
   was trained or selected on this data.
2. Comparison: the metric is better by the margin and beyond chance, no class is much worse, and the latency is within
   its limit.

If the alias does not exist yet, there is no baseline: the challenger needs only an evaluation with its report.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raydetr.config import PromoteConfig
from raydetr.errors import ConfigError
from raydetr.results.comparison import ClassChange, Comparison
from raydetr.results.decision import Decision, Rule
from raydetr.results.record import EvaluationRecord

NO_CHAMPION = "there was no champion"
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Candidate:
    """What the gate knows about a registered version."""

    name: str
    version: int
    digest: str
    """Digest of the model's files."""
    evaluations: Mapping[str, EvaluationRecord] = field(default_factory=dict)
    """Data digest → record."""
    trained_on: str = ""
    """Digest of the training data; empty: not known."""
    chosen_on: str = ""
    """Digest of the data that selected its best checkpoint or stopped its training; empty: none."""

    @property
    def label(self) -> str:
        """Name in messages, e.g. `version 3`."""
        return f"version {self.version}"


def decide(rules: Sequence[Rule], success: str, note: str = "") -> Decision:
    """Combine the results of all rules into a decision.

    Args:
        rules: results of all rules.
        success: reason of the decision if all rules passed.
        note: remark of the user, appended to the reason.
    """
    failed = [f"{rule.rule}: {rule.found}, required: {rule.limit}" for rule in rules if not rule.passed]
    reason = "; ".join(failed) or success
    return Decision(not failed, tuple(rules), f"{reason} ({note})" if note else reason)


def choose_evaluation_data(challenger: Candidate, champion: Candidate | None, requested: str) -> str:
    """Return the digest of the evaluation data; empty if the two versions have no evaluation data in common.

    Args:
        challenger: version to promote.
        champion: version that the alias points to; None if the alias does not exist.
        requested: digest given by `--data`, or a prefix of it; empty: the only data set in common.

    Raises:
        ConfigError: there are several data sets. The message lists them.
    """
    digests = set(challenger.evaluations)
    if champion is not None:
        digests &= set(champion.evaluations)
    if requested:
        # Evaluations on the requested data need not exist: the rules report which version lacks one.
        known = set(challenger.evaluations) | set(champion.evaluations if champion else ())
        digests = {digest for digest in known if digest.startswith(requested)} or {requested}
    if len(digests) > 1 and champion is None and not requested:
        return max(digests)  # without a comparison, any of them will do
    if len(digests) > 1:
        listed = "; ".join(
            f"{digest[:12]} ({_data_uri(challenger, digest) or 'unknown location'})"
            for digest in sorted(digests)
        )
        raise ConfigError(f"--data: several data sets are possible: {listed}. Give one of them.")
    return next(iter(digests), "")


def check_replacement(challenger: Candidate, champion: Candidate, requested: str) -> Rule:
    """Return the rule with which `--replace-champion` skips the comparison.

    Args:
        challenger: version to promote.
        champion: version that the alias points to.
        requested: digest given by `--data`, or a prefix of it; empty: any data.

    Raises:
        ConfigError: the two versions can be compared.
    """
    common = set(challenger.evaluations) & set(champion.evaluations)
    if common := {digest for digest in common if digest.startswith(requested)}:
        listed = ", ".join(sorted(digest[:12] for digest in common))
        raise ConfigError(
            f"--replace-champion: {challenger.label} and {champion.label} are both evaluated on {listed}, so they can "
            "be compared: remove the flag."
        )
    return Rule(
        "the champion is replaced without a comparison",
        True,
        champion.label,
        "--replace-champion with a reason",
    )


def check_prerequisites(
    config: PromoteConfig,
    challenger: Candidate,
    champion: Candidate | None,
    digest: str,
    reports_missing: Mapping[int, str],
) -> list[Rule]:
    """Check the stored evaluations. If one of these rules fails, the versions are not compared.

    Args:
        config: the flags.
        challenger: version to promote.
        champion: version that the alias points to; None if the alias does not exist.
        digest: from `choose_evaluation_data`.
        reports_missing: the versions whose report does not exist → URI of the report, empty if the record has none.
    """
    versions = [challenger] if champion is None else [challenger, champion]
    rules = [_check_evaluated(challenger, champion, digest)]
    if not rules[0].passed:
        return rules
    missing = [
        f"version {version}: {uri or 'its evaluation was stored without a report'}"
        for version, uri in reports_missing.items()
    ]
    rules.append(
        Rule(
            "the evaluation reports exist",
            not missing,
            f"missing for {', '.join(missing)}" if missing else "yes",
            "the report of each evaluation" + _remedy(not missing),
        )
    )
    stale = [
        each.label for each in versions if each.evaluations[digest].model.digest not in ("", each.digest)
    ]
    rules.append(
        Rule(
            "the evaluated model files are those of the version",
            not stale,
            f"{', '.join(stale)} was evaluated with other files" if stale else "yes",
            "the digest of the version's files",
        )
    )
    if champion is not None:
        rules += [
            _check_settings(challenger, champion, digest),
            _check_contamination(config, versions, digest),
        ]
    return rules


def check_files(versions: Sequence[Candidate], found: Mapping[int, str]) -> Rule:
    """Check that the versions still have the files that they were registered with.

    Args:
        versions: the challenger and, if it exists, the champion.
        found: version → current digest of its files, or why they cannot be read.
    """
    changed = [each for each in versions if found[each.version] != each.digest]
    return Rule(
        "the model files are unchanged since registration",
        not changed,
        "; ".join(f"{each.label} has {found[each.version][:200]}" for each in changed) or "yes",
        "the digest of the version's files"
        + (": restore them, or register the model again" if changed else ""),
    )


def check_data(recorded: Sequence[str], found: str, uri: str) -> Rule:
    """Check that the evaluation data is unchanged since it was scored.

    Args:
        recorded: data digest in each record.
        found: current digest of the manifest at `uri`, or why it cannot be read.
        uri: URI of the shards.
    """
    return Rule(
        "the evaluation data is unchanged",
        set(recorded) == {found},
        f"{found[:80]} at {uri}" if set(recorded) != {found} else found[:12],
        " and ".join(sorted({digest[:12] for digest in recorded})),
    )


def check_metrics(
    config: PromoteConfig, comparison: Comparison, old: EvaluationRecord, new: EvaluationRecord
) -> Rule:
    """Check that the stored predictions reproduce the recorded metrics, so that they are those that were scored.

    Args:
        config: metric.
        comparison: from `promotion.compare.compare`.
        old: record of the champion.
        new: record of the challenger.
    """
    name = config.metric
    change = comparison.metrics.get(name)
    pairs = [(change.old, old.metrics.get(name)), (change.new, new.metrics.get(name))] if change else []
    wrong = [
        f"{kind}'s {name} {computed:.4f}, recorded {recorded:.4f}"
        for kind, (computed, recorded) in zip(("champion", "challenger"), pairs)
        if recorded is not None and abs(computed - recorded) > _ROUNDING
    ]
    return Rule(
        "the predictions reproduce the recorded metrics",
        not wrong,
        "; ".join(wrong) or "yes",
        "the predictions that were scored" + _remedy(not wrong),
    )


def check_comparison(config: PromoteConfig, comparison: Comparison) -> list[Rule]:
    """Check what a comparison of two versions must show: a better metric, beyond chance, and no class much worse.

    Args:
        config: metric, margin, tolerance, max_class_drop, min_class_objects.
        comparison: from `promotion.compare.compare`.

    Raises:
        ConfigError: the comparison does not have the metric, or the data has no objects for it.
    """
    change = comparison.metrics.get(config.metric)
    if change is None:
        known = ", ".join(sorted(comparison.metrics))
        raise ConfigError(f"--metric {config.metric}: the comparison has {known}.")
    if not change.is_measured:
        raise ConfigError(f"--metric {config.metric}: the evaluation data has no objects for this metric.")
    return [
        Rule(
            f"{config.metric} is better",
            change.delta > config.margin,
            f"{change.delta:+.4f} ({change.old:.4f} to {change.new:.4f})",
            f"more than {config.margin:+.4f}",
        ),
        Rule(
            f"{config.metric} is better beyond chance",
            change.low >= -config.tolerance,
            f"{100 * comparison.confidence:g} % of resamples between {change.low:+.4f} and {change.high:+.4f}",
            f"a lower bound of at least {0.0 - config.tolerance:+.4f}",
        ),
        _check_classes(config, comparison.classes[config.metric]),
    ]


def check_latency(config: PromoteConfig, milliseconds: Mapping[str, float], setup: str) -> Rule:
    """Check the latency of the challenger.

    Args:
        config: max_latency_ms.
        milliseconds: `challenger` and, if it exists, `champion` → 95th percentile per image.
        setup: images and device of the measurement.
    """
    found = ", ".join(f"{name} {value:.1f} ms" for name, value in milliseconds.items())
    return Rule(
        "the latency is within the limit",
        milliseconds["challenger"] <= config.max_latency_ms,
        f"{found} (95th percentile, {setup})",
        f"at most {config.max_latency_ms:g} ms",
    )


def check_unmoved(alias: str, compared_with: int | None, found: str) -> Rule:
    """Return the failed rule of a promotion during which another process moved the alias."""
    before = "no version" if compared_with is None else f"version {compared_with}"
    return Rule("no concurrent promotion", False, found, f"{alias} still at {before}: promote again")


def describe(config: PromoteConfig, comparison: Comparison) -> str:
    """Describe the change of the metric, as the reason for a promotion."""
    change = comparison.metrics[config.metric]
    return (
        f"{config.metric} {change.old:.4f} to {change.new:.4f}, {change.delta:+.4f} "
        f"[{change.low:+.4f}, {change.high:+.4f}] on {comparison.images} images"
    )


def _remedy(passed: bool) -> str:
    """Return the advice to evaluate again if a rule failed."""
    return "" if passed else ": run pipelines/evaluate.py"


def _check_evaluated(challenger: Candidate, champion: Candidate | None, digest: str) -> Rule:
    found = [f"{each.label} on {_digests(each)}" for each in (challenger, champion) if each is not None]
    has_evaluation = [digest in each.evaluations for each in (challenger, champion) if each is not None]
    name = (
        "the challenger is evaluated" if champion is None else "both versions are evaluated on the same data"
    )
    limit = (
        f"an evaluation on {digest[:12]}"
        if digest
        else "an evaluation"
        if champion is None
        else "evaluations on the same data"
    )
    if all(has_evaluation) or champion is None:
        return Rule(name, all(has_evaluation), "; ".join(found), limit + _remedy(all(has_evaluation)))
    return Rule(name, False, "; ".join(found), f"{limit}: {_how_to_evaluate(challenger, champion, digest)}")


def _how_to_evaluate(challenger: Candidate, champion: Candidate, digest: str) -> str:
    """Return the commands that evaluate both versions on the same data."""
    digest = digest or next(iter(challenger.evaluations), "")
    uri = _data_uri(challenger, digest)
    data = f" --data {shlex.quote(uri)}" if uri else ""
    lacking = [each for each in (champion, challenger) if digest not in each.evaluations or not digest]
    commands = " and ".join(
        f"pipelines/evaluate.py --model models:/{each.name}/{each.version}{data}" for each in lacking
    )
    return (
        f"run {commands}. If that fails because labels and categories do not match, the two models have different "
        "classes: train the new one under its own name (pipelines/train.py --name NAME, then --model "
        'models:/NAME@challenger), or replace the champion (--replace-champion --reason "…")'
    )


def _check_settings(challenger: Candidate, champion: Candidate, digest: str) -> Rule:
    new, old = challenger.evaluations[digest], champion.evaluations[digest]
    different = [
        key for key in ("schema_version", "settings", "images") if getattr(new, key) != getattr(old, key)
    ]
    return Rule(
        "both evaluations have the same settings",
        not different,
        "yes" if not different else f"the records differ in {', '.join(different)}",
        "equal settings" + _remedy(not different),
    )


def _check_contamination(config: PromoteConfig, versions: Sequence[Candidate], digest: str) -> Rule:
    uses = [f"{each.label} was trained on it" for each in versions if each.trained_on == digest]
    uses += [f"{each.label}'s checkpoint was selected on it" for each in versions if each.chosen_on == digest]
    return Rule(
        "the evaluation data was used neither to train nor to select either model",
        not uses or config.allow_contaminated_eval,
        f"{digest[:12]}: {', '.join(uses)}" if uses else digest[:12],
        "anything (--allow-contaminated-eval)"
        if config.allow_contaminated_eval
        else "data that training did not use, or --allow-contaminated-eval",
    )


def _check_classes(config: PromoteConfig, classes: Sequence[ClassChange]) -> Rule:
    known = [c for c in classes if c.objects >= config.min_class_objects and c.change.is_measured]
    known.sort(key=lambda c: c.change.delta)
    significant = [c for c in known if c.change.delta < -config.max_class_drop and c.change.high < 0]
    if significant:
        found = ", ".join(map(_describe_class, significant[:5])) + (
            f" and {len(significant) - 5} more" if len(significant) > 5 else ""
        )
    elif known:
        found = f"the worst of {len(known)}: {_describe_class(known[0])}"
    else:
        found = f"no class has {config.min_class_objects} objects"
    return Rule(
        "no class is much worse",
        not significant,
        found,
        f"no class that loses more than {config.max_class_drop:g} {config.metric} beyond chance",
    )


def _describe_class(each: ClassChange) -> str:
    interval = f"[{each.change.low:+.3f}, {each.change.high:+.3f}]"
    return f"{each.name[:40]} {each.change.delta:+.3f} {interval}, {each.objects} objects"


def _digests(version: Candidate) -> str:
    return ", ".join(digest[:12] for digest in sorted(version.evaluations)[:5]) or "nothing"


def _data_uri(version: Candidate, digest: str) -> str:
    """Return the URI of the data set that a version is evaluated on; empty if it is not known."""
    record = version.evaluations.get(digest)
    return "" if record is None else record.data.uri
