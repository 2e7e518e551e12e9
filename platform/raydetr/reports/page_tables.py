"""Tables of the evaluation reports: plain ones, and ones that can be sorted by their headers."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from raydetr.reports.page_text import number


@dataclass(frozen=True)
class Cell:
    """A table cell."""

    html: str
    value: float | str | None = None
    """Sort key; None sorts last."""
    kind: str = "number"
    """CSS class."""
    share: float | None = None
    """Length of a bar behind the number, 0..1; None without a bar."""


@dataclass(frozen=True)
class Column:
    """The head of a column.

    descending: whether the first click sorts in descending order.
    """

    name: str
    title: str = ""
    kind: str = "number"
    descending: bool = True
    head: str = ""
    """HTML under the name."""


def metric_cell(value: float | None) -> Cell:
    """Return the cell of a metric in 0..1, with a bar of its size."""
    known = None if value is None or value < 0 else value
    return Cell(number(value), known, "number meter", known)


def name_cell(name: str) -> Cell:
    """Return the cell of a name, the head of a row."""
    return Cell(escape(name), name.lower(), "")


def words_cell(title: str, words: str, kind: str = "") -> Cell:
    """Return the cell of a title and its explanation, both HTML, the head of a row."""
    return Cell(f"{title}<br><small class=note>{words}</small>", kind=f"words {kind}".strip())


def sortable(
    identity: str, caption: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], by: int = 0
) -> str:
    """Render a table with its own scroll bars that can be sorted by its headers.

    Args:
        identity: id of the table element.
        caption: text for screen readers.
        columns: heads of the columns.
        rows: cells; the first cell of each row is its head.
        by: index of the column by which the rows are sorted initially.
    """
    heads = "".join(
        f'<th scope=col class="{column.kind}" data-first="{"descending" if column.descending else "ascending"}"'
        f"{_sorted(column) if index == by else ''}>"
        f'<button type="button" title="{escape(column.title or column.name)}">{escape(column.name)}</button>{column.head}</th>'
        for index, column in enumerate(columns)
    )
    body = "".join(
        f"<tr>{''.join(_cell(cell, index, True) for index, cell in enumerate(row))}</tr>" for row in rows
    )
    return (
        f'<div class="wide-table tall" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="sortable" id="{identity}"><caption class=hidden>{escape(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def plain(caption: str, heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[Cell]]) -> str:
    """Render a table that cannot be sorted. A wide table has its own scroll bar.

    Args:
        caption: text for screen readers.
        heads: HTML and CSS class of each column.
        rows: cells; the first cell of each row is its head.
    """
    top = "".join(f'<th scope=col class="{kind}">{text}</th>' for text, kind in heads)
    body = "".join(
        f"<tr>{''.join(_cell(cell, index, False) for index, cell in enumerate(row))}</tr>" for row in rows
    )
    return (
        f'<div class=wide-table tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption class=hidden>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _sorted(column: Column) -> str:
    return f' aria-sort="{"descending" if column.descending else "ascending"}"'


def _cell(cell: Cell, index: int, is_sortable: bool) -> str:
    value = (
        ""
        if cell.value is None
        else f"{cell.value:.6g}"
        if isinstance(cell.value, float)
        else str(cell.value)
    )
    attributes = f' class="{cell.kind}"' if cell.kind else ""
    attributes += f' data-v="{escape(value)}"' if is_sortable else ""
    if cell.share is not None:
        attributes += f' style="--share:{100 * max(0.0, min(cell.share, 1.0)):.0f}%"'
    return (
        f"<th scope=row{attributes}>{cell.html}</th>" if index == 0 else f"<td{attributes}>{cell.html}</td>"
    )
