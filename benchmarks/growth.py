"""What inference costs as the work grows: time and memory at 1, 2, 4 and 8 times the pixels, queries and images, and as many
processes as there are cores.

    OMP_NUM_THREADS=1 python benchmarks/growth.py [--picture docs/growth.png]

resnet50, optimised, float32, one thread; from one image of 400 x 533 with 100 queries. Every point is a process of its
own, or several at once: seconds of the clock for one pass, the median of three, and the most memory that it took
beyond what the loaded model has.
"""

import argparse
import math
import multiprocessing
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib
import psutil
import torch

from detr import DetrConfig, DetrForObjectDetection

matplotlib.use("Agg")
from matplotlib import pyplot

FACTORS = (1, 2, 4, 8)
SIZE, QUERIES = (400, 533), 100
CORES = len(os.sched_getaffinity(0))
COLOURS = {"pixels": "tab:blue", "queries": "tab:orange", "images": "tab:green", "processes": "tab:red"}


@torch.inference_mode()
def measure(axis: str, factor: int, results: Any) -> None:
    """Put seconds and MiB of one pass."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    queries = QUERIES * (factor if axis == "queries" else 1)
    model = DetrForObjectDetection(DetrConfig(backbone="resnet50", num_queries=queries)).eval().optimize()
    side = math.sqrt(factor) if axis == "pixels" else 1
    height, width = (round(edge * side) for edge in SIZE)
    pixels = torch.randn(factor if axis == "images" else 1, 3, height, width)
    model(torch.zeros(1, 3, 64, 64))
    before = psutil.Process().memory_info().rss
    model(pixels)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        model(pixels)
        seconds.append(time.perf_counter() - start)
    results.put((statistics.median(seconds), max(0, peak - before) / 2**20))


def point(axis: str, factor: int) -> tuple[float, float]:
    """Seconds of a pass and MiB in all; of several processes the slowest's."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    count = factor if axis == "processes" else 1
    started = [context.Process(target=measure, args=(axis, factor, results)) for _ in range(count)]
    for process in started:
        process.start()
    found = [results.get() for _ in started]
    for process in started:
        process.join()
    return max(seconds for seconds, _ in found), sum(mib for _, mib in found)


def main() -> None:
    """Print the points and draw them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture", type=Path, default=Path("runs/benchmarks/growth.png"))
    given = parser.parse_args()
    figure, (times, memories) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    print(f"{CORES} cores\n\n| axis | times | seconds | MiB |\n|---|---|---|---|")
    for axis, colour in COLOURS.items():
        factors = [n for n in FACTORS if axis != "processes" or n <= CORES]
        found = [point(axis, factor) for factor in factors]
        for factor, (seconds, mib) in zip(factors, found, strict=True):
            print(f"| {axis} | {factor} | {seconds:.2f} | {mib:.0f} |", flush=True)
        times.plot(factors, [seconds for seconds, _ in found], marker="o", color=colour, label=axis)
        memories.plot(factors, [mib for _, mib in found], marker="o", color=colour, label=axis)
    for axes, title in ((times, "seconds of a pass"), (memories, "MiB beyond the model")):
        axes.set(xscale="log", yscale="log", xlabel="times the work", title=title)
        axes.set_xticks(FACTORS, [str(factor) for factor in FACTORS])
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
    times.legend()
    figure.tight_layout()
    given.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.picture, dpi=90)


if __name__ == "__main__":
    main()
