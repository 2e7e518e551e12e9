"""Names of output files made from names that a data set gives: inside the folder, never twice, and reversible.

A record's name is data: it may hold `..`, a leading slash, backslashes or control characters, and two names may differ
in their ending only. `output_name` writes parts of names that are not plain with percent signs, as in URLs, and keeps
the usual COCO convention `x.jpg` → `x.png`.
"""

from urllib.parse import quote, unquote

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def output_name(name: str, ending: str = "") -> str:
    """The name of the output file of a record, relative to the output folder.

    Args:
        name: of the record's image, any text.
        ending: of the output, such as `.png`; empty: the name's own.

    Returns:
        A relative path without empty, `.` and `..` parts; different for different names. `a.jpg` gives `a.png`, every
        other name is kept whole before the ending: `a.png` gives `a.png.png`.
    """
    path = "/".join(_encode(part) for part in name.split("/"))
    if not ending:
        return path
    stem = path.removesuffix(".jpg")
    if stem != path and stem.rpartition("/")[2] and not stem.lower().endswith(_ENDINGS):
        return stem + ending
    return path + ("" if path.lower().endswith(_ENDINGS) else "%") + ending


def record_name(output: str, ending: str = "") -> str:
    """The name that `output_name` made an output's name from."""
    path = output.removesuffix(ending)
    if ending:
        path = path.removesuffix("%") if path.endswith("%") else path + ("" if _has_ending(path) else ".jpg")
    return "/".join("" if part == "%" else unquote(part, errors="surrogatepass") for part in path.split("/"))


def _has_ending(path: str) -> bool:
    return path.lower().endswith(_ENDINGS)


def _encode(part: str) -> str:
    if not part:
        return "%"  # elsewhere a percent sign is followed by two digits
    if not part.strip("."):
        return "%2E" * len(part)
    return "".join(
        char if char.isprintable() and char not in "%\\" else quote(char, safe="", errors="surrogatepass")
        for char in part
    )
