"""Time two implementations of the same work in turn: the rows of the table that `bench.py` prints."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

HEAD = """| work | reference | ours, s | reference, s | ratio | lowest, highest | target | minimum | before |
|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        work: what was timed.
        reference: what it is compared with.
        seconds: median of ours: CPU seconds of all threads, or wall time on a GPU.
        reference_seconds: median of the reference.
        ratio: ratio of the medians, reference ÷ ours.
        lowest: lowest ratio of a single round.
        highest: highest ratio of a single round.
        rounds: how often both were timed.
        target: the ratio to reach.
        minimum: the lowest acceptable ratio.
        note: how close the outputs are, and other remarks.
    """

    work: str
    reference: str
    seconds: float
    reference_seconds: float
    ratio: float
    lowest: float
    highest: float
    rounds: int
    target: float | None = None
    minimum: float | None = None
    note: str = ""


def line(row: Row, earlier: dict[str, float]) -> str:
    """Format a row under `HEAD`; ``earlier`` maps the name of the work to an earlier ratio."""
    cells = [
        row.work,
        row.reference,
        f"{row.seconds:.3g}",
        f"{row.reference_seconds:.3g}",
        f"{row.ratio:.2f}",
        f"{row.lowest:.2f}, {row.highest:.2f}",
        "" if row.target is None else f"{row.target:g}",
        "" if row.minimum is None else f"{row.minimum:g}",
        f"{earlier[row.work]:.2f}" if row.work in earlier else "",
    ]
    return f"| {' | '.join(cells)} |"


def time_pair(
    work: str,
    reference_name: str,
    ours: Callable[[], Any],
    reference: Callable[[], Any],
    *,
    rounds: int = 5,
    target: float | None = None,
    minimum: float | None = None,
    note: str = "",
    device: str = "cpu",
) -> Row:
    """Time ours and the reference in turn, after warm-up calls.

    The order within a round alternates, so that neither always runs on the caches that the other left behind.
    """
    warm_up = 1 if device == "cpu" else 3  # on a GPU, kernels are selected and recorded in the first calls
    for _ in range(warm_up):
        ours(), reference()
    first, second = [], []
    for number in range(rounds):
        pair = [(ours, first), (reference, second)]
        for do, seconds in pair if number % 2 == 0 else reversed(pair):
            seconds.append(_timed(do) if device == "cpu" else timed_on_gpu(do))
    return make_row(work, reference_name, first, second, target=target, minimum=minimum, note=note)


def make_row(
    work: str,
    reference: str,
    seconds: list[float],
    reference_seconds: list[float],
    *,
    target: float | None = None,
    minimum: float | None = None,
    note: str = "",
) -> Row:
    """Make a row from the seconds of each round."""
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
        target=target,
        minimum=minimum,
        note=note,
    )


def _timed(do: Callable[[], Any]) -> float:
    start = time.process_time()
    do()
    return time.process_time() - start


def timed_on_gpu(do: Callable[[], Any], times: int = 5) -> float:
    """Return the wall time of one call, averaged over several."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        do()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times
