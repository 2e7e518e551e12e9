"""The page of an evaluation: one HTML file, with nothing outside of it, for somebody who has read no manual."""

import datetime
import json
from collections.abc import Mapping, Sequence
from html import escape, unescape
from pathlib import Path
from typing import Any

import pyarrow as pa

from raydetr import storage
from raydetr.data.shards import Manifest
from raydetr.reports.html import document
from raydetr.reports.page_charts import curves, line_path
from raydetr.reports.page_errors import calibration_section, confusion_section, error_section, findings
from raydetr.reports.page_gallery import gallery_section
from raydetr.reports.page_pictures import truth_kind
from raydetr.reports.page_tables import Cell, Column, figure_cell, name_cell, plain, sortable, words_cell
from raydetr.reports.page_text import (
    BOX_FIGURES,
    IOU,
    PANOPTIC_FIGURES,
    data_name,
    figure_text,
    model_name,
    number,
    percent,
    plural,
    with_interval,
)

STYLE = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")
_HEADLINES = ("AP", "AP50", "AP75", "mask_AP", "PQ")
_SIZES = {"small": "under 32 × 32 pixels", "medium": "up to 96 × 96 pixels", "large": "above"}
_LINES = {
    "loose": ("all classes, IoU 0.50", "0.50"),
    "tight": ("all classes, IoU 0.75", "0.75"),
    "mean": ("all classes, mean of IoU 0.50 to 0.95", "mean"),
}


def write_page(
    address: str,
    record: Mapping[str, Any],
    analysis: Mapping[str, Any],
    manifest: Manifest,
    predictions: pa.Table,
) -> None:
    """Write the page of an evaluation.

    Args:
        address: of the HTML file.
        record: as in metrics.json. `date` (ISO 8601) is today where it has none.
        analysis: as in analysis.json; parts that it does not have are left out of the page.
        manifest: the data set, for its images and their truth.
        predictions: a table of `predictions.PREDICTION_SCHEMA`.
    """
    sections = {
        "summary": ("In short", _summary(record, analysis, manifest)),
        "figures": ("All figures", _figures(analysis)),
        "classes": ("Classes", _classes(analysis)),
        "curves": ("Precision and recall", _curves(analysis)),
        "scores": ("How far scores can be trusted", _part(analysis, "calibration", calibration_section)),
        "errors": ("What goes wrong", _part(analysis, "errors", error_section)),
        "confusions": ("Which classes are confused", _part(analysis, "confusion", confusion_section)),
        "images": ("The worst images", gallery_section(analysis, manifest, predictions, truth_kind(record))),
        "slices": ("Where it works better and worse", _slices(analysis)),
        "about": ("How this was measured", _about(record, analysis, manifest)),
    }
    title = f"{model_name(record['model'])} on {data_name(record['data'])}"
    lead = f"<p class=lead>Evaluation of a detector: what it finds in {plural(analysis['images'], 'image')} that people have labelled, and what it does not.</p>"
    write_sections(address, f"Evaluation: {title}", lead, sections)


def write_sections(address: str, title: str, lead: str, sections: Mapping[str, tuple[str, str]]) -> None:
    """Write a page of sections with their list on top.

    Args:
        address: of the HTML file.
        title: HTML.
        lead: HTML under the title.
        sections: id → title and HTML; empty ones are left out, with their title.
    """
    there = {name: section for name, section in sections.items() if section[1]}
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, (heading, _) in there.items())
    body = "".join(
        f'<section id="{name}"><h2>{heading}</h2>{content}</section>'
        for name, (heading, content) in there.items()
    )
    page = f'<main><h1>{title}</h1>{lead}<nav aria-label="sections"><ul>{links}</ul></nav>{body}</main>'
    storage.write_bytes(address, document(unescape(title), page, STYLE.read_text(), SCRIPT.read_text()))


