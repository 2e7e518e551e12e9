"""The rules by which an alias moves from a champion to a challenger; pure functions, from facts to a decision.

Two groups. The papers: both versions are evaluated on the same data, in the same way, with a report, by data that
neither was trained on or chosen by. Where they are in order, the comparison: better by a margin and beyond chance, no
class much worse, fast enough. Where nothing is behind the alias there is nothing to compare with: an evaluation with
its report is enough.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from raydetr.config import PromoteConfig
from raydetr.errors import ConfigError

NO_CHAMPION = "there was no champion"
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Rule:
    """One rule: what was asked (`limit`), what was found, whether that passes."""

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

    def to_dict(self) -> dict[str, Any]:
        """As JSON: promoted, rules, reason."""
        return {
            "promoted": self.promoted,
            "rules": [asdict(rule) for rule in self.rules],
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Candidate:
    """A registered version as the gate sees it."""

    name: str
    version: int
    digest: str
    """Of the model's files."""
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Data digest → record."""
    trained_on: str = ""
    """Digest of the training data; empty: not known."""
    chosen_on: str = ""
    """Digest of the data that its best checkpoint or its end was chosen by; empty: none."""

    @property
    def label(self) -> str:
        """`version 3`."""
        return f"version {self.version}"


def decide(rules: Sequence[Rule], success: str, note: str = "") -> Decision:
    """The decision that rules lead to.

    Args:
        rules: all of them.
        success: the reason where all of them pass.
        note: of the user, appended.
    """
    failed = [f"{rule.rule}: {rule.found}, asked for: {rule.limit}" for rule in rules if not rule.passed]
    reason = "; ".join(failed) or success
    return Decision(not failed, tuple(rules), f"{reason} ({note})" if note else reason)


def choose_judge(challenger: Candidate, champion: Candidate | None, asked: str) -> str:
    """Digest of the data to judge by; empty where the two are evaluated on nothing in common.

    Args:
        challenger: to be promoted.
        champion: behind the alias; None where nothing is.
        asked: digest that `--data` means, or its beginning; empty: there is to be exactly one.

    Raises:
        ConfigError: there are several; they are listed.
    """
    there = set(challenger.evaluations)
    if champion is not None:
        there &= set(champion.evaluations)
    if asked:
        # What is asked for need not be on file: the rules say for whom it is missing.
        known = set(challenger.evaluations) | set(champion.evaluations if champion else ())
        there = {digest for digest in known if digest.startswith(asked)} or {asked}
    if len(there) > 1 and champion is None and not asked:
        return max(there)  # nothing is compared, each would do
    if len(there) > 1:
        listed = "; ".join(f"{digest[:12]} ({_address(challenger, digest)})" for digest in sorted(there))
        raise ConfigError(f"--data: there are several data sets to judge by: {listed}. Say which.")
    return next(iter(there), "")


def check_replacement(challenger: Candidate, champion: Candidate, asked: str) -> Rule:
    """The rule by which `--replace-champion` leaves out the comparison.

    Args:
        challenger: to be promoted.
        champion: behind the alias.
        asked: digest that `--data` means, or its beginning; empty: any.

    Raises:
        ConfigError: the two can be compared.
    """
    common = set(challenger.evaluations) & set(champion.evaluations)
    if common := {digest for digest in common if digest.startswith(asked)}:
        listed = ", ".join(sorted(digest[:12] for digest in common))
        raise ConfigError(
            f"--replace-champion: {challenger.label} and {champion.label} are both evaluated on {listed}, so they can "
            "be compared: leave the flag out."
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
    """The rules on what is on file; nothing is worth comparing where one of them fails.

    Args:
        config: the flags.
        challenger: to be promoted.
        champion: behind the alias; None where nothing is.
        digest: from `choose_judge`.
        reports_missing: version → address of the report that is not there, or empty where the record names none; for
            the versions whose report is missing.
    """
    both = [challenger] if champion is None else [challenger, champion]
    rules = [_evaluated(challenger, champion, digest)]
    if not rules[0].passed:
        return rules
    lost = [
        f"of {v}: {address or 'its evaluation was kept without one'}"
        for v, address in reports_missing.items()
    ]
    rules.append(
        Rule(
            "the report is there",
            not lost,
            f"missing {', '.join(lost)}" if lost else "there",
            "the page of each evaluation" + _again(not lost),
        )
    )
    stale = [
        each.label
        for each in both
        if (each.evaluations[digest].get("model") or {}).get("digest", each.digest) != each.digest
    ]
    rules.append(
        Rule(
            "these weights were evaluated",
            not stale,
            f"{', '.join(stale)} has other files than were evaluated" if stale else "yes",
            "the digest of the version's files",
        )
    )
    if champion is not None:
        rules += [_scored_alike(challenger, champion, digest), _impartial(config, both, digest)]
    return rules


def check_files(contenders: Sequence[Candidate], found: Mapping[int, str]) -> Rule:
    """The versions still have the files that they were registered with.

    Args:
        contenders: the challenger and, where there is one, the champion.
        found: version → digest of its files now, or what is wrong with them.
    """
    changed = [each for each in contenders if found[each.version] != each.digest]
    return Rule(
        "the files are those that were registered",
        not changed,
        "; ".join(f"{each.label} has {found[each.version][:200]}" for each in changed) or "yes",
        "the digest of the version's files" + (": restore them, or register again" if changed else ""),
    )


def check_data(recorded: Sequence[str], found: str, address: str) -> Rule:
    """The shards at the address that the records name are those that were scored.

    Args:
        recorded: the digest in each record.
        found: the digest of the manifest that lies there now, or what is wrong with it.
        address: of the shards.
    """
    return Rule(
        "the data are unchanged",
        set(recorded) == {found},
        f"{found[:80]} at {address}" if set(recorded) != {found} else found[:12],
        " and ".join(sorted({digest[:12] for digest in recorded})),
    )


def check_figures(
    config: PromoteConfig, comparison: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]
) -> Rule:
    """The stored predictions give the figures that are on file: they are those that were scored.

    Args:
        config: metric.
        comparison: from `evaluation.compare.compare`.
        old: record of the champion.
        new: record of the challenger.
    """
    name = config.metric
    figure = comparison["figures"].get(name, {})
    pairs = [(figure.get("old"), old["figures"].get(name)), (figure.get("new"), new["figures"].get(name))]
    wrong = [
        f"{kind}'s {name} {found:.4f}, on file {filed:.4f}"
        for kind, (found, filed) in zip(("champion", "challenger"), pairs, strict=True)
        if found is not None and filed is not None and abs(found - filed) > _ROUNDING
    ]
    return Rule(
        "the predictions give the figures on file",
        not wrong,
        "; ".join(wrong) or "yes",
        "predictions as they were scored" + _again(not wrong),
    )


def compare_rules(config: PromoteConfig, comparison: Mapping[str, Any]) -> list[Rule]:
    """The rules on a comparison.

    Args:
        config: metric, margin, tolerance, max_class_drop, min_class_objects.
        comparison: from `evaluation.compare.compare`.

    Raises:
        ConfigError: it has no such metric, or the data have no object for it.
    """
    figures = comparison["figures"]
    if config.metric not in figures:
        raise ConfigError(f"--metric {config.metric}: the comparison has {', '.join(sorted(figures))}.")
    figure = figures[config.metric]
    if figure["old"] < 0 or figure["new"] < 0:
        raise ConfigError(f"--metric {config.metric}: the data have no object that it counts.")
    share, low, high = (f"{100 * comparison['confidence']:g} %", figure["low"], figure["high"])
    return [
        Rule(
            f"{config.metric} is better",
            figure["delta"] > config.margin,
            f"{figure['delta']:+.4f} ({figure['old']:.4f} to {figure['new']:.4f})",
            f"more than {config.margin:+.4f}",
        ),
        Rule(
            f"{config.metric} is better beyond chance",
            low >= -config.tolerance,
            f"{share} of resamples between {low:+.4f} and {high:+.4f}",
            f"from {0.0 - config.tolerance:+.4f} on",
        ),
        _classes(config, comparison["classes"][config.metric]),
    ]


def check_latency(config: PromoteConfig, milliseconds: Mapping[str, float], where: str) -> Rule:
    """The rule on speed.

    Args:
        config: max_latency_ms.
        milliseconds: `challenger` and, where there is one, `champion` → 95th percentile of one image.
        where: what it was measured on.
    """
    found = ", ".join(f"{who} {value:.1f} ms" for who, value in milliseconds.items())
    return Rule(
        "it is fast enough",
        milliseconds["challenger"] <= config.max_latency_ms,
        f"{found} (95th percentile, {where})",
        f"{config.max_latency_ms:g} ms",
    )


def check_unmoved(alias: str, compared_with: int | None, now: str) -> Rule:
    """The rule that fails where somebody else moved the alias while this decision was being made."""
    before = "none" if compared_with is None else f"version {compared_with}"
    return Rule("no other promotion meanwhile", False, now, f"{alias} still {before}: promote again")


def describe(config: PromoteConfig, comparison: Mapping[str, Any]) -> str:
    """The reason for a promotion."""
    figure = comparison["figures"][config.metric]
    return (
        f"{config.metric} {figure['old']:.4f} to {figure['new']:.4f}, {figure['delta']:+.4f} "
        f"[{figure['low']:+.4f}, {figure['high']:+.4f}] on {comparison['images']} images"
    )


def _again(fine: bool) -> str:
    """The remedy where something is not fine."""
    return "" if fine else ": run pipelines/evaluate.py"


def _evaluated(challenger: Candidate, champion: Candidate | None, digest: str) -> Rule:
    found = [f"{each.label} on {_digests(each)}" for each in (challenger, champion) if each is not None]
    on_file = [digest in each.evaluations for each in (challenger, champion) if each is not None]
    name = "it is evaluated" if champion is None else "both are evaluated on the same data"
    limit = (
        f"an evaluation on {digest[:12]}"
        if digest
        else "an evaluation on file"
        if champion is None
        else "the same"
    )
    if all(on_file) or champion is None:
        return Rule(name, all(on_file), "; ".join(found), limit + _again(all(on_file)))
    return Rule(name, False, "; ".join(found), f"{limit}: {_in_common(challenger, champion, digest)}")


def _in_common(challenger: Candidate, champion: Candidate, digest: str) -> str:
    """How to get an evaluation of both on the same data."""
    digest = digest or next(iter(challenger.evaluations), "")
    address = (challenger.evaluations.get(digest, {}).get("data") or {}).get("address", "")
    data = f" --data {shlex.quote(address)}" if address else ""
    lacks = [each for each in (champion, challenger) if digest not in each.evaluations or not digest]
    commands = " and ".join(
        f"pipelines/evaluate.py --model models:/{each.name}/{each.version}{data}" for each in lacks
    )
    return (
        f"run {commands}. Where that says that labels and categories do not match, the two are models of different "
        "classes: train the new one under a name of its own (pipelines/train.py --name NAME, then --model "
        'models:/NAME@challenger), or replace the champion (--replace-champion --reason "…")'
    )


def _scored_alike(challenger: Candidate, champion: Candidate, digest: str) -> Rule:
    new, old = challenger.evaluations[digest], champion.evaluations[digest]
    different = [key for key in ("schema_version", "settings", "images") if new.get(key) != old.get(key)]
    return Rule(
        "both are scored alike",
        not different,
        "yes" if not different else f"the records differ in {', '.join(different)}",
        "equal settings" + _again(not different),
    )


def _impartial(config: PromoteConfig, both: Sequence[Candidate], digest: str) -> Rule:
    used = [f"{each.label} was trained on it" for each in both if each.trained_on == digest]
    used += [f"{each.label}'s checkpoint was chosen by it" for each in both if each.chosen_on == digest]
    return Rule(
        "the judge is impartial",
        not used or config.allow_contaminated_eval,
        f"{digest[:12]}: {', '.join(used)}" if used else digest[:12],
        "anything (--allow-contaminated-eval)"
        if config.allow_contaminated_eval
        else "data that training did not use, or --allow-contaminated-eval",
    )


def _classes(config: PromoteConfig, classes: Sequence[Mapping[str, Any]]) -> Rule:
    known = [c for c in classes if c["objects"] >= config.min_class_objects and min(c["old"], c["new"]) >= 0]
    dropped = sorted((c for c in known if c["delta"] < -config.max_class_drop), key=lambda c: c["delta"])
    beyond = [c for c in dropped if c["high"] < 0]
    if beyond:
        found = ", ".join(map(_class, beyond[:5])) + (
            f" and {len(beyond) - 5} more" if len(beyond) > 5 else ""
        )
    elif known:
        found = f"the worst of {len(known)}: {_class(min(known, key=lambda c: c['delta']))}"
    else:
        found = f"no class has {config.min_class_objects} objects"
    return Rule(
        "no class is much worse",
        not beyond,
        found,
        f"none that loses more than {config.max_class_drop:g} {config.metric} beyond chance",
    )


def _class(found: Mapping[str, Any]) -> str:
    interval = f"[{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"{str(found['name'])[:40]} {found['delta']:+.3f} {interval}, {found['objects']} objects"


def _digests(contender: Candidate) -> str:
    return ", ".join(digest[:12] for digest in sorted(contender.evaluations)[:5]) or "nothing"


def _address(contender: Candidate, digest: str) -> str:
    record = contender.evaluations.get(digest) or {}
    return str((record.get("data") or {}).get("address", "not on file"))
