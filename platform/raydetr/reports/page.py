"""The evaluation report: a self-contained HTML page that explains its metrics to readers without prior knowledge."""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape, unescape
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from raydetr import storage
from raydetr.data.shards import Manifest
from raydetr.reports.html import document
from raydetr.reports.page_charts import curves, line_path
from raydetr.reports.page_errors import calibration_section, confusion_section, error_section, findings
from raydetr.reports.page_gallery import gallery_section
from raydetr.reports.page_pictures import ground_truth_kind
from raydetr.reports.page_tables import Cell, Column, metric_cell, name_cell, plain, sortable, words_cell
from raydetr.reports.page_text import (
    BOX_METRICS,
    IOU,
    PANOPTIC_METRICS,
    data_name,
    metric_text,
    model_name,
    number,
    percent,
    plural,
    with_interval,
)
from raydetr.results.analysis import Analysis
from raydetr.results.record import EvaluationData, EvaluationRecord

Part = TypeVar("Part")
STYLE = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")
_HEADLINES = ("AP", "AP50", "AP75", "mask_AP", "PQ")
_SIZES = {"small": "under 32 × 32 pixels", "medium": "up to 96 × 96 pixels", "large": "over 96 × 96 pixels"}
_LINES = {
    "loose": ("all classes, IoU 0.50", "0.50"),
    "tight": ("all classes, IoU 0.75", "0.75"),
    "mean": ("all classes, mean of IoU 0.50 to 0.95", "mean"),
}


def write_page(
    uri: str,
    record: EvaluationRecord,
    analysis: Analysis,
    manifest: Manifest,
    predictions: pa.Table,
) -> None:
    """Write the report of an evaluation.

    Args:
        uri: URI of the HTML file.
        record: record of the evaluation. Its date defaults to today.
        analysis: analysis of the predictions. Sections without data are omitted.
        manifest: manifest of the data set, from which images and ground truth are read.
        predictions: table of `predictions.PREDICTION_SCHEMA`.
    """
    sections = {
        "summary": ("Summary", _summary(record, analysis, manifest)),
        "figures": ("All metrics", _metrics(analysis)),
        "classes": ("Classes", _classes(analysis)),
        "curves": ("Precision-recall curves", _curves(analysis)),
        "scores": ("Calibration of scores", _part(analysis.calibration, calibration_section)),
        "errors": ("Error breakdown", _part(analysis.errors, error_section)),
        "confusions": ("Confusion matrix", _part(analysis.confusion, confusion_section)),
        "images": (
            "Worst images",
            gallery_section(analysis, manifest, predictions, ground_truth_kind(record)),
        ),
        "slices": ("Metrics by slice", _slices(analysis)),
        "about": ("Method", _about(record, analysis, manifest)),
    }
    title = f"{model_name(record.model)} on {data_name(record.data)}"
    lead = f"<p class=lead>Evaluation of a detector on {plural(analysis.images, 'labeled image')}.</p>"
    write_sections(uri, f"Evaluation: {title}", lead, sections)


def write_sections(uri: str, title: str, lead: str, sections: Mapping[str, tuple[str, str]]) -> None:
    """Write a page of sections, with links to them at the top.

    Args:
        uri: URI of the HTML file.
        title: HTML.
        lead: HTML under the title.
        sections: id → title and HTML. Sections with empty HTML are omitted.
    """
    shown = {name: section for name, section in sections.items() if section[1]}
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, (heading, _) in shown.items())
    body = "".join(
        f'<section id="{name}"><h2>{heading}</h2>{content}</section>'
        for name, (heading, content) in shown.items()
    )
    page = f'<main><h1>{title}</h1>{lead}<nav aria-label="sections"><ul>{links}</ul></nav>{body}</main>'
    storage.write_bytes(uri, document(unescape(title), page, STYLE.read_text(), SCRIPT.read_text()))


