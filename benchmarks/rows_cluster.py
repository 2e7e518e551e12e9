"""Rows of the table of `bench.py` that need Ray, each measured by its own program."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from pairs import Row

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data" / "coco128"


def stream() -> Row:
    """Training data through Ray Data."""
    return _measured("stream_throughput.py")


def served() -> Row:
    """The endpoint with the number of clients that gives the highest throughput."""
    return _measured("serving.py", "--seconds", "12", "--clients", "8", "32")


ROWS = {"stream": stream, "served": served}


def _measured(program: str, *flags: str) -> Row:
    if not DATA.is_dir():
        raise FileNotFoundError(f"{program} needs the folder {DATA}, which does not exist")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "row.json")
        command = [sys.executable, str(HERE / program), *flags, "--json", str(file)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return Row(**json.loads(file.read_text(encoding="utf-8")))
