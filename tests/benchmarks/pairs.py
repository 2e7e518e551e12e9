"""Two ways of doing the same, timed in turn: the unit of every row of the table that `bench.py` prints."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        work: what was done.
        reference: what it is compared with.
        seconds: of ours, the median, in CPU seconds of all threads.
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
) -> Row:
    """Time ours and the reference in turn, after one round that is not counted.

    The order within a round alternates, so that neither always finds the caches as the other left them.
    """
    ours(), reference()
    first, second = [], []
    for number in range(rounds):
        pair = [(ours, first), (reference, second)]
        for do, seconds in pair if number % 2 == 0 else reversed(pair):
            seconds.append(_timed(do))
    ratios = [b / a for a, b in zip(first, second)]
    mine, theirs = statistics.median(first), statistics.median(second)
    return Row(
        work=work,
        reference=reference_name,
        seconds=mine,
        reference_seconds=theirs,
        ratio=theirs / mine,
        lowest=min(ratios),
        highest=max(ratios),
        rounds=rounds,
        aim=aim,
        least=least,
        note=note,
    )


def _timed(do: Callable[[], Any]) -> float:
    start = time.process_time()
    do()
    return time.process_time() - start
