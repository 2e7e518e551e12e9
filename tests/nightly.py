"""Run the tests that take too long for every change.

    python tests/nightly.py [--steps mutations lowest ...] [--output runs/nightly]

Steps: mutations, soak tests, the lowest allowed versions, third-party tools, tests under load, benchmarks. They run
sequentially, and a failed step does not stop the rest. After each step, `summary.md` and `summary.json` in --output are
rewritten with the state, the time and the closing lines of each step. Each step has a log. Exit status: 0 all passed,
1 a step failed.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]
SOAK_MINUTES = "60"


@dataclass(frozen=True)
class Result:
    """Result of a step; `lines` has the failures and the closing line of pytest, or the table of the benchmarks."""

    step: str
    passed: bool
    minutes: float
    lines: list[str]


def run(command: Sequence[str], log: IO[str], **env: str) -> int:
    """Run a command in the checkout and write its output to the log; return its exit status."""
    print(f"$ {' '.join(command)}", file=log, flush=True)
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, stdout=log, stderr=subprocess.STDOUT, check=False
    ).returncode


def pytest(*arguments: str, python: str = sys.executable) -> list[str]:
    """Return the command that runs tests."""
    return [python, "-m", "pytest", *arguments]


def mutations(log: IO[str], folder: Path) -> int:
    """Break each guarantee on purpose: its tests must fail, for four of five guarantees those of `make test`."""
    return run(pytest("tests/test_mutations.py", "-m", "nightly"), log)


def soak(log: IO[str], folder: Path) -> int:
    """Run the nightly tests: lost hosts, killed workers, full storage, an hour of traffic."""
    selection = ["-m", "nightly", "--ignore", "tests/test_mutations.py"]
    return run(pytest(*selection), log, RAYDETR_SOAK_MINUTES=SOAK_MINUTES)


def lowest(log: IO[str], folder: Path) -> int:
    """Run `make test` with the lowest version of each package that pyproject.toml allows."""
    python = str(folder / "lowest" / "bin" / "python")
    uv = [sys.executable, "-m", "uv"]
    install = ["pip", "install", "--python", python, "--resolution", "lowest-direct", "--editable", ".[dev]"]
    return (
        run([*uv, "venv", "--clear", "--python", sys.executable, str(folder / "lowest")], log)
        or run([*uv, *install], log)
        # Old versions cause deprecation warnings.
        or run(pytest("-n", "3", "-W", "default", python=python), log)
    )


def interop(log: IO[str], folder: Path) -> int:
    """Test Trainer, accelerate, PEFT and torchmetrics with our models, in an environment that has them installed."""
    python = str(folder / "interop" / "bin" / "python")
    uv = [sys.executable, "-m", "uv"]
    install = [
        "pip",
        "install",
        "--python",
        python,
        "--constraint",
        "constraints.txt",
        "--editable",
        ".[dev,interop]",
    ]
    return (
        run([*uv, "venv", "--clear", "--python", sys.executable, str(folder / "interop")], log)
        or run([*uv, *install], log)
        or run(pytest("-m", "", "tests/detr/test_tools.py", python=python), log)
    )


def loaded(log: IO[str], folder: Path) -> int:
    """Run `make test` next to two busy processes: time limits that are too tight fail."""
    with busy(2):
        return run(pytest("-n", "3"), log)


def benchmarks(log: IO[str], folder: Path) -> int:
    """Print the table of `make bench`."""
    return run([sys.executable, "benchmarks/bench.py", "--json", str(folder / "bench.json")], log)


STEPS: dict[str, Callable[[IO[str], Path], int]] = {
    step.__name__: step for step in (mutations, lowest, interop, loaded, soak, benchmarks)
}


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Run processes that use a core each."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def closing_lines(log: str) -> list[str]:
    """Return the failures and skips that pytest lists, its closing lines, and table rows."""
    return re.findall(
        r"^(?:(?:FAILED|ERROR|SKIPPED) .*|=+ .*\d (?:passed|failed).* =+|\|.*\|)$", log, re.MULTILINE
    )


def write_summary(folder: Path, started: str, results: list[Result]) -> None:
    """Write `summary.json` and `summary.md`."""
    revision = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    content = {
        "started": started,
        "revision": revision.stdout.strip(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "steps": [asdict(result) for result in results],
    }
    (folder / "summary.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = [f"# Nightly run of {started}", f"Revision {content['revision']}, {content['cores']} cores."]
    for result in results:
        state = "passed" if result.passed else "FAILED"
        text.append(f"## {result.step}: {state} in {result.minutes:.1f} minutes")
        text.append("\n".join(result.lines) or f"No closing line: see {result.step}.log.")
    (folder / "summary.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def main() -> None:
    """Run the selected steps and write the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "nightly")
    options = parser.parse_args()
    folder = options.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    started, results = time.strftime("%Y-%m-%d %H:%M"), []
    for name in options.steps:
        start, file = time.monotonic(), folder / f"{name}.log"
        with file.open("w", encoding="utf-8") as log:
            status = STEPS[name](log, folder)
        lines = closing_lines(file.read_text(encoding="utf-8", errors="replace"))
        results.append(Result(name, status == 0, round((time.monotonic() - start) / 60, 1), lines))
        write_summary(folder, started, results)
        print(f"{name}: {'passed' if status == 0 else 'FAILED'}, {results[-1].minutes} minutes", flush=True)
    print(f"{folder / 'summary.md'}")
    sys.exit(not all(result.passed for result in results))


if __name__ == "__main__":
    main()
