"""Match the file names of a JSON to the files of a folder, also where the two are spelled differently."""

import posixpath
import re
import unicodedata
from collections.abc import Iterable
from urllib.parse import unquote

_LABEL_STUDIO = re.compile(r".*/data/local-files/\?d=")
_ABSOLUTE = re.compile(r"(file:/*|[a-zA-Z][a-zA-Z0-9+.-]+://|[a-zA-Z]:/|/)+")


def normalize_name(name: str) -> str:
    """Resolve `.` and `..` in a relative name. The result starts with `..` if the name points outside its folder."""
    return posixpath.normpath(name)


def is_outside(name: str) -> bool:
    """Whether a name, taken literally, points outside its folder."""
    path = normalize_name(name)
    return path == ".." or path.startswith(("/", "../"))


def normalized_stem(name: str) -> str:
    """Return a lookup key that is equal for names that differ only in folder, case, encoding or extension."""
    return _canonical(_relative(name)).rpartition("/")[2].rpartition(".")[0]


def match_file(name: str, files: Iterable[str], folder: str) -> tuple[str | None, list[str]]:
    """Find the file that a name refers to when no file has exactly this name.

    These differences are ignored: Windows separators, percent-encoding, case, the Unicode form, a longer path (absolute
    or with `..`, from the annotator's machine) and a shorter path (the bare name of a file in a subfolder). A name that
    matches two files matches neither. The result is always inside the folder.

    Args:
        name: a name that no file has exactly.
        files: names relative to the folder; at least all files with the same `normalized_stem`.
        folder: URI of the folder.

    Returns:
        The matching file and an empty list; or None and the near matches.
    """
    files = list(files)
    path = _relative(name)
    root = folder.replace("\\", "/").rstrip("/") + "/"
    exact = [path]
    for full in (name.replace("\\", "/"), posixpath.normpath(posixpath.join(root, name.replace("\\", "/")))):
        if full.startswith(root):  # the path points back into the folder
            exact.append(full.removeprefix(root))
    for spelled in exact:
        if spelled in files:
            return spelled, []
    for alike in (
        [file for file in files if _canonical(file) in map(_canonical, exact)],
        [file for file in files if _is_suffix(_canonical(file), _canonical(path))],
    ):
        if len(alike) == 1:
            return alike[0], []
        if alike:
            return None, alike
    return None, files


def _relative(name: str) -> str:
    """Convert a name to forward slashes, without the root of an absolute path and without leading `..`."""
    path = _LABEL_STUDIO.sub("/", name.replace("\\", "/"))
    root = _ABSOLUTE.match(path)
    if root and "://" in root.group():
        path = path.partition("?")[0]
    path = posixpath.normpath(path[root.end() :] if root else path)
    while path.startswith("../"):
        path = path[3:]
    return path


def _canonical(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", unquote(path)).casefold())


def _is_suffix(file: str, path: str) -> bool:
    """Whether one path ends with the other, in whole components."""
    return f"/{path}".endswith(f"/{file}") or f"/{file}".endswith(f"/{path}")
