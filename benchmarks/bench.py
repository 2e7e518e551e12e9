"""Print a table that compares the speed of each part with the usual alternative.

    python benchmarks/bench.py [--only WORD] [--json FILE] [--compare FILE]

Each row times this library and the reference in turn, in one process with one thread, and asserts that their outputs
are equal. Each row has its own process, since memory that earlier work has freed is faster than new memory. The stream
and the endpoint run on a Ray cluster.

The ratio is the ratio of the medians; the lowest and the highest ratio of a single round are next to it. The rows are
saved as JSON (`runs/benchmarks/bench.json`). `--compare` prints the ratios of an earlier file next to the new ones.
"""

import argparse
import json
import platform
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import rows_cluster
import rows_detectors
import rows_engines
import rows_model
import rows_outputs
import rows_panoptic
import rows_processing
import rows_training
import scoring
import torch
from pairs import HEAD, Row, line

PARTS = (
    rows_model,
    rows_engines,
    rows_training,
    rows_detectors,
    rows_processing,
    rows_outputs,
    rows_panoptic,
    scoring,
    rows_cluster,
)
ROWS = {name: make for part in PARTS for name, make in part.ROWS.items()}


def main() -> None:
    """Print the table row by row and save it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="run only rows whose name contains this")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/bench.json"))
    parser.add_argument("--compare", type=Path, help="an earlier JSON file")
    parser.add_argument("--list", action="store_true", help="only print the names of the rows")
    options = parser.parse_args()
    chosen = {name: make for name, make in ROWS.items() if (options.only or "") in name}
    if options.list:
        print("\n".join(chosen))
        return
    machine = _machine()
    earlier = {} if options.compare is None else _ratios(options.compare)
    print(f"{machine['processor']}, torch {machine['torch']} ({machine['capability']}), one thread\n")
    print(HEAD)
    rows: list[Row] = []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for name in chosen:
            try:
                rows.append(processes.submit(_row, name).result())
            except FileNotFoundError as error:
                print(f"| {name} | | | | | | | | {error} |", flush=True)
                continue
            print(line(rows[-1], earlier), flush=True)
            options.json.parent.mkdir(parents=True, exist_ok=True)
            content = {"machine": machine, "rows": [asdict(row) for row in rows]}
            options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    print()
    for row in rows:
        if row.note:
            print(f"- {row.work}: {row.note}")


def _row(name: str) -> Row:
    torch.set_num_threads(1)
    return ROWS[name]()


def _ratios(file: Path) -> dict[str, float]:
    content = json.loads(file.read_text(encoding="utf-8"))
    return {row["work"]: row["ratio"] for row in content["rows"]}


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else [])
        if line.startswith("model name")
    ]
    return {
        "processor": f"{len(names)} × {names[0]}" if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
