"""The page of a comparison of two models on one data set: the verdict first, then what it rests on."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import pyarrow as pa

from raydetr.data.shards import Manifest
from raydetr.reports.page import about_data, facts, write_sections
from raydetr.reports.page_charts import forest_axis, forest_row, scale_of
from raydetr.reports.page_gallery import CONTROLS, caption_of, not_shown
from raydetr.reports.page_matching import Item, match_image
from raydetr.reports.page_pictures import Album, detections, open_album, rows_of, truth_kind
from raydetr.reports.page_tables import Cell, Column, name_cell, plain, sortable, words_cell
from raydetr.reports.page_text import IOU, figure_text, model_name, number, percent, plural, signed

MOST = 8
"""Images that got better, and that got worse."""
MIN_SCORE = 0.3
"""Least score of a detection that is drawn."""


def write_comparison(
    address: str,
    old_record: Mapping[str, Any],
    new_record: Mapping[str, Any],
    comparison: Mapping[str, Any],
    manifest: Manifest,
    old_predictions: pa.Table,
    new_predictions: pa.Table,
    decision: Mapping[str, Any] | None = None,
    metric: str = "AP",
) -> None:
    """Write the page of a comparison.

    Args:
        address: of the HTML file.
        old_record: the record, as in metrics.json, of the model that is there.
        new_record: of the one that may take its place.
        comparison: `figures` name → old, new, delta, low, high, probability_better; `classes` name → id, name, objects,
            old, new, delta, low, high of each; images, resamples, confidence; `changed` with better and worse image ids.
        manifest: the data set, for its images and their truth.
        old_predictions: a table of `predictions.PREDICTION_SCHEMA`.
        new_predictions: the other model's.
        decision: of the gate: promoted, rules (rule, passed, found, limit), reason; None: nothing was to be decided.
        metric: the figure that was decided by: the verdict and the classes are of it.
    """
    old, new = model_name(old_record["model"]), model_name(new_record["model"])
    if old == new:
        old, new = f"{old} (old)", f"{new} (new)"
    changed = comparison.get("changed", {})
    better, worse = (list(changed.get(kind, ()))[:MOST] for kind in ("better", "worse"))
    album = open_album(manifest, [*better, *worse], truth_kind(new_record))
    sides = rows_of(old_predictions, {*better, *worse}), rows_of(new_predictions, {*better, *worse})
    figures = _figures(comparison, old_record, new_record)
    controls = CONTROLS if better or worse else ""
    sections = {
        "figures": ("All figures", figures),
        "classes": ("Classes", _classes(comparison, metric)),
        "worse": ("Images that got worse", _images(worse, album, sides, controls)),
        "better": ("Images that got better", _images(better, album, sides, "" if worse else controls)),
        "about": ("How this was compared", _about(old_record, new_record, comparison)),
    }
    counted = {"classes": comparison.get("classes", {}).get(metric, ())}
    rows = [("old", old), ("new", new), *about_data(counted, manifest, new_record["data"])]
    rows.append(("images", f"{comparison.get('images', len(new_predictions)):,}"))
    lead = album.pixels() + _decision(decision) + _verdict(comparison, old, new, metric) + facts(rows)
    write_sections(address, f"{new} against {old}", lead, sections)


def _decision(decision: Mapping[str, Any] | None) -> str:
    """What the gate decided, and each of its rules."""
    if decision is None:
        return ""
    promoted = bool(decision["promoted"])
    rows = [
        [
            name_cell(str(rule["rule"])),
            Cell(
                '<span class="good">✓ passed</span>'
                if rule["passed"]
                else '<span class="bad">✗ failed</span>',
                kind="",
            ),
            Cell(escape(_plain(rule.get("found"))), kind=""),
            Cell(escape(_plain(rule.get("limit"))), kind=""),
        ]
        for rule in decision.get("rules", ())
    ]
    heads = [("rule", ""), ("outcome", ""), ("found", ""), ("asked for", "")]
    table = plain("rules of the promotion", heads, rows) if rows else ""
    return (
        f'<div class="verdict {"yes" if promoted else "no"}"><p class=big>{"✓ Promoted" if promoted else "✗ Not promoted"}'
        f"</p><p>{escape(str(decision.get('reason', '')))}</p></div>{table}"
    )


def _verdict(comparison: Mapping[str, Any], old: str, new: str, metric: str) -> str:
    """What changed, in a sentence with its interval and its probability."""
    known = {name: each for name, each in comparison["figures"].items() if _measured(each)}
    if not known:
        return '<div class="verdict"><p class=big>There is nothing to compare</p><p>The data set has no objects.</p></div>'
    name = next((name for name in (metric, "AP", "PQ", "mask_AP") if name in known), next(iter(known)))
    each = known[name]
    delta, low, high = each["delta"], each.get("low"), each.get("high")
    if low is not None and low > 0:
        kind, title = "yes", f"{new} is better"
    elif high is not None and high < 0:
        kind, title = "no", f"{new} is worse"
    else:
        kind, title = "", "No clear difference"
    change = f"{name} {'rose' if delta > 0 else 'fell' if delta < 0 else 'changed'} by {abs(delta):.3f}"
    text = f"{change}, from {number(each['old'])} ({old}) to {number(each['new'])} ({new})."
    if low is not None and high is not None:
        text += (
            f" With {percent(comparison.get('confidence', 0.95))} confidence the difference lies between "
            f"{signed(low)} and {signed(high)}."
        )
    if each.get("probability_better") is not None:
        text += f" The probability that {new} is the better one is {percent(each['probability_better'])}."
    meaning = f"<b>{name}</b>: {figure_text(name)[1]} All figures run from 0 to 1. {IOU}"
    return (
        f'<div class="verdict {kind}"><p class=big>{title}</p><p>{text}</p></div><p class=note>{meaning}</p>'
    )


def _figures(comparison: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    without_range = {
        name: {"old": old["figures"].get(name), "new": new["figures"].get(name), "delta": delta}
        for name, delta in comparison.get("deltas", {}).items()
    }
    every = {**without_range, **comparison["figures"]}
    known = {name: each for name, each in every.items() if _measured(each)}
    if not known:
        return ""
    scale = scale_of([(each["delta"], each.get("low"), each.get("high")) for each in known.values()])
    share = percent(comparison.get("confidence", 0.95))
    heads = [
        ("figure", ""),
        ("old", "number"),
        ("new", "number"),
        ("difference", "number"),
        (f"{share} range", "number"),
    ]
    heads += [(f"worse | better{forest_axis(scale)}", "axis"), ("probability better", "number")]
    rows = [
        [
            words_cell(*figure_text(name), "main" if name in ("AP", "PQ") else ""),
            *_change_cells(each, scale),
            Cell("–" if each.get("probability_better") is None else percent(each["probability_better"])),
        ]
        for name, each in known.items()
    ]
    return (
        "<p>A point is the difference, the line through it its range. Filled: the whole range is on one side of 0, so "
        f"that chance alone hardly explains it.</p><div class=compact>{plain('figures of both models', heads, rows)}</div>"
    )


def _classes(comparison: Mapping[str, Any], metric: str) -> str:
    every = comparison.get("classes", {}).get(metric, ())
    known = [each for each in every if _measured(each)]
    if not known:
        return ""
    known.sort(key=lambda each: each["delta"])
    scale = scale_of([(each["delta"], each.get("low"), each.get("high")) for each in known])
    title = metric.replace("_", " ")
    columns = [
        Column("class", "name of the class", "", descending=False),
        Column("objects", "in the truth"),
        Column(f"{title} old"),
        Column(f"{title} new"),
        Column("difference", f"of {title}", descending=False),
        Column("range", "its lower end", descending=False),
        Column("worse | better", f"of {title}", "axis", descending=False, head=forest_axis(scale)),
    ]
    rows = [
        [
            name_cell(str(each["name"])),
            Cell(f"{each['objects']:,}", each["objects"]),
            *_change_cells(each, scale),
        ]
        for each in known
    ]
    left_out = len(every) - len(known)
    note = f" {plural(left_out, 'class has', 'classes have')} no object and no figures." if left_out else ""
    return (
        "<p>The largest losses come first; a click on a heading sorts anew. Classes with few objects have wide ranges: "
        f"there, a large difference may be chance.{note}</p>"
        f"{sortable('classes-table', 'change of each class', columns, rows, by=4)}"
    )


def _change_cells(each: Mapping[str, Any], scale: float) -> list[Cell]:
    """Old, new, difference, range and chart."""
    low, high, delta = each.get("low"), each.get("high"), each["delta"]
    has_range = low is not None and high is not None
    return [
        Cell(number(each["old"]), each["old"]),
        Cell(number(each["new"]), each["new"]),
        Cell(signed(delta), delta),
        Cell(f"{signed(low)} to {signed(high)}" if has_range else "–", low, "number note"),
        Cell(forest_row(delta, low, high, scale), delta, "axis"),
    ]


def _images(
    image_ids: Sequence[int],
    album: Album,
    sides: tuple[Mapping[int, Mapping[str, Any]], Mapping[int, Mapping[str, Any]]],
    controls: str,
) -> str:
    """Images three times: with their truth, and with what each model finds."""
    if not image_ids:
        return ""
    figures = []
    for image_id in image_ids:
        if image_id not in album.shots:
            figures.append(not_shown(image_id, sides[1].get(image_id)))
            continue
        shot = album.shots[image_id]
        truth = album.picture(image_id, [("truth", shot.objects, [True] * len(shot.objects))])
        panels = f"<div><p>truth: {plural(len(shot.objects), 'object')}</p>{truth}</div>"
        for name, rows in zip(("old", "new"), sides, strict=True):
            items = detections(rows.get(image_id), shot.image.size[::-1], MIN_SCORE)
            panels += _panel(name, album, image_id, items)
        figures.append(
            f"<figure class=triple><div class=panels>{panels}</div>{caption_of(album, image_id, '')}</figure>"
        )
    return (
        f"<p>Solid lines are the truth, dashed lines with a score are predictions (from {MIN_SCORE:g} on). Labelled and "
        "thick are, with the models, detections that are wrong and objects that are missed; what is right is thin.</p>"
        f"{controls}<div class=gallery>{''.join(figures)}</div>"
    )


def _panel(name: str, album: Album, image_id: int, items: Sequence[Item]) -> str:
    objects = album.shots[image_id].objects
    verdict = match_image(objects, items)
    wrong = [kind not in ("right", "crowd") for kind in verdict.detections]
    missed = [fate == "missed" for fate in verdict.objects]
    picture = album.picture(image_id, [("truth", objects, missed), ("found", items, wrong)])
    words = f"{name}: {verdict.detections.count('right')} right, {sum(wrong)} wrong, {sum(missed)} missed"
    return f"<div><p>{words}</p>{picture}</div>"


def _about(old: Mapping[str, Any], new: Mapping[str, Any], comparison: Mapping[str, Any]) -> str:
    text = (
        "<p>Both models were scored on the same images by COCO's rules, as pycocotools does. The range of a difference: "
        f"{comparison.get('resamples', 0):,} data sets were drawn with replacement from the images (bootstrap), both "
        "models scored on each, and the middle of the differences taken. Being scored on the same images, the models "
        "can be told apart even where the ranges of their own figures overlap.</p>"
    )
    rows = []
    for title, path in (
        ("model", ("model", "address")),
        ("digest of the model", ("model", "digest")),
        ("data set", ("data", "address")),
        ("digest of the data set", ("data", "digest")),
        ("predictions", ("predictions",)),
        ("report", ("report",)),
    ):
        values = [_dig(record, path) for record in (old, new)]
        if any(values):
            rows.append(
                [name_cell(title), *(Cell(escape(str(value or "–")), kind="mono") for value in values)]
            )
    return text + plain("what was compared", [("", ""), ("old", ""), ("new", "")], rows)


def _dig(record: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = record
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _measured(each: Mapping[str, Any]) -> bool:
    return (
        all(each.get(key) is not None for key in ("old", "new", "delta"))
        and min(each["old"], each["new"]) >= 0
    )


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}".replace("-", "−") if isinstance(value, float) else str(value)
