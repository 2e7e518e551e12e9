"""The comparison report of two models on one data set: the verdict first, then the metrics that it is based on."""

from collections.abc import Mapping, Sequence
from html import escape

import pyarrow as pa

from raydetr.data.shards import Manifest
from raydetr.reports.page import about_data, facts, write_sections
from raydetr.reports.page_charts import forest_axis, forest_row, scale_of
from raydetr.reports.page_gallery import CONTROLS, MIN_SCORE, caption_of, not_shown
from raydetr.reports.page_matching import Item, match_image
from raydetr.reports.page_pictures import (
    Album,
    PredictedImage,
    detections,
    ground_truth_kind,
    open_album,
    read_predicted,
)
from raydetr.reports.page_tables import Cell, Column, name_cell, plain, sortable, words_cell
from raydetr.reports.page_text import IOU, metric_text, model_name, number, percent, plural, signed
from raydetr.results.comparison import Change, Comparison
from raydetr.results.decision import Decision
from raydetr.results.record import EvaluationRecord

MAX_IMAGES = 8
"""Maximum improved images, and maximum degraded images."""
_Change = tuple[float | None, float | None, float, float | None, float | None]
"""Old, new, difference, and its interval, which not every metric has."""


def write_comparison(
    uri: str,
    old_record: EvaluationRecord,
    new_record: EvaluationRecord,
    comparison: Comparison,
    manifest: Manifest,
    old_predictions: pa.Table,
    new_predictions: pa.Table,
    decision: Decision | None = None,
    metric: str = "AP",
) -> None:
    """Write the report of a comparison.

    Args:
        uri: URI of the HTML file.
        old_record: record of the current model.
        new_record: record of the candidate.
        comparison: from `promotion.compare.compare`.
        manifest: manifest of the data set, from which images and ground truth are read.
        old_predictions: predictions of the current model, a table of `predictions.PREDICTION_SCHEMA`.
        new_predictions: predictions of the candidate.
        decision: decision of the gate; None without a decision.
        metric: metric of the verdict and of the class table.
    """
    old, new = model_name(old_record.model), model_name(new_record.model)
    if old == new:
        old, new = f"{old} (old)", f"{new} (new)"
    better, worse = comparison.changed.better[:MAX_IMAGES], comparison.changed.worse[:MAX_IMAGES]
    album = open_album(manifest, [*better, *worse], ground_truth_kind(new_record))
    predictions = (
        read_predicted(old_predictions, {*better, *worse}),
        read_predicted(new_predictions, {*better, *worse}),
    )
    metrics = _metrics(comparison, old_record, new_record)
    controls = CONTROLS if better or worse else ""
    sections = {
        "figures": ("All metrics", metrics),
        "classes": ("Classes", _classes(comparison, metric)),
        "worse": ("Degraded images", _images(worse, album, predictions, controls)),
        "better": ("Improved images", _images(better, album, predictions, "" if worse else controls)),
        "about": ("Method", _about(old_record, new_record, comparison)),
    }
    objects = sum(each.objects for each in comparison.classes.get(metric, ()))
    rows = [("old", old), ("new", new), *about_data(objects, manifest, new_record.data)]
    rows.append(("images", f"{comparison.images:,}"))
    lead = album.pixels() + _decision(decision) + _verdict(comparison, old, new, metric) + facts(rows)
    write_sections(uri, f"{new} compared with {old}", lead, sections)


def _decision(decision: Decision | None) -> str:
    """Render the decision of the gate and its rules."""
    if decision is None:
        return ""
    rows = [
        [
            name_cell(rule.rule),
            Cell(
                '<span class="good">✓ passed</span>' if rule.passed else '<span class="bad">✗ failed</span>',
                kind="",
            ),
            Cell(escape(rule.found), kind=""),
            Cell(escape(rule.limit), kind=""),
        ]
        for rule in decision.rules
    ]
    heads = [("rule", ""), ("result", ""), ("found", ""), ("required", "")]
    table = plain("rules of the promotion", heads, rows) if rows else ""
    return (
        f'<div class="verdict {"yes" if decision.promoted else "no"}"><p class=big>'
        f"{'✓ Promoted' if decision.promoted else '✗ Not promoted'}</p><p>{escape(decision.reason)}</p></div>{table}"
    )


