"""The command `raydetr JOB [flags]`: the jobs of the folder `pipelines/`, from an installed wheel."""

import ast
import difflib
import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

JOBS = ("ingest", "doctor", "train", "evaluate", "promote", "predict", "serve", "token-file", "demo")
_PLATFORM = ("boto3", "mlflow", "pyarrow", "ray", "tyro")
"""Packages that the base install, the model library and the HTTP client, does without."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a job with its flags.

    Args:
        arguments: the job and its flags; None: those of the command line.
    """
    job, *flags = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if job in ("-h", "--help"):
        print(usage())
        return
    if job not in JOBS:
        near = difflib.get_close_matches(job, JOBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(JOBS)}."
        sys.exit(_fail(f"there is no job {job!r}: {hint}"))
    if missing := [name for name in _PLATFORM if find_spec(name) is None]:
        sys.exit(_fail(f"{', '.join(missing)} are not installed: pip install 'raydetr[platform]'"))
    sys.argv[1:] = flags
    runpy.run_module(_module_name(job), run_name="__main__", alter_sys=True)


def usage() -> str:
    """The jobs, with the first line of each one's docstring."""
    lines = ["usage: raydetr JOB [flags]; raydetr JOB --help lists the flags of a job", ""]
    for job in JOBS:
        spec = find_spec(_module_name(job))
        source = Path(str(spec and spec.origin)).read_text(encoding="utf-8")
        lines.append(f"  {job:<12}{(ast.get_docstring(ast.parse(source)) or '').splitlines()[0]}")
    return "\n".join(lines)


def _module_name(job: str) -> str:
    """In a wheel the folder `pipelines/` is a package of `raydetr`; in a checkout it is at the root."""
    package = "raydetr.pipelines" if find_spec("raydetr.pipelines") else "pipelines"
    return f"{package}.{job.replace('-', '_')}"


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
