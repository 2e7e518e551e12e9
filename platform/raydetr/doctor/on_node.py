"""Functions that run on every node, independent of the code and versions installed there.

Ray ships this module by value, so it imports only the standard library.
"""

# Annotations stay text: Ray would otherwise ship the classes by value with the functions.
from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TypedDict

PACKAGES = ("detr", "raydetr")
DISTRIBUTIONS = ("torch", "torchvision", "timm", "ray", "pyarrow", "numpy", "mlflow")


class PackageFiles(TypedDict):
    """The code of a package on a node: its `root`, and name → checksum of its files; none if it cannot be imported."""

    root: str
    files: dict[str, str]


class NodeDescription(TypedDict):
    """What a node has: a dictionary, because the node and the driver may have different versions of this module.

    versions: distribution, or "python" → version.
    code: package → its files.
    cpus: CPUs that this process may use.
    memory_bytes: memory of the machine or container.
    temporary: (free, total) bytes of the disk of Ray's files.
    """

    versions: dict[str, str]
    code: dict[str, PackageFiles]
    cpus: int
    memory_bytes: int
    temporary: tuple[int, int]


def describe() -> NodeDescription:
    """Describe this node: versions, checksums of the code that it imports, CPUs, memory, disk space for Ray's files."""
    return {
        "versions": {"python": platform.python_version(), **_installed()},
        "code": {package: _code(package) for package in PACKAGES},
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": _memory_bytes(),
        "temporary": _disk_space(tempfile.gettempdir()),
    }


def disk_space(folder: str) -> tuple[int, int]:
    """Return (free, total) bytes of the disk of a folder, which need not exist yet."""
    return _disk_space(folder)


def _installed() -> dict[str, str]:
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _code(package: str) -> PackageFiles:
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
    """Return the memory of the machine, or the limit of the container if that is lower."""
    bounds = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            bounds.append(int(Path(file).read_text()))
        except (OSError, ValueError):
            continue  # another version of cgroups, or no limit
    return min(bounds)


def _disk_space(folder: str) -> tuple[int, int]:
    existing = Path(folder)
    while not existing.is_dir():
        existing = existing.parent
    usage = shutil.disk_usage(existing)
    return usage.free, usage.total
