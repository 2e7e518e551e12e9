"""Small charts as inline SVG, without a library on the page: bars and histograms."""

from collections.abc import Sequence
from html import escape


def bars(rows: Sequence[tuple[str, int]], unit: str = "") -> str:
    """Horizontal bars, one a row, each with its name and count; a table that a screen reader can read.

    Args:
        rows: (name, count), in the order shown.
        unit: of the counts.
    """
    most = max((count for _, count in rows), default=0) or 1
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th>"
        f'<td class=bar><svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{100 * count / most:.2f}" height="8"/></svg></td><td class=number>{count:,}</td></tr>'
        for name, count in rows
    )
    return f"<table class=bars><caption class=hidden>{escape(unit)}</caption>{body}</table>"


def histogram(
    counts: Sequence[int], labels: Sequence[str], title: str, unit: str, mark: tuple[float, str] | None = None
) -> str:
    """A histogram with a title and labels under the bars.

    Args:
        counts: of each bin.
        labels: of each bin; empty ones are not written.
        title: above.
        unit: what is counted, on the left axis's top.
        mark: place on the axis, in bins, and text of a vertical line.
    """
    width, height, left, top = 560, 220, 8, 26
    most = max(counts, default=0) or 1
    step = (width - 2 * left) / max(len(counts), 1)
    parts = []
    for index, (count, label) in enumerate(zip(counts, labels, strict=True)):
        tall = (height - top) * count / most
        x = left + index * step
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{height - tall:.1f}" width="{max(step - 2, 1):.1f}" height="{tall:.1f}">'
            f"<title>{escape(label)}: {count:,}</title></rect>"
        )
        if label:
            parts.append(
                f'<text x="{x + step / 2:.1f}" y="{height + 16}" text-anchor="middle">{escape(label)}</text>'
            )
    if mark is not None and mark[0] <= len(counts):
        x = left + mark[0] * step
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height}"/>')
        anchor = "end" if x > width / 2 else "start"
        shift = -6 if anchor == "end" else 6
        parts.append(
            f'<text x="{x + shift:.1f}" y="{top + 12}" text-anchor="{anchor}">{escape(mark[1])}</text>'
        )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg class=chart viewBox="0 0 {width} {height + 24}" '
        f'role="img" aria-label="{escape(title, quote=True)}"><text x="{left}" y="14">{most:,} {escape(unit)}</text>'
        f'<path d="M{left} {height}H{width - left}"/>{"".join(parts)}</svg></figure>'
    )