def _verdict(comparison: Comparison, old: str, new: str, metric: str) -> str:
    """Describe the change of the metric with its interval and the probability of an improvement."""
    known = {name: each for name, each in comparison.metrics.items() if each.is_measured}
    if not known:
        return '<div class="verdict"><p class=big>There is nothing to compare</p><p>The data set has no objects.</p></div>'
    name = next((name for name in (metric, "AP", "PQ", "mask_AP") if name in known), next(iter(known)))
    each = known[name]
    if each.low > 0:
        kind, title = "yes", f"{new} is better"
    elif each.high < 0:
        kind, title = "no", f"{new} is worse"
    else:
        kind, title = "", "No clear difference"
    verb = "rose" if each.delta > 0 else "fell" if each.delta < 0 else "changed"
    text = (
        f"{name} {verb} by {abs(each.delta):.3f}, from {number(each.old)} ({old}) to {number(each.new)} ({new}). The "
        f"{percent(comparison.confidence)} confidence interval of the difference is {signed(each.low)} to "
        f"{signed(each.high)}."
    )
    if each.probability_better is not None:
        text += f" The probability that {new} is better is {percent(each.probability_better)}."
    meaning = f"<b>{name}</b>: {metric_text(name)[1]} All metrics range from 0 to 1. {IOU}"
    return (
        f'<div class="verdict {kind}"><p class=big>{title}</p><p>{text}</p></div><p class=note>{meaning}</p>'
    )


def _metrics(comparison: Comparison, old: EvaluationRecord, new: EvaluationRecord) -> str:
    changes: dict[str, _Change] = {
        name: (old.metrics.get(name), new.metrics.get(name), delta, None, None)
        for name, delta in comparison.deltas.items()
    }
    changes |= {name: _values(each) for name, each in comparison.metrics.items()}
    known = {
        name: each for name, each in changes.items() if min(-1 if x is None else x for x in each[:2]) >= 0
    }
    if not known:
        return ""
    scale = scale_of([each[2:] for each in known.values()])
    share = percent(comparison.confidence)
    heads = [
        ("metric", ""),
        ("old", "number"),
        ("new", "number"),
        ("difference", "number"),
        (f"{share} interval", "number"),
    ]
    heads += [(f"worse | better{forest_axis(scale)}", "axis"), ("probability better", "number")]
    chances = {name: each.probability_better for name, each in comparison.metrics.items()}
    rows = [
        [
            words_cell(*metric_text(name), "main" if name in ("AP", "PQ") else ""),
            *_change_cells(each, scale),
            Cell("–" if (chance := chances.get(name)) is None else percent(chance)),
        ]
        for name, each in known.items()
    ]
    return (
        "<p>The point is the difference, and the line is its confidence interval. A filled point means that the "
        f"interval excludes 0.</p><div class=compact>{plain('metrics of both models', heads, rows)}</div>"
    )


def _classes(comparison: Comparison, metric: str) -> str:
    every = comparison.classes.get(metric, ())
    known = sorted((each for each in every if each.change.is_measured), key=lambda each: each.change.delta)
    if not known:
        return ""
    scale = scale_of([_values(each.change)[2:] for each in known])
    title = metric.replace("_", " ")
    columns = [
        Column("class", "name of the class", "", descending=False),
        Column("objects", "in the ground truth"),
        Column(f"{title} old"),
        Column(f"{title} new"),
        Column("difference", f"of {title}", descending=False),
        Column("interval", "sorted by its lower bound", descending=False),
        Column("worse | better", f"of {title}", "axis", descending=False, head=forest_axis(scale)),
    ]
    rows = [
        [
            name_cell(each.name),
            Cell(f"{each.objects:,}", each.objects),
            *_change_cells(_values(each.change), scale),
        ]
        for each in known
    ]
    skipped = len(every) - len(known)
    note = (
        f" {plural(skipped, 'class has', 'classes have')} no objects and therefore no metrics."
        if skipped
        else ""
    )
    return (
        "<p>The largest losses come first. Click a heading to sort. Classes with few objects have wide intervals, so a "
        f"large difference may be due to chance.{note}</p>"
        f"{sortable('classes-table', 'change of each class', columns, rows, by=4)}"
    )


