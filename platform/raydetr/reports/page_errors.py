"""Sections of the evaluation report on errors: error breakdown, confusion matrix, calibration, key findings."""

from collections.abc import Sequence
from html import escape

import numpy as np

from raydetr.reports.page_charts import calibration
from raydetr.reports.page_tables import Cell, name_cell, plain, words_cell
from raydetr.reports.page_text import ERRORS, number, percent, plural
from raydetr.results.analysis import Analysis, Calibration, Confusion, ErrorBreakdown

MAX_LISTED = 15
MAX_IN_MATRIX = 100


def error_section(errors: ErrorBreakdown) -> str:
    """Render the error breakdown: the count and the cost of each kind, with bars."""
    counts, costs = errors.counts, errors.costs
    kinds = sorted(counts, key=lambda kind: (-costs.get(kind, 0), -counts[kind]))
    maximum = max([*costs.values(), 1e-9])
    rows = [
        [
            words_cell(ERRORS[kind][0], ERRORS[kind][1]),
            Cell(f"{counts[kind]:,}"),
            Cell(_bar(max(costs.get(kind, 0), 0) / maximum), kind="bar"),
            Cell(number(max(costs.get(kind, 0), 0))),
        ]
        for kind in kinds
        if kind in ERRORS
    ]
    heads = [("kind", ""), ("count", "number"), ("cost in AP50", ""), ("", "number")]
    return (
        f"<p>AP50 is {number(errors.ap50)} for detections with a score of at least {errors.min_score:g}. The "
        "cost of a kind is the gain of AP50 if all errors of this kind, and no others, were fixed. Costs do not add up."
        f"</p><div class=costs>{plain('kinds of error', heads, rows)}</div>"
    )


def _bar(share: float) -> str:
    return (
        '<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{100 * share:.2f}" height="8"/></svg>'
    )


def confusion_section(confusion: Confusion) -> str:
    """Render the most frequent confusions of two classes as a list, and the whole confusion matrix."""
    names, counts = confusion.names, np.asarray(confusion.counts, dtype=np.int64)
    classes = len(names) - 1
    if classes < 1 or not counts.any():
        return "<p>There is nothing to compare: no objects and no detections.</p>"
    pairs = _worst_pairs(counts[:classes, :classes])
    rows = [
        [
            name_cell(names[true]),
            Cell(escape(names[predicted]), kind=""),
            Cell(f"{counts[true, predicted]:,}"),
            Cell(percent(counts[true, predicted] / counts[true].sum())),
        ]
        for true, predicted in pairs[:MAX_LISTED]
    ]
    listed = "<p>No object was confused with another class.</p>"
    if rows:
        more = len(pairs) - MAX_LISTED
        heading = f"The {MAX_LISTED} most frequent of {len(pairs)} confusions" if more > 0 else "Confusions"
        heads = [
            ("true class", ""),
            ("predicted class", ""),
            ("count", "number"),
            ("share of the class", "number"),
        ]
        listed = f"<h3>{heading}</h3><div class=narrow>{plain('most frequent confusions', heads, rows)}</div>"
    lead = (
        f"<p>Objects and detections of any class are matched by IoU (at least {confusion.iou:g}). Only detections "
        f"with a score of at least {confusion.min_score:g} count.</p>"
    )
    return lead + listed + _matrix(names, counts)


def calibration_section(data: Calibration) -> str:
    """Render how well scores agree with the share of correct detections."""
    bins = [each for each in data.bins if each.count]
    if not bins:
        return "<p>There are no detections.</p>"
    total = sum(each.count for each in bins)
    gap = sum(each.count * (each.accuracy - each.confidence) for each in bins) / total
    direction = "higher" if gap > 0 else "lower"
    verdict = (
        "Overall, the scores can be used as probabilities."
        if data.ece < 0.05
        else f"On average, the share of correct detections is {abs(gap):.2f} {direction} than the score."
        if abs(gap) >= 0.02
        else "Scores are too high in some ranges and too low in others."
    )
    chart = calibration(
        bins, f"calibration diagram: share of correct detections by score; error {data.ece:.3f}"
    )
    return (
        f"<div class=side-by-side>{chart}<div><p>Of all detections with a score of 0.8, 80 % should be correct. Then "
        f"the bars reach the dashed line. {verdict}</p><p class=note>Expected calibration error: {data.ece:.3f} "
        f"(mean distance from the line, weighted by detections). Maximum: {data.mce:.3f}. "
        f"{plural(total, 'detection')}. Darker bars contain more detections.</p></div></div>"
    )