def about_data(objects: int, manifest: Manifest, data: EvaluationData) -> list[tuple[str, str]]:
    """Return facts about the data set as (name, value), HTML."""
    return [
        ("data set", data_name(data)),
        ("objects", f"{objects:,}"),
        ("classes", f"{len(manifest.categories):,}"),
    ]


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Render names and values, both HTML, as a list of facts."""
    return f"<dl class=facts>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in rows)}</dl>"


def _part(part: Part | None, section: Callable[[Part], str]) -> str:
    return "" if part is None else section(part)


def _summary(record: EvaluationRecord, analysis: Analysis, manifest: Manifest) -> str:
    metrics, intervals = analysis.metrics, analysis.intervals
    cards = []
    for name in _HEADLINES:
        if name not in metrics:
            continue
        title, words = metric_text(name)
        value, *rest = with_interval(metrics[name], intervals.get(name)).split(" ", 1)
        interval = f" <small>{rest[0]}</small>" if rest else ""
        cards.append(f"<div><dt>{title}</dt><dd>{value}{interval}</dd><dd class=words>{words}</dd></div>")
    items = "".join(f"<li>{sentence}</li>" for sentence in findings(analysis))
    share = percent(analysis.confidence)
    range_note = (
        f"The range in parentheses is the {share} confidence interval of the metric on other images of the same kind. "
        if intervals
        else ""
    )
    objects = sum(each.objects for each in analysis.classes)
    rows = [
        ("model", model_name(record.model)),
        *about_data(objects, manifest, record.data),
        ("images", f"{analysis.images:,}"),
        ("undecodable", f"{analysis.undecodable:,}"),
        ("date", escape(_date(record))),
    ]
    return (
        f"<dl class=headline>{''.join(cards)}</dl><p class=note>All metrics range from 0 (worst) to 1 (perfect). "
        f"{range_note}{IOU}</p>{f'<ul class=findings>{items}</ul>' if items else ''}{facts(rows)}"
    )


def _metrics(analysis: Analysis) -> str:
    metrics, intervals = analysis.metrics, analysis.intervals
    prefixes = ["", "mask_"] if any(f"mask_{name}" in metrics for name in BOX_METRICS) else [""]
    ranges = f"{percent(analysis.confidence)} interval"
    heads = [("metric", "")]
    for prefix in prefixes:
        heads += [("masks" if prefix else "boxes", "number"), (ranges, "number")]
    rows = []
    for name in BOX_METRICS:
        if name in metrics:
            row = [words_cell(*metric_text(name), "main" if name == "AP" else "")]
            rows.append(
                [*row, *(cell for prefix in prefixes for cell in _value(metrics, intervals, prefix + name))]
            )
    table = plain("metrics of boxes and masks", heads, rows)
    if any(value < 0 for value in metrics.values()):
        table += "<p class=note>A dash means that the data set has no objects of that kind.</p>"
    if "PQ" in metrics:
        heads = [
            ("metric", ""),
            ("all", "number"),
            (ranges, "number"),
            ("things", "number"),
            ("stuff", "number"),
        ]
        rows = [
            [
                words_cell(*metric_text(name), "main" if name == "PQ" else ""),
                *_value(metrics, intervals, name),
                metric_cell(metrics.get(f"{name}_things")),
                metric_cell(metrics.get(f"{name}_stuff")),
            ]
            for name in PANOPTIC_METRICS
        ]
        table += "<h3>Segments (panoptic)</h3>" + plain("metrics of panoptic segments", heads, rows)
        table += "<p class=note>Things can be counted (people, cars), stuff cannot (sky, grass).</p>"
    return table


def _value(
    metrics: Mapping[str, float], intervals: Mapping[str, tuple[float, float]], name: str
) -> list[Cell]:
    value = metric_cell(metrics.get(name))
    if name not in intervals or value.value is None:
        return [value, Cell("")]
    low, high = intervals[name]
    return [value, Cell(f"{max(low, 0):.3f} to {high:.3f}", kind="number note")]


_CLASS_METRICS = {
    "AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_small": "AP small", "AP_medium": "AP medium",
    "AP_large": "AP large", "AR_100": "recall", "mask_AP": "mask AP", "mask_AP50": "mask AP50", "PQ": "PQ",
    "SQ": "SQ", "RQ": "RQ",
}  # fmt: skip


def _classes(analysis: Analysis) -> str:
    classes = sorted(analysis.classes, key=lambda each: (-each.objects, each.name))
    if not classes:
        return ""
    shown = {
        key: title for key, title in _CLASS_METRICS.items() if any(key in each.metrics for each in classes)
    }
    columns = [Column("class", "name of the class", "", descending=False)]
    columns += [Column("objects", "in the ground truth"), Column("images", "with objects of the class")]
    columns += [Column(title, metric_text(key)[1] or title) for key, title in shown.items()]
    columns.append(Column("best threshold", "score threshold with the best F1"))
    columns.append(Column("best F1", "best harmonic mean of precision and recall at IoU 0.50"))
    rows = [
        [
            name_cell(each.name),
            Cell(f"{each.objects:,}", each.objects),
            Cell(f"{each.images:,}", each.images),
            *(metric_cell(each.metrics.get(key)) for key in shown),
            Cell(number(each.best_threshold, 2), _known(each.best_threshold)),
            metric_cell(each.best_f1),
        ]
        for each in classes
    ]
    empty = sum(each.objects == 0 for each in classes)
    note = (
        f" {plural(empty, 'class has', 'classes have')} no objects and therefore no metrics." if empty else ""
    )
    search = (
        '<div class="controls script-only"><label>Find a class <input type="search" data-filter="classes-table"></label></div>'
        if len(classes) > 12
        else ""
    )
    return (
        "<p>Click a heading to sort. Metrics of classes with few objects are uncertain. Best threshold: the minimum "
        f"score to use for the class if missed objects and false positives matter equally.{note}</p>"
        f"{search}{sortable('classes-table', 'metrics of each class', columns, rows, by=1)}"
    )


def _known(value: float | None) -> float | None:
    return None if value is None or value < 0 else value


def _curves(analysis: Analysis) -> str:
    data = analysis.curves
    if data is None or not any(max(line, default=-1) >= 0 for line in data.overall.values()):
        return ""
    recall = data.recall
    lines: dict[str, Sequence[float]] = {
        kind: data.overall[key] for kind, (_, key) in _LINES.items() if key in data.overall
    }
    chart = curves(
        recall, {**lines, "one": []}, "precision over recall for all classes, and for a selected class"
    )
    legend = "".join(f"<li>{_sample(kind)}{_LINES[kind][0]}</li>" for kind in lines)
    names = {str(each.id): each.name for each in analysis.classes}
    measured = {str(key): line for key, line in data.classes.items() if max(line, default=-1) >= 0}
    named = sorted((names.get(key, key).lower(), names.get(key, key), key) for key in measured)
    options = "".join(f'<option value="{escape(key)}">{escape(name)}</option>' for _, name, key in named)
    paths = json.dumps({"lines": {key: line_path(recall, line) for key, line in measured.items()}})
    rows = [
        [Cell(f"{recall[index]:.1f}", kind=""), *(Cell(number(line[index], 2)) for line in lines.values())]
        for index in range(0, len(recall), 10)
    ]
    heads = [("recall", ""), *((_LINES[kind][0].removeprefix("all classes, "), "number") for kind in lines)]
    return (
        f"<div class=side-by-side>{chart}<div><p>To find more objects (right), a detector must accept detections with "
        "lower scores, of which more are wrong (down). A higher curve is better. AP is the area under the curve."
        f'</p><ul class="legend">{legend}<li id="curve-legend" hidden>{_sample("one")}<span></span></li></ul>'
        '<div class="controls script-only"><label>Add a class at IoU 0.50: <select id="curve-class"><option '
        f'value="">none</option>{options}</select></label></div><details><summary>Curves as numbers</summary>'
        f"{plain('precision at steps of recall', heads, rows)}</details></div></div>"
        f'<script type="application/json" id="curve-data">{paths.replace("<", chr(92) + "u003c")}</script>'
    )


def _sample(kind: str) -> str:
    return f'<svg class=plot viewBox="0 0 34 10" aria-hidden="true"><path class="curve {kind}" d="M0 5H34"/></svg>'


def _slices(analysis: Analysis) -> str:
    metrics = analysis.metrics
    heads = [("", ""), ("images", "number"), ("objects", "number"), ("AP", "number"), ("AP50", "number")]
    parts = []
    if all(f"AP_{size}" in metrics for size in _SIZES):
        rows = [
            [words_cell(size, words), metric_cell(metrics[f"AP_{size}"]), metric_cell(metrics[f"AR_{size}"])]
            for size, words in _SIZES.items()
        ]
        table = plain("metrics by object size", [("", ""), ("AP", "number"), ("recall", "number")], rows)
        parts.append(f"<div><h3>By object size</h3>{table}</div>")
    for name, slices in analysis.slices.items():
        rows = [
            [
                name_cell(each.name),
                Cell(f"{each.images:,}"),
                Cell(f"{each.objects:,}"),
                metric_cell(each.ap),
                metric_cell(each.ap50),
            ]
            for each in slices
        ]
        if rows:
            parts.append(f"<div><h3>By {escape(name)}</h3>{plain(f'metrics by {name}', heads, rows)}</div>")
    return f"<div class=charts>{''.join(parts)}</div>"


def _about(record: EvaluationRecord, analysis: Analysis, manifest: Manifest) -> str:
    rows = [
        ("model", record.model.uri),
        ("digest of the model", record.model.digest),
        ("data set", record.data.uri),
        ("digest of the data set", record.data.digest or manifest.digest),
        ("predictions", record.predictions),
        ("analysis", record.analysis),
        ("MLflow run", record.run_id),
        *((f"setting: {name}", value) for name, value in record.settings.items()),
    ]
    text = (
        "<p>Boxes and masks are scored by COCO's rules, like pycocotools: all detections count, up to 100 per image, "
        "without a score threshold. Objects of images that cannot be decoded count as missed.</p>"
    )
    if analysis.resamples:
        text += (
            f"<p>Confidence intervals are computed by bootstrap: {analysis.resamples:,} data sets are drawn with "
            f"replacement from the images, and the interval is the middle {percent(analysis.confidence)} "
            "of their metrics.</p>"
        )
    table = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td class=mono>{escape(str(value))}</td></tr>"
        for name, value in rows
        if value not in (None, "")
    )
    table = f"<div class=wide-table><table>{table}</table></div>"
    if record.undecodable:
        items = "".join(
            f"<li>image {image_id}: {escape(reason)}</li>"
            for image_id, reason in list(record.undecodable.items())[:100]
        )
        count = plural(
            record.num_undecodable or len(record.undecodable),
            "image that cannot be decoded",
            "images that cannot be decoded",
        )
        table += f"<details><summary>{count}</summary><ul>{items}</ul></details>"
    return text + table


def _date(record: EvaluationRecord) -> str:
    given = record.date
    day = datetime.datetime.fromisoformat(given) if given else datetime.datetime.now(datetime.UTC)
    return f"{day.day} {day:%B %Y}"
