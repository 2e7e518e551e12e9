"""Sections of the evaluation's page on what goes wrong: kinds of error, confusions, scores that promise too much."""

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from raydetr.reports.page_charts import calibration
from raydetr.reports.page_tables import Cell, name_cell, plain, words_cell
from raydetr.reports.page_text import ERRORS, number, percent, plural

MOST_LISTED = 15
MOST_IN_MATRIX = 100


def error_section(errors: Mapping[str, Any]) -> str:
    """Kinds of error as bars, each with its number and with what it costs."""
    counts, costs = errors["counts"], errors["cost"]
    kinds = sorted(counts, key=lambda kind: (-costs.get(kind, 0), -counts[kind]))
    most = max([*costs.values(), 1e-9])
    rows = [
        [
            words_cell(ERRORS[kind][0], ERRORS[kind][1]),
            Cell(f"{counts[kind]:,}"),
            Cell(_bar(max(costs.get(kind, 0), 0) / most), kind="bar"),
            Cell(number(max(costs.get(kind, 0), 0))),
        ]
        for kind in kinds
        if kind in ERRORS
    ]
    heads = [("kind", ""), ("number", "number"), ("cost in AP50", ""), ("", "number")]
    return (
        f"<p>AP50 is {number(errors['AP50'])} when only detections with a score of at least {errors['min_score']:g} "
        "count. The cost of a kind is what AP50 would gain if all errors of this kind were put right and nothing else; "
        f"the costs do not add up.</p><div class=costs>{plain('kinds of error', heads, rows)}</div>"
    )


def _bar(share: float) -> str:
    return (
        '<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{100 * share:.2f}" height="8"/></svg>'
    )


def confusion_section(confusion: Mapping[str, Any]) -> str:
    """The most frequent confusions of two classes as a list, and the whole matrix."""
    names, counts = confusion["names"], np.asarray(confusion["counts"], dtype=np.int64)
    classes = len(names) - 1
    if classes < 1 or not counts.any():
        return "<p>There is nothing to compare: no objects and no detections.</p>"
    pairs = _worst_pairs(counts[:classes, :classes])
    rows = [
        [
            name_cell(names[true]),
            Cell(escape(names[found]), kind=""),
            Cell(f"{counts[true, found]:,}"),
            Cell(percent(counts[true, found] / counts[true].sum())),
        ]
        for true, found in pairs[:MOST_LISTED]
    ]
    listed = "<p>No object was taken for one of another class.</p>"
    if rows:
        more = len(pairs) - MOST_LISTED
        heading = f"The {MOST_LISTED} most frequent of {len(pairs)} confusions" if more > 0 else "Confusions"
        heads = [("an object of", ""), ("was named", ""), ("times", "number"), ("of its objects", "number")]
        listed = f"<h3>{heading}</h3><div class=narrow>{plain('most frequent confusions', heads, rows)}</div>"
    lead = (
        f"<p>Each object is paired with the detection that covers it best (IoU of at least {confusion['iou']:g}, score "
        f"of at least {confusion['min_score']:g}), whatever its class.</p>"
    )
    return lead + listed + _matrix(names, counts)


def calibration_section(data: Mapping[str, Any]) -> str:
    """How far a score can be taken for a probability."""
    bins = [each for each in data["bins"] if each["count"]]
    if not bins:
        return "<p>There are no detections.</p>"
    total = sum(each["count"] for each in bins)
    gap = sum(each["count"] * (each["accuracy"] - each["confidence"]) for each in bins) / total
    direction = "higher" if gap > 0 else "lower"
    verdict = (
        "On the whole the scores can be taken for probabilities."
        if data["ece"] < 0.05
        else f"On average the share that is right is {abs(gap):.2f} {direction} than the score says."
        if abs(gap) >= 0.02
        else "Scores too high in one range and too low in another balance each other."
    )
    chart = calibration(
        bins, f"calibration diagram: share of right detections by score; error {data['ece']:.3f}"
    )
    return (
        f"<div class=beside>{chart}<div><p>Of detections with a score of 0.8, eight in ten should be right: then the bars reach the dashed "
        f"line. {verdict}</p><p class=note>Expected calibration error {data['ece']:.3f} (mean distance from the line, "
        f"weighted by detections), largest {data['mce']:.3f}; {plural(total, 'detection')}. Darker bars hold more "
        "of them.</p></div></div>"
    )