def _values(change: Change) -> _Change:
    return change.old, change.new, change.delta, change.low, change.high


def _change_cells(change: _Change, scale: float) -> list[Cell]:
    """Return the cells for old, new, difference, interval and chart."""
    old, new, delta, low, high = change
    has_interval = low is not None and high is not None
    return [
        Cell(number(old), old),
        Cell(number(new), new),
        Cell(signed(delta), delta),
        Cell(f"{signed(low)} to {signed(high)}" if has_interval else "–", low, "number note"),
        Cell(forest_row(delta, low, high, scale), delta, "axis"),
    ]


def _images(
    image_ids: Sequence[int],
    album: Album,
    predictions: tuple[Mapping[int, PredictedImage], Mapping[int, PredictedImage]],
    controls: str,
) -> str:
    """Render each image three times: with the ground truth and with the predictions of each model."""
    if not image_ids:
        return ""
    figures = []
    for image_id in image_ids:
        if image_id not in album.entries:
            figures.append(not_shown(image_id, predictions[1].get(image_id)))
            continue
        entry = album.entries[image_id]
        ground_truth = album.overlay(image_id, [("truth", entry.objects, [True] * len(entry.objects))])
        panels = f"<div><p>ground truth: {plural(len(entry.objects), 'object')}</p>{ground_truth}</div>"
        for name, predicted in zip(("old", "new"), predictions, strict=True):
            items = detections(predicted.get(image_id), entry.image.size[::-1], MIN_SCORE)
            panels += _panel(name, album, image_id, items)
        figures.append(
            f"<figure class=triple><div class=panels>{panels}</div>{caption_of(album, image_id, '')}</figure>"
        )
    return (
        f"<p>Solid lines are the ground truth. Dashed lines are predictions with a score of at least {MIN_SCORE:g}. In "
        "the images of the models, wrong detections and missed objects have thick lines and labels. Correct detections "
        "have thin lines.</p>"
        f"{controls}<div class=gallery>{''.join(figures)}</div>"
    )


def _panel(name: str, album: Album, image_id: int, items: Sequence[Item]) -> str:
    objects = album.entries[image_id].objects
    matching = match_image(objects, items)
    wrong = [kind not in ("right", "crowd") for kind in matching.detections]
    missed = [status == "missed" for status in matching.objects]
    overlay = album.overlay(image_id, [("truth", objects, missed), ("found", items, wrong)])
    words = f"{name}: {matching.detections.count('right')} correct, {sum(wrong)} wrong, {sum(missed)} missed"
    return f"<div><p>{words}</p>{overlay}</div>"


def _about(old: EvaluationRecord, new: EvaluationRecord, comparison: Comparison) -> str:
    text = (
        "<p>Both models were scored on the same images by COCO's rules, like pycocotools. The confidence interval of a "
        f"difference is computed by paired bootstrap: {comparison.resamples:,} data sets are drawn with "
        "replacement from the images, both models are scored on each, and the interval is the middle of the "
        "differences. Because both models are scored on the same images, a difference can be significant even if the "
        "intervals of their own metrics overlap.</p>"
    )
    rows = []
    for title, *values in (
        ("model", old.model.uri, new.model.uri),
        ("digest of the model", old.model.digest, new.model.digest),
        ("data set", old.data.uri, new.data.uri),
        ("digest of the data set", old.data.digest, new.data.digest),
        ("predictions", old.predictions, new.predictions),
        ("report", old.report, new.report),
    ):
        if any(values):
            rows.append([name_cell(title), *(Cell(escape(value or "–"), kind="mono") for value in values)])
    return text + plain("what was compared", [("", ""), ("old", ""), ("new", "")], rows)
