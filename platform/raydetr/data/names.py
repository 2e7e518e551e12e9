"""File names that differ from the file's only in how they are written: which file of a folder is meant."""

import posixpath
import re
import unicodedata
from collections.abc import Iterable
from urllib.parse import unquote

_LABEL_STUDIO = re.compile(r".*/data/local-files/\?d=")
_ABSOLUTE = re.compile(r"(file:/*|[a-zA-Z][a-zA-Z0-9+.-]+://|[a-zA-Z]:/|/)+")


def normal(name: str) -> str:
    """A name relative to its folder, without detours; `..` first where it leads out of it."""
    return posixpath.normpath(name)


def leads_out(name: str) -> bool:
    """Whether a name, taken as it is, is of no file within its folder."""
    path = normal(name)
    return path == ".." or path.startswith(("/", "../"))


def stem(name: str) -> str:
    """What files of equal names, whatever the case, the encoding and the ending, have in common: to look them up by."""
    return _canonical(_relative(name)).rpartition("/")[2].rpartition(".")[0]


def match(name: str, files: Iterable[str], folder: str) -> tuple[str | None, list[str]]:
    """The file that a name stands for, and those that it nearly does.

    Separators of Windows, percent-encoding, the case, the Unicode form, a longer path (absolute or with `..`, of the
    annotator's machine) and a shorter one (the bare name of a file in a subfolder) make no other name. A name that two
    files have is of neither. What is found is always in the folder.

    Args:
        name: that is of no file as it is written.
        files: names relative to the folder, those with the same `stem` at least.
        folder: its address.
    """
    files = list(files)
    path = _relative(name)
    root = folder.replace("\\", "/").rstrip("/") + "/"
    exact = [path]
    for full in (name.replace("\\", "/"), posixpath.normpath(posixpath.join(root, name.replace("\\", "/")))):
        if full.startswith(root):  # it leads back into the folder
            exact.append(full.removeprefix(root))
    for spelled in exact:
        if spelled in files:
            return spelled, []
    for alike in (
        [file for file in files if _canonical(file) in map(_canonical, exact)],
        [file for file in files if _ends_alike(_canonical(file), _canonical(path))],
    ):
        if len(alike) == 1:
            return alike[0], []
        if alike:
            return None, alike
    return None, files


def _relative(name: str) -> str:
    """A name with slashes, without the root of an absolute one and without `..` at its start."""
    path = _LABEL_STUDIO.sub("/", name.replace("\\", "/"))
    found = _ABSOLUTE.match(path)
    if found and "://" in found.group():
        path = path.partition("?")[0]
    path = posixpath.normpath(path[found.end() :] if found else path)
    while path.startswith("../"):
        path = path[3:]
    return path


def _canonical(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", unquote(path)).casefold())


def _ends_alike(file: str, path: str) -> bool:
    """Whether one of two paths is the end of the other, in whole components."""
    return f"/{path}".endswith(f"/{file}") or f"/{file}".endswith(f"/{path}")