def about_data(
    analysis: Mapping[str, Any], manifest: Manifest, data: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """What the data set is, as facts, HTML; of `analysis` the classes are needed."""
    return [
        ("data set", data_name(data)),
        ("objects", f"{sum(each['objects'] for each in analysis.get('classes', ())):,}"),
        ("classes", f"{len(manifest.categories):,}"),
    ]


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, HTML, as a list of short facts."""
    return f"<dl class=facts>{''.join(f'<div><dt>{name}</dt><dd>{value}</dd></div>' for name, value in rows)}</dl>"


def _part(analysis: Mapping[str, Any], name: str, section: Any) -> str:
    return section(analysis[name]) if analysis.get(name) else ""


def _summary(record: Mapping[str, Any], analysis: Mapping[str, Any], manifest: Manifest) -> str:
    figures, intervals = analysis["figures"], analysis.get("intervals", {})
    cards = []
    for name in _HEADLINES:
        if name not in figures:
            continue
        title, words = figure_text(name)
        value, *rest = with_interval(figures[name], intervals.get(name)).split(" ", 1)
        interval = f" <small>{rest[0]}</small>" if rest else ""
        cards.append(f"<div><dt>{title}</dt><dd>{value}{interval}</dd><dd class=words>{words}</dd></div>")
    items = "".join(f"<li>{sentence}</li>" for sentence in findings(analysis))
    share = percent(analysis.get("confidence", 0.95))
    range_note = (
        f"In brackets: the range in which the figure lies with {share} confidence, if other images of the same kind "
        "were taken. "
        if intervals
        else ""
    )
    rows = [
        ("model", model_name(record["model"])),
        *about_data(analysis, manifest, record["data"]),
        ("images", f"{analysis['images']:,}"),
        ("not decodable", f"{analysis.get('undecodable', 0):,}"),
        ("date", escape(_date(record))),
    ]
    return (
        f"<dl class=headline>{''.join(cards)}</dl><p class=note>All figures run from 0 (nothing right) to 1 (perfect). "
        f"{range_note}{IOU}</p>{f'<ul class=findings>{items}</ul>' if items else ''}{facts(rows)}"
    )


def _figures(analysis: Mapping[str, Any]) -> str:
    figures, intervals = analysis["figures"], analysis.get("intervals", {})
    prefixes = ["", "mask_"] if any(f"mask_{name}" in figures for name in BOX_FIGURES) else [""]
    ranges = f"{percent(analysis.get('confidence', 0.95))} range"
    heads = [("figure", "")]
    for prefix in prefixes:
        heads += [("masks" if prefix else "boxes", "number"), (ranges, "number")]
    rows = []
    for name in BOX_FIGURES:
        if name in figures:
            row = [words_cell(*figure_text(name), "main" if name == "AP" else "")]
            rows.append(
                [*row, *(cell for prefix in prefixes for cell in _value(figures, intervals, prefix + name))]
            )
    table = plain("figures of boxes and masks", heads, rows)
    if any(value is not None and value < 0 for value in figures.values()):
        table += "<p class=note>A dash in place of a figure: the data set has no object of that kind.</p>"
    if "PQ" in figures:
        heads = [
            ("figure", ""),
            ("all", "number"),
            (ranges, "number"),
            ("things", "number"),
            ("stuff", "number"),
        ]
        rows = [
            [
                words_cell(*figure_text(name), "main" if name == "PQ" else ""),
                *_value(figures, intervals, name),
                figure_cell(figures.get(f"{name}_things")),
                figure_cell(figures.get(f"{name}_stuff")),
            ]
            for name in PANOPTIC_FIGURES
        ]
        table += "<h3>Segments (panoptic)</h3>" + plain("figures of panoptic segments", heads, rows)
        table += "<p class=note>Things can be counted (people, cars), stuff cannot (sky, grass).</p>"
    return table


def _value(figures: Mapping[str, Any], intervals: Mapping[str, Any], name: str) -> list[Cell]:
    value = figure_cell(figures.get(name))
    if name not in intervals or value.value is None:
        return [value, Cell("")]
    low, high = intervals[name]
    return [value, Cell(f"{max(low, 0):.3f} to {high:.3f}", kind="number note")]


_CLASS_FIGURES = {
    "AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_small": "AP small", "AP_medium": "AP medium",
    "AP_large": "AP large", "AR_100": "recall", "mask_AP": "mask AP", "mask_AP50": "mask AP50", "PQ": "PQ",
    "SQ": "SQ", "RQ": "RQ",
}  # fmt: skip


def _classes(analysis: Mapping[str, Any]) -> str:
    classes = sorted(analysis.get("classes", ()), key=lambda each: (-each["objects"], str(each["name"])))
    if not classes:
        return ""
    shown = {key: title for key, title in _CLASS_FIGURES.items() if any(key in each for each in classes)}
    columns = [Column("class", "name of the class", "", descending=False)]
    columns += [Column("objects", "in the truth"), Column("images", "with such objects")]
    columns += [Column(title, figure_text(key)[1] or title) for key, title in shown.items()]
    columns.append(Column("best threshold", "the least score that gives the best F1"))
    columns.append(Column("best F1", "the best balance of precision and recall at IoU 0.50"))
    rows = [
        [
            name_cell(str(each["name"])),
            Cell(f"{each['objects']:,}", each["objects"]),
            Cell(f"{each['images']:,}", each["images"]),
            *(figure_cell(each.get(key)) for key in shown),
            Cell(number(each.get("best_threshold"), 2), _known(each.get("best_threshold"))),
            figure_cell(each.get("best_f1")),
        ]
        for each in classes
    ]
    empty = sum(each["objects"] == 0 for each in classes)
    note = f" {plural(empty, 'class has', 'classes have')} no object and no figures." if empty else ""
    search = (
        '<div class="controls script-only"><label>Find a class <input type="search" data-filter="classes-table"></label></div>'
        if len(classes) > 12
        else ""
    )
    return (
        "<p>A click on a heading sorts. Figures of classes with few objects depend on chance. Best threshold: the score "
        f"from which detections of the class are worth keeping, if finding and not inventing matter alike.{note}</p>"
        f"{search}{sortable('classes-table', 'figures of each class', columns, rows, by=1)}"
    )


def _known(value: float | None) -> float | None:
    return None if value is None or value < 0 else value


def _curves(analysis: Mapping[str, Any]) -> str:
    data = analysis.get("curves")
    if not data or not any(max(line, default=-1) >= 0 for line in data["all"].values()):
        return ""
    recall = data["recall"]
    lines: dict[str, Sequence[float]] = {
        kind: data["all"][key] for kind, (_, key) in _LINES.items() if key in data["all"]
    }
    chart = curves(
        recall, {**lines, "one": []}, "precision over recall of all classes, and of a class to choose"
    )
    legend = "".join(f"<li>{_sample(kind)}{_LINES[kind][0]}</li>" for kind in lines)
    names: dict[str, str] = {str(each["id"]): str(each["name"]) for each in analysis.get("classes", ())}
    measured: dict[str, Sequence[float]] = {
        key: line for key, line in data["classes"].items() if max(line, default=-1) >= 0
    }
    named = sorted((names.get(key, key).lower(), names.get(key, key), key) for key in map(str, measured))
    options = "".join(f'<option value="{escape(key)}">{escape(name)}</option>' for _, name, key in named)
    paths = json.dumps({"lines": {key: line_path(recall, line) for key, line in measured.items()}})
    rows = [
        [Cell(f"{recall[index]:.1f}", kind=""), *(Cell(number(line[index], 2)) for line in lines.values())]
        for index in range(0, len(recall), 10)
    ]
    heads = [("recall", ""), *((_LINES[kind][0].removeprefix("all classes, "), "number") for kind in lines)]
    return (
        f"<div class=beside>{chart}<div><p>A detector that is to find more (to the right) has to accept detections that "
        "are less sure, and more of them are wrong (down). The higher the line, the better; AP is the area under it."
        f'</p><ul class="legend">{legend}<li id="curve-legend" hidden>{_sample("one")}<span></span></li></ul>'
        '<div class="controls script-only"><label>Show a class, too, at IoU 0.50: <select id="curve-class"><option '
        f'value="">none</option>{options}</select></label></div><details><summary>The lines as numbers</summary>'
        f"{plain('precision at steps of recall', heads, rows)}</details></div></div>"
        f'<script type="application/json" id="curve-data">{paths.replace("<", chr(92) + "u003c")}</script>'
    )


def _sample(kind: str) -> str:
    return f'<svg class=plot viewBox="0 0 34 10" aria-hidden="true"><path class="curve {kind}" d="M0 5H34"/></svg>'


def _slices(analysis: Mapping[str, Any]) -> str:
    figures = analysis["figures"]
    heads = [("", ""), ("images", "number"), ("objects", "number"), ("AP", "number"), ("AP50", "number")]
    parts = []
    if all(f"AP_{size}" in figures for size in _SIZES):
        rows = [
            [words_cell(size, words), figure_cell(figures[f"AP_{size}"]), figure_cell(figures[f"AR_{size}"])]
            for size, words in _SIZES.items()
        ]
        table = plain(
            "figures by size of the object", [("", ""), ("AP", "number"), ("recall", "number")], rows
        )
        parts.append(f"<div><h3>By the size of the object</h3>{table}</div>")
    for name, slices in analysis.get("slices", {}).items():
        rows = [
            [
                name_cell(str(each["name"])),
                Cell(f"{each['images']:,}"),
                Cell(f"{each['objects']:,}"),
                figure_cell(each["AP"]),
                figure_cell(each["AP50"]),
            ]
            for each in slices
        ]
        if rows:
            parts.append(f"<div><h3>By {escape(name)}</h3>{plain(f'figures by {name}', heads, rows)}</div>")
    return f"<div class=charts>{''.join(parts)}</div>"


def _about(record: Mapping[str, Any], analysis: Mapping[str, Any], manifest: Manifest) -> str:
    model, data = record["model"], record["data"]
    rows = [
        ("model", model.get("address")),
        ("digest of the model", model.get("digest")),
        ("data set", data.get("address")),
        ("digest of the data set", data.get("digest") or manifest.digest),
        ("predictions", record.get("predictions")),
        ("analysis", record.get("analysis")),
        ("MLflow run", record.get("run_id")),
        *((f"setting: {name}", value) for name, value in record.get("settings", {}).items()),
    ]
    text = (
        "<p>Boxes and masks are scored by COCO's rules, as pycocotools does: all detections count, up to 100 in an "
        "image, without a threshold. Objects of images that cannot be decoded count as missed.</p>"
    )
    if analysis.get("resamples"):
        text += (
            f"<p>Ranges: {analysis['resamples']:,} data sets were drawn with replacement from the images of this one "
            f"(bootstrap), and the middle {percent(analysis.get('confidence', 0.95))} of their figures taken.</p>"
        )
    table = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td class=mono>{escape(str(value))}</td></tr>"
        for name, value in rows
        if value not in (None, "")
    )
    table = f"<div class=wide-table><table>{table}</table></div>"
    undecodable = record.get("undecodable") or {}
    if undecodable:
        items = "".join(
            f"<li>image {escape(str(key))}: {escape(str(reason))}</li>"
            for key, reason in list(undecodable.items())[:100]
        )
        count = plural(
            record.get("num_undecodable", len(undecodable)),
            "image that cannot be decoded",
            "images that cannot be decoded",
        )
        table += f"<details><summary>{count}</summary><ul>{items}</ul></details>"
    return text + table


def _date(record: Mapping[str, Any]) -> str:
    given = record.get("date")
    day = datetime.datetime.fromisoformat(str(given)) if given else datetime.datetime.now(datetime.UTC)
    return f"{day.day} {day:%B %Y}"
