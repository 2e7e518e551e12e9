"""Small charts as inline SVG without a JavaScript library: bars and histograms."""

from collections.abc import Sequence
from html import escape


def bars(rows: Sequence[tuple[str, int]], unit: str = "") -> str:
    """Draw horizontal bars with names and counts, as a table that screen readers can read.

    Args:
        rows: (name, count) of each bar, in the order shown.
        unit: what is counted.
    """
    maximum = max((count for _, count in rows), default=0) or 1
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th>"
        f'<td class=bar><svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{100 * count / maximum:.2f}" height="8"/></svg></td><td class=number>{count:,}</td></tr>'
        for name, count in rows
    )
    return f"<table class=bars><caption class=hidden>{escape(unit)}</caption>{body}</table>"


def histogram(
    counts: Sequence[int], labels: Sequence[str], title: str, unit: str, mark: tuple[float, str] | None = None
) -> str:
    """Draw a histogram with a title and labels under the bars.

    Args:
        counts: count of each bin.
        labels: label of each bin; empty for bins without a label.
        title: title above the histogram.
        unit: what is counted, shown at the top of the left axis.
        mark: position (in bins) and text of a vertical line.
    """
    width, height, left, top = 560, 220, 8, 26
    maximum = max(counts, default=0) or 1
    step = (width - 2 * left) / max(len(counts), 1)
    parts = []
    for index, (count, label) in enumerate(zip(counts, labels, strict=True)):
        bar = (height - top) * count / maximum
        x = left + index * step
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{height - bar:.1f}" width="{max(step - 2, 1):.1f}" height="{bar:.1f}">'
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
        f'role="img" aria-label="{escape(title, quote=True)}"><text x="{left}" y="14">{maximum:,} {escape(unit)}</text>'
        f'<path d="M{left} {height}H{width - left}"/>{"".join(parts)}</svg></figure>'
    )
