"""The demo page of the endpoint: drop an image to see its detections. One self-contained HTML file."""

import base64
import functools
import hashlib
from pathlib import Path

from raydetr.reports.html import STYLE

_FOLDER = Path(__file__).parent
_SCRIPTS = (
    "api.js",
    "masks.js",
    "picture.js",
    "examples.js",
    "commands.js",
    "look.js",
    "show.js",
    "trouble.js",
    "page.js",
)
"""Concatenated in this order into one scope; the last one starts the page."""


@functools.cache
def index() -> bytes:
    """Return the HTML of `GET /`, encoded.

    Its URLs are relative, so that it also works below a path prefix. Its Content-Security-Policy only allows its own
    script and requests to this server, so a malicious label or file name cannot run code.
    """
    style = f"{STYLE}{_read('page.css')}"
    script = '"use strict";\n(() => {\n' + "\n".join(_read(name) for name in _SCRIPTS) + "})();\n"
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'"
    )
    html = _read("index.html")
    for name, text in {"POLICY": policy, "STYLE": style, "SCRIPT": script}.items():
        html = html.replace(f"@{name}@", text)
    return html.encode()


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
