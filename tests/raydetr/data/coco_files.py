"""Read the COCO content of a test as an ingest does."""

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from raydetr.data.fault_codes import Fault
from raydetr.data.ingest.coco import read_coco
from raydetr.data.ingest.index import Index
from raydetr.data.ingest.record import Entry


class Read(NamedTuple):
    """The content of a COCO file."""

    categories: tuple[dict[str, Any], ...]
    entries: list[Entry]
    faults: list[Fault]


def read_file(address: str) -> Read:
    """Read a COCO detection JSON."""
    index = Index()
    categories = read_coco(address, index).categories
    index.join_files()
    return Read(categories, list(index.entries()), list(index.faults()))


def read_content(content: Any, name: str = "x.json") -> Read:
    """Write content to a file of this name and read it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return read_file(name)
