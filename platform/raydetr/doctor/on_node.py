"""What runs on every node, whatever code and versions that node has.

This file is sent there as it is here, so it needs nothing but the standard library.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("detr", "raydetr")
DISTRIBUTIONS = ("torch", "torchvision", "timm", "ray", "pyarrow", "numpy", "mlflow")


def describe() -> dict[str, Any]:
    """What this node is: versions, checksums of the code that it imports, processors, memory, room for Ray's files."""
    return {
        "versions": {"python": platform.python_version(), **_installed()},
        "code": {package: _code(package) for package in PACKAGES},
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": _memory_bytes(),
        "temporary": _room(tempfile.gettempdir()),
    }


def room(folder: str) -> tuple[int, int]:
    """(free, all) bytes of the disk on which a folder is, or will be."""
    return _room(folder)


def _installed() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _code(package: str) -> dict[str, Any]:
    """`root` of a package, and `files`: name to checksum; no files where it cannot be imported."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return {"root": "", "files": {}}
    root = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(file for file in root.rglob("*.py") if "__pycache__" not in file.parts)
    return {
        "root": str(root),
        "files": {
            file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
            for file in files
        },
    }


def _memory_bytes() -> int:
    """Of the machine, or of the container where that is less."""
    bounds = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            bounds.append(int(Path(file).read_text()))
        except (OSError, ValueError):
            continue  # another version of cgroups, or no limit
    return min(bounds)


def _room(folder: str) -> tuple[int, int]:
    there = Path(folder)
    while not there.is_dir():
        there = there.parent
    usage = shutil.disk_usage(there)
    return usage.free, usage.total
