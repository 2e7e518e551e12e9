"""Measure how time and memory of inference grow with 1, 2, 4 and 8 times the pixels, queries and images, and with
concurrent processes, up to one per core.

    OMP_NUM_THREADS=1 python benchmarks/growth.py [--picture docs/growth.png]

resnet50, optimized, float32, one thread; the start is one image of 400 x 533 with 100 queries. Every point has its own
process, or several concurrent ones. It shows the wall time of one pass (median of three) and the peak memory beyond
that of the loaded model.
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
COLORS = {"pixels": "tab:blue", "queries": "tab:orange", "images": "tab:green", "processes": "tab:red"}


@torch.inference_mode()
def measure(axis: str, factor: int, results: Any) -> None:
    """Put the seconds and the MiB of one pass into the queue `results`."""
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
    """Return the seconds of a pass, those of the slowest process, and the MiB of all processes together."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    count = factor if axis == "processes" else 1
    started = [context.Process(target=measure, args=(axis, factor, results)) for _ in range(count)]
    for process in started:
        process.start()
    measured = [results.get() for _ in started]
    for process in started:
        process.join()
    return max(seconds for seconds, _ in measured), sum(mib for _, mib in measured)


def main() -> None:
    """Print the points and plot them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--picture", type=Path, default=Path("runs/benchmarks/growth.png"), help="PNG of the plot"
    )
    arguments = parser.parse_args()
    figure, (times, memories) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    print(f"{CORES} cores\n\n| axis | times | seconds | MiB |\n|---|---|---|---|")
    for axis, color in COLORS.items():
        factors = [n for n in FACTORS if axis != "processes" or n <= CORES]
        measured = [point(axis, factor) for factor in factors]
        for factor, (seconds, mib) in zip(factors, measured, strict=True):
            print(f"| {axis} | {factor} | {seconds:.2f} | {mib:.0f} |", flush=True)
        times.plot(factors, [seconds for seconds, _ in measured], marker="o", color=color, label=axis)
        memories.plot(factors, [mib for _, mib in measured], marker="o", color=color, label=axis)
    for axes, title in ((times, "seconds per pass"), (memories, "MiB beyond the model")):
        axes.set(xscale="log", yscale="log", xlabel="times the work", title=title)
        axes.set_xticks(FACTORS, [str(factor) for factor in FACTORS])
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
    times.legend()
    figure.tight_layout()
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.picture, dpi=90)


if __name__ == "__main__":
    main()
