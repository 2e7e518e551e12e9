"""Make names of output files from the names in a data set: inside the output folder, unique, and reversible.

A record's name is untrusted data. It may hold `..`, a leading slash, backslashes or control characters, and two names
may differ only in their extension. `output_name` percent-encodes unsafe parts, as in URLs, and follows the usual COCO
convention `x.jpg` → `x.png`.
"""

from urllib.parse import quote, unquote

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def output_name(name: str, ending: str = "") -> str:
    """Return the path of a record's output file, relative to the output folder.

    Args:
        name: of the record's image, any text.
        ending: extension of the output, such as `.png`; empty to keep the extension of `name`.

    Returns:
        A relative path without empty, `.` and `..` parts, different for different names. `a.jpg` gives `a.png`. Any
        other name stays whole before the extension: `a.png` gives `a.png.png`.
    """
    path = "/".join(_encode(part) for part in name.split("/"))
    if not ending:
        return path
    stem = path.removesuffix(".jpg")
    if stem != path and stem.rpartition("/")[2] and not stem.lower().endswith(_ENDINGS):
        return stem + ending
    return path + ("" if path.lower().endswith(_ENDINGS) else "%") + ending


def record_name(output: str, ending: str = "") -> str:
    """Invert `output_name`: return the record's name for the path of an output file."""
    path = output.removesuffix(ending)
    if ending:
        path = path.removesuffix("%") if path.endswith("%") else path + ("" if _has_ending(path) else ".jpg")
    return "/".join("" if part == "%" else unquote(part, errors="surrogatepass") for part in path.split("/"))


def _has_ending(path: str) -> bool:
    return path.lower().endswith(_ENDINGS)


def _encode(part: str) -> str:
    if not part:
        return "%"  # unambiguous: every other percent sign is followed by two hex digits
    if not part.strip("."):
        return "%2E" * len(part)
    return "".join(
        char if char.isprintable() and char not in "%\\" else quote(char, safe="", errors="surrogatepass")
        for char in part
    )
