"""Tables of the evaluation's pages: plain ones, and ones that sort by a click or a key on their headers."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from raydetr.reports.page_text import number


@dataclass(frozen=True)
class Cell:
    """What is shown, and what it is sorted by; None stays at the end."""

    html: str
    value: float | str | None = None
    kind: str = "number"
    share: float | None = None
    """0..1: a bar behind the figure."""


@dataclass(frozen=True)
class Column:
    """The head of a column.

    descending: whether the first click on it sorts from the largest to the smallest.
    """

    name: str
    title: str = ""
    kind: str = "number"
    descending: bool = True
    head: str = ""
    """HTML under the name."""


def figure_cell(value: float | None) -> Cell:
    """A figure in 0..1 with a bar of its size."""
    known = None if value is None or value < 0 else value
    return Cell(number(value), known, "number meter", known)


def name_cell(name: str) -> Cell:
    """A name, the head of its row."""
    return Cell(escape(name), name.lower(), "")


def words_cell(title: str, words: str, kind: str = "") -> Cell:
    """The head of a row with what it means, both HTML."""
    return Cell(f"{title}<br><small class=note>{words}</small>", kind=f"words {kind}".strip())


def sortable(
    identity: str, caption: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], by: int = 0
) -> str:
    """A table that scrolls inside of itself and sorts by its headers.

    Args:
        identity: the table's id.
        caption: what a screen reader says.
        columns: heads.
        rows: cells, the first of each row being its head.
        by: the column that the rows are sorted by now.
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
    """A table that does not sort; a wide one scrolls inside of itself.

    Args:
        caption: what a screen reader says.
        heads: HTML and CSS class of each column.
        rows: cells, the first of each row being its head.
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


def _cell(cell: Cell, index: int, sorts: bool) -> str:
    value = (
        ""
        if cell.value is None
        else f"{cell.value:.6g}"
        if isinstance(cell.value, float)
        else str(cell.value)
    )
    attributes = f' class="{cell.kind}"' if cell.kind else ""
    attributes += f' data-v="{escape(value)}"' if sorts else ""
    if cell.share is not None:
        attributes += f' style="--share:{100 * max(0.0, min(cell.share, 1.0)):.0f}%"'
    return (
        f"<th scope=row{attributes}>{cell.html}</th>" if index == 0 else f"<td{attributes}>{cell.html}</td>"
    )
