"""Two ways of doing the same, timed in turn: the unit of every row of the table that `bench.py` prints."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

HEAD = """| work | reference | ours, s | reference, s | ratio | lowest, highest | aim | least | before |
|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        work: what was done.
        reference: what it is compared with.
        seconds: of ours, the median: CPU seconds of all threads, or seconds of the clock on a GPU.
        reference_seconds: the median of the reference.
        ratio: of the medians, reference ÷ ours.
        lowest: the smallest ratio of one round.
        highest: the largest.
        rounds: how often both were timed.
        aim: the ratio to be reached.
        least: the ratio below which the work is not done.
        note: how equal the outputs were, and what else a reader has to know.
    """

    work: str
    reference: str
    seconds: float
    reference_seconds: float
    ratio: float
    lowest: float
    highest: float
    rounds: int
    aim: float | None = None
    least: float | None = None
    note: str = ""


def line(row: Row, earlier: dict[str, float]) -> str:
    """A row under `HEAD`; ``earlier`` has ratios by the name of the work."""
    cells = [
        row.work,
        row.reference,
        f"{row.seconds:.3g}",
        f"{row.reference_seconds:.3g}",
        f"{row.ratio:.2f}",
        f"{row.lowest:.2f}, {row.highest:.2f}",
        "" if row.aim is None else f"{row.aim:g}",
        "" if row.least is None else f"{row.least:g}",
        f"{earlier[row.work]:.2f}" if row.work in earlier else "",
    ]
    return f"| {' | '.join(cells)} |"


def paired(
    work: str,
    reference_name: str,
    ours: Callable[[], Any],
    reference: Callable[[], Any],
    *,
    rounds: int = 5,
    aim: float | None = None,
    least: float | None = None,
    note: str = "",
    device: str = "cpu",
) -> Row:
    """Time ours and the reference in turn, after what is not counted.

    The order within a round alternates, so that neither always finds the caches as the other left them.
    """
    for _ in range(
        1 if device == "cpu" else 3
    ):  # a GPU's kernels are chosen, and recorded, in the first calls
        ours(), reference()
    first, second = [], []
    for number in range(rounds):
        pair = [(ours, first), (reference, second)]
        for do, seconds in pair if number % 2 == 0 else reversed(pair):
            seconds.append(_timed(do) if device == "cpu" else timed_on_gpu(do))
    return row_of(work, reference_name, first, second, aim=aim, least=least, note=note)


def row_of(
    work: str,
    reference: str,
    seconds: list[float],
    reference_seconds: list[float],
    *,
    aim: float | None = None,
    least: float | None = None,
    note: str = "",
) -> Row:
    """The row of what each round took."""
    ratios = [theirs / ours for ours, theirs in zip(seconds, reference_seconds, strict=True)]
    ours, theirs = statistics.median(seconds), statistics.median(reference_seconds)
    return Row(
        work=work,
        reference=reference,
        seconds=ours,
        reference_seconds=theirs,
        ratio=theirs / ours,
        lowest=min(ratios),
        highest=max(ratios),
        rounds=len(ratios),
        aim=aim,
        least=least,
        note=note,
    )


def _timed(do: Callable[[], Any]) -> float:
    start = time.process_time()
    do()
    return time.process_time() - start


def timed_on_gpu(do: Callable[[], Any], times: int = 5) -> float:
    """Seconds of the clock for one call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        do()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times
