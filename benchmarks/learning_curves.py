"""Plot the rows of `learning.py` as curves, and print them as Markdown tables."""

import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from learning_recipes import ON_GPU, RECIPES, TASKS, Task

matplotlib.use("Agg")
from matplotlib import pyplot

HEAD = """| data, minutes | recipe | AP50 | AP | duplicates, % | images/s | command |
|---|---|---|---|---|---|---|"""


def draw(file: Path) -> None:
    """Plot the curves of each data set in a file; all rows of a file must be of the same kind of device."""
    recorded = _read(file)
    for data, task in {**ON_GPU, **TASKS}.items():
        rows = [row for row in recorded if row["data"] == data and _is_unchanged(row, task)]
        if rows:
            _draw_curves(rows, f"{_kind(rows[0])}_AP50", file.with_name(f"{file.stem}-{data}.png"))


def print_table(file: Path) -> None:
    """Print the last row of every run: one line for all seeds of a data set, budget, recipe and changes."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in _read(file):
        if not row["overfit"] and row["minutes"] >= row["budget"]:
            runs.setdefault(_command(row, [], file), []).append(row)
    print(HEAD)
    for rows in runs.values():
        first, kind = rows[0], _kind(rows[0])
        changes = ", ".join(f"{name}={value}" for name, value in _changes(first).items())
        duplicates = [100 * row["duplicates"] for row in rows if "duplicates" in row]
        cells = [
            f"{first['data']}, {first['budget']:g}",
            f"{first['recipe']}{f', {changes}' if changes else ''}",
            _spread([row[f"{kind}_AP50"] for row in rows], 3),
            _spread([row[f"{kind}_AP"] for row in rows], 3),
            _spread(duplicates, 1) if duplicates else "",
            f"{statistics.mean(row['images_per_second'] for row in rows):.1f}",
            f"`{_command(first, sorted({row['seed'] for row in rows}), file)}`",
        ]
        print(f"| {' | '.join(cells)} |")


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _is_unchanged(row: dict[str, Any], task: Task) -> bool:
    """Return whether a run trained on all images at the task's size with an unchanged recipe."""
    return not row["overfit"] and not _changes(row) and row.get("edge", task.test_edge) == task.test_edge


def _changes(row: dict[str, Any]) -> dict[str, Any]:
    return row.get("changes", {})


def _kind(row: dict[str, Any]) -> str:
    return "segm" if "segm_AP50" in row else "bbox"


def _spread(values: Sequence[float], digits: int) -> str:
    """Format the mean, with the lowest and the highest value if there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _command(row: dict[str, Any], seeds: Sequence[int], file: Path) -> str:
    """Return the command that produces such rows."""
    words = ["python", "benchmarks/learning.py", "--data", row["data"], "--recipes", row["recipe"]]
    words += ["--minutes", f"{row['budget']:g}", "--evaluations", "1", "--seeds", *map(str, seeds)]
    if row.get("device", "cpu") != "cpu":
        words += ["--device", "cuda"]
    task = (TASKS if row.get("device", "cpu") == "cpu" else ON_GPU)[row["data"]]
    if row.get("edge", task.test_edge) != task.test_edge:
        words += ["--edge", str(row["edge"])]
    if _changes(row):
        settings = (f"{name}={json.dumps(value).strip(chr(34))}" for name, value in _changes(row).items())
        words += ["--set", *settings]
    return shlex.join([*words, "--rows", str(file)])


def _draw_curves(rows: list[dict[str, Any]], metric: str, file: Path) -> None:
    """Plot AP50 over time, with a color per recipe and a line per run; a run that was scored once is a dot."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    gpu = rows[0].get("device", "cpu") != "cpu"
    for number, name in enumerate(RECIPES):
        runs: dict[tuple[int, float], list[tuple[float, float]]] = {}
        for row in rows:
            if row["recipe"] == name:
                runs.setdefault((row["seed"], row["budget"]), []).append((row["minutes"], row[metric]))
        for points in runs.values():
            points = [(0.0, 0.0), *points] if len(points) > 1 else points
            (line,) = axes.plot(*zip(*points, strict=True), color=f"C{number}", marker=".")
        if runs:
            seeds = sorted({seed for seed, _ in runs})
            line.set_label(f"{name}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}")
    axes.set(
        xlabel="minutes" if gpu else "minutes of one core",
        ylabel=metric,
        title=rows[0]["data"],
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