def findings(analysis: Analysis) -> list[str]:
    """Return the key findings as a few sentences, HTML."""
    sentences = []
    errors, confusion = analysis.errors, analysis.confusion
    if errors and any(cost > 0.0005 for cost in errors.costs.values()):
        kind = max(errors.costs, key=errors.costs.__getitem__)
        sentences.append(
            f"Most costly kind of error: <b>{ERRORS[kind][2]}</b> ({plural(errors.counts[kind], 'case')}). Fixing "
            f"all of them would raise AP50 by {errors.costs[kind]:.3f}."
        )
    known = [
        (each.metrics["AP"], each.name)
        for each in analysis.classes
        if each.objects >= 10 and each.metrics["AP"] >= 0
    ]
    if len(known) > 2:
        known.sort(key=lambda each: each[0])
        weakest = ", ".join(f"<b>{escape(name)}</b> ({ap:.2f})" for ap, name in known[:3])
        highest, best = known[-1]
        sentences.append(
            f"Classes with the lowest AP, among those with at least ten objects: {weakest}. Highest AP: "
            f"<b>{escape(best)}</b> ({highest:.2f})."
        )
    if confusion:
        counts = np.asarray(confusion.counts, dtype=np.int64)
        pairs = _worst_pairs(counts[:-1, :-1])
        if pairs and counts[pairs[0]] > 2:
            true, predicted = (escape(confusion.names[index]) for index in pairs[0])
            times = counts[pairs[0]]
            sentences.append(
                f"Most frequent confusion: <b>{true}</b> predicted as <b>{predicted}</b> "
                f"({plural(int(times), 'time')})."
            )
    return sentences


def _worst_pairs(counts: np.ndarray) -> list[tuple[int, int]]:
    """Return (true class, predicted class) of all confusions, the most frequent first."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    rows, columns = np.nonzero(wrong)
    times = wrong[rows, columns]
    order = np.lexsort((-times / counts.sum(1)[rows], -times))
    return [(int(rows[index]), int(columns[index])) for index in order]


def _matrix(names: Sequence[str], counts: np.ndarray) -> str:
    """Render the confusion matrix of the classes that occur, background last, tinted by the share of a row."""
    classes = len(names) - 1
    used = np.flatnonzero(counts.sum(0)[:classes] + counts.sum(1)[:classes])
    shown, note = used, ""
    if len(used) > MAX_IN_MATRIX:
        weight = counts.sum(1)[used] + counts.sum(0)[used]
        shown = np.sort(used[np.argsort(-weight, kind="stable")[:MAX_IN_MATRIX]])
        note = f" Only the {MAX_IN_MATRIX} of {len(used)} classes with the most objects and detections are shown."
    elif len(used) < classes:
        note = (
            f" Not shown: {plural(classes - len(used), 'class', 'classes')} without objects and detections."
        )
    chosen = [*shown.tolist(), classes]
    heads = "".join(f"<th scope=col>{escape(names[c]) if c < classes else 'missed'}</th>" for c in chosen)
    body = []
    for row in chosen:
        total = counts[row].sum() or 1
        cells = "".join(
            f'<td class={"hit" if row == column else "miss"} style="--share:{100 * counts[row, column] / total:.0f}%">'
            f"{counts[row, column]}</td>"
            if counts[row, column]
            else "<td></td>"
            for column in chosen
        )
        name = escape(names[row]) if row < classes else "no object"
        body.append(f"<tr><th scope=row>{name}</th>{cells}</tr>")
    opened = " open" if len(chosen) <= 25 else ""
    return (
        f"<details{opened}><summary>Whole matrix <small>rows: true class; columns: predicted class</small></summary>"
        '<div class="wide-table tall" tabindex="0" role="region" aria-label="confusion matrix"><table class=matrix>'
        "<caption class=hidden>confusion matrix: rows are true classes, columns predicted classes</caption><thead><tr>"
        f"<th scope=col>true ↓ predicted →</th>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        "<p class=note>Diagonal: correct class. Last column: missed objects. Last row: detections without an object. "
        f"The tint shows the share of the row.{note}</p></details>"
    )
