"""Run `pipelines/NAME.py` with flags: in this process, which takes milliseconds, or in a new interpreter.

    def test_x(pipeline: RunPipeline, tmp_path: Path) -> None:
        done = pipeline("ingest", "--annotations", "list.json", cwd=tmp_path)
        assert done.returncode == 2

Both fixtures take the same arguments and return the same result. Use `pipeline_process` only to test the process
itself: its start, signals, its own Ray, or its environment.
"""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]

Done = subprocess.CompletedProcess[str]
"""`returncode`, `stdout`, `stderr`."""


class RunPipeline(Protocol):
    """Run a pipeline in the folder `cwd` until it exits, with `env` added to the environment."""

    def __call__(self, name: str, *flags: str, cwd: Path, env: Mapping[str, str] | None = None) -> Done: ...


def script(name: str) -> str:
    """Return the path of a pipeline."""
    return str(ROOT / "pipelines" / f"{name}.py")


def environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment in which an interpreter imports this checkout, whatever is installed."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}", **(env or {})}


@pytest.fixture(scope="session")
def pipeline() -> RunPipeline:
    """Run a pipeline's script in this process, on the Ray that is connected, if any."""
    return _run_here


@pytest.fixture(scope="session")
def pipeline_process() -> RunPipeline:
    """Run a pipeline as users do, in a new interpreter, which starts its own Ray."""
    return _run_process


def _run_here(name: str, *flags: str, cwd: Path, env: Mapping[str, str] | None = None) -> Done:
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [script(name), *flags]),
        mock.patch.dict(os.environ, env or {}),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(script(name), run_name="__main__")
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
    return Done([name, *flags], status, out.getvalue(), err.getvalue())


def _run_process(name: str, *flags: str, cwd: Path, env: Mapping[str, str] | None = None) -> Done:
    command = [sys.executable, script(name), *flags]
    return subprocess.run(command, cwd=cwd, env=environment(env), capture_output=True, text=True, check=False)
