"""Charts of the evaluation reports as inline SVG: precision over recall, calibration, differences with intervals."""

from collections.abc import Mapping, Sequence
from html import escape

from raydetr.results.analysis import CalibrationBin

WIDTH, HEIGHT = 440, 330
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 44
_TICKS = (0, 0.2, 0.4, 0.6, 0.8, 1)


def x_of(value: float) -> float:
    """Return the horizontal position of a value in 0..1."""
    return LEFT + value * (WIDTH - LEFT - RIGHT)


def y_of(value: float) -> float:
    """Return the vertical position of a value in 0..1."""
    return TOP + (1 - value) * (HEIGHT - TOP - BOTTOM)


def line_path(xs: Sequence[float], ys: Sequence[float]) -> str:
    """Return the SVG path of a curve with both axes in 0..1. Points with a negative (missing) y are omitted."""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if y >= 0]
    return "M" + "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in points) if points else ""


def plot(inside: str, horizontal: str, vertical: str, name: str) -> str:
    """Draw a plot with both axes from 0 to 1.

    Args:
        inside: SVG content, placed with `x_of` and `y_of`.
        horizontal: title of the horizontal axis.
        vertical: title of the vertical axis.
        name: text for screen readers.
    """
    grid = "".join(
        f'<path class=grid d="M{LEFT} {y_of(t):.1f}H{WIDTH - RIGHT}M{x_of(t):.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
        f'<text x="{LEFT - 6}" y="{y_of(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
        f'<text x="{x_of(t):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{t:g}</text>'
        for t in _TICKS
    )
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    return (
        f'<svg class="chart plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">{grid}{inside}'
        f'<text x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle">{escape(horizontal)}</text>'
        f'<text transform="translate(12 {middle_y}) rotate(-90)" text-anchor="middle">{escape(vertical)}</text></svg>'
    )


def curves(recall: Sequence[float], lines: Mapping[str, Sequence[float]], name: str) -> str:
    """Draw precision over recall.

    Args:
        recall: recall of each point, 0..1.
        lines: CSS class → precision at each recall; -1: missing. A script may set the path of a line without points.
        name: text for screen readers.
    """
    paths = "".join(
        f'<path class="curve {kind}" d="{line_path(recall, line) if len(line) else ""}"/>'
        for kind, line in lines.items()
    )
    return plot(
        paths,
        "recall: share of objects that are found",
        "precision: share of detections that are correct",
        name,
    )


def calibration(bins: Sequence[CalibrationBin], name: str) -> str:
    """Draw the share of correct detections over the score: a bar for each bin with detections, and the diagonal."""
    maximum = max((each.count for each in bins), default=0) or 1
    bars = []
    for each in bins:
        if not each.count:
            continue
        left, right, top = x_of(each.low), x_of(each.high), y_of(each.accuracy)
        bars.append(
            f'<rect x="{left + 1:.1f}" y="{top:.1f}" width="{right - left - 2:.1f}" '
            f'height="{y_of(0) - top:.1f}" opacity="{0.35 + 0.65 * each.count / maximum:.2f}">'
            f"<title>score {each.low:.2f} to {each.high:.2f}: {each.accuracy:.2f} of {each.count:,} "
            f"detections are correct</title></rect>"
        )
    diagonal = f'<path class="curve ideal" d="M{x_of(0)} {y_of(0)}L{x_of(1)} {y_of(1)}"/>'
    return plot("".join(bars) + diagonal, "predicted score", "share of detections that are correct", name)


def scale_of(intervals: Sequence[Sequence[float | None]]) -> float:
    """Return half the width of an axis around 0 that contains all intervals: 1, 2 or 5 times a power of ten."""
    largest = max((abs(end) for ends in intervals for end in ends if end is not None), default=0)
    for power in (0.001, 0.01, 0.1, 1):
        for step in (1, 2, 5):
            if largest <= step * power:
                return step * power
    return 1.0


def forest_axis(scale: float) -> str:
    """Draw the head of a column of `forest_row`: both ends of the axis and 0."""
    return (
        '<svg class=forest viewBox="0 0 200 16" aria-hidden="true">'
        f'<text x="2" y="12">−{scale:g}</text><text x="100" y="12" text-anchor="middle">0</text>'
        f'<text x="198" y="12" text-anchor="end">+{scale:g}</text></svg>'
    )


def forest_row(delta: float, low: float | None, high: float | None, scale: float) -> str:
    """Draw a difference as a point with its interval; the point is filled if the interval excludes 0."""

    def position(value: float) -> float:
        return 100 + 98 * max(-1.0, min(1.0, value / scale))

    is_significant = low is not None and high is not None and (low > 0 or high < 0)
    kind = ("up" if delta > 0 else "down") if is_significant else "open"
    whisker = ""
    if low is not None and high is not None:
        whisker = f'<path class=whisker d="M{position(low):.1f} 8H{position(high):.1f}"/>'
    return (
        f'<svg class="forest {kind}" viewBox="0 0 200 16" aria-hidden="true"><path class=zero d="M100 0V16"/>'
        f'{whisker}<circle cx="{position(delta):.1f}" cy="8" r="4"/></svg>'
    )
