"""Rows of the table that `bench.py` prints which need Ray, each measured by a program of its own."""

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
    """The endpoint with as many clients as it answers most of."""
    return _measured("serving.py", "--seconds", "12", "--clients", "8", "32")


ROWS = {"stream": stream, "served": served}


def _measured(program: str, *flags: str) -> Row:
    if not DATA.is_dir():
        raise FileNotFoundError(f"{program} needs the folder {DATA}, which is not there")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "row.json")
        command = [sys.executable, str(HERE / program), *flags, "--json", str(file)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return Row(**json.loads(file.read_text(encoding="utf-8")))
