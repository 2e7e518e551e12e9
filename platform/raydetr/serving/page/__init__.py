"""The endpoint's own page: drop a picture, see what the model finds. One HTML file with nothing outside of it."""

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
"""In one scope, in this order; the last one starts it all."""


@functools.cache
def index() -> bytes:
    """The HTML of `GET /`, encoded.

    Its addresses are relative, so that it also works below a path. Its Content-Security-Policy lets it run its own
    script only, and ask this server only: what a label or a file is called can do nothing.
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