def findings(analysis: Mapping[str, Any]) -> list[str]:
    """The few sentences that somebody in a hurry should read; HTML."""
    found = []
    errors, confusion = analysis.get("errors"), analysis.get("confusion")
    if errors and any(cost > 0.0005 for cost in errors["cost"].values()):
        kind = max(errors["cost"], key=errors["cost"].__getitem__)
        found.append(
            f"Most is lost to <b>{ERRORS[kind][2]}</b>: {plural(errors['counts'][kind], 'case')}. Were they put right, "
            f"AP50 would be {errors['cost'][kind]:.3f} higher."
        )
    known = [each for each in analysis.get("classes", ()) if each["objects"] >= 10 and each["AP"] >= 0]
    if len(known) > 2:
        known.sort(key=lambda each: each["AP"])
        weakest = ", ".join(f"<b>{escape(str(each['name']))}</b> ({each['AP']:.2f})" for each in known[:3])
        best = known[-1]
        found.append(
            f"Weakest classes by AP, among those with at least ten objects: {weakest}. Strongest: "
            f"<b>{escape(str(best['name']))}</b> ({best['AP']:.2f})."
        )
    if confusion:
        counts = np.asarray(confusion["counts"], dtype=np.int64)
        pairs = _worst_pairs(counts[:-1, :-1])
        if pairs and counts[pairs[0]] > 2:
            true, found_as = (escape(confusion["names"][index]) for index in pairs[0])
            times = counts[pairs[0]]
            found.append(
                f"Most frequent confusion: <b>{true}</b> named <b>{found_as}</b> ({plural(int(times), 'time')})."
            )
    return found


def _worst_pairs(counts: np.ndarray) -> list[tuple[int, int]]:
    """(truth, prediction) of different classes, the most frequent first."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    rows, columns = np.nonzero(wrong)
    times = wrong[rows, columns]
    order = np.lexsort((-times / counts.sum(1)[rows], -times))
    return [(int(rows[index]), int(columns[index])) for index in order]


def _matrix(names: list[str], counts: np.ndarray) -> str:
    """The matrix of the classes that occur, background last, tinted by the share of a row."""
    classes = len(names) - 1
    used = np.flatnonzero(counts.sum(0)[:classes] + counts.sum(1)[:classes])
    shown, note = used, ""
    if len(used) > MOST_IN_MATRIX:
        weight = counts.sum(1)[used] + counts.sum(0)[used]
        shown = np.sort(used[np.argsort(-weight, kind="stable")[:MOST_IN_MATRIX]])
        note = f" Of {len(used)} classes the {MOST_IN_MATRIX} with the most objects and detections are shown."
    elif len(used) < classes:
        note = (
            f" {plural(classes - len(used), 'class', 'classes')} without objects and detections are left out."
        )
    chosen = [*shown.tolist(), classes]
    heads = "".join(f"<th scope=col>{escape(names[c]) if c < classes else 'not found'}</th>" for c in chosen)
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
        f"<details{opened}><summary>Whole matrix <small>rows: truth; columns: what it was named</small></summary>"
        '<div class="wide-table tall" tabindex="0" role="region" aria-label="confusion matrix"><table class=matrix>'
        "<caption class=hidden>confusion matrix: rows are the truth, columns the prediction</caption><thead><tr>"
        f"<th scope=col>truth ↓ named →</th>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        "<p class=note>On the diagonal: named rightly. Last column: objects that were not found. Last row: detections "
        f"where there is no object. The tint is the share of the row.{note}</p></details>"
    )
