"""The frame of the HTML reports: a self-contained page for any window width, dark mode and print."""

from html import escape

STYLE = """
:root{color-scheme:light dark;--ink:#1c2733;--soft:#5c6b7a;--line:#d8dee6;--paper:#fff;--bar:#2f6db3;--mark:#c2410c}
@media(prefers-color-scheme:dark){:root{--ink:#e6ebf0;--soft:#9fb0c0;--line:#34414e;--paper:#12181f;--bar:#6aa5e6;--mark:#fb923c}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1100px;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--line)}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.6rem;margin:0}
dt{color:var(--soft);font-size:.85rem}dd{margin:0;font-size:1.25rem;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
dd.small{font-size:.8rem;font-family:ui-monospace,monospace}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.2rem .6rem .2rem 0;vertical-align:top;font-weight:400}
thead th{color:var(--soft);font-size:.85rem}.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.bars th{width:30%;overflow-wrap:anywhere}.bars th,.bars td{vertical-align:middle}.bars svg{width:100%;height:.8rem;display:block}.hidden{position:absolute;left:-9999px}
svg rect{fill:var(--bar)}svg text{fill:var(--soft);font-size:12px}svg path{stroke:var(--line)}svg line{stroke:var(--mark);stroke-width:2}
figure{margin:0}figcaption{color:var(--soft);font-size:.9rem;overflow-wrap:anywhere}.chart{width:100%;height:auto}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:1.2rem}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));gap:1rem}.sheet img{width:100%;height:auto;border-radius:4px}
ul{margin:.2rem 0;padding-left:1.1rem;color:var(--soft);font-size:.9rem;overflow-wrap:anywhere}
.scroll{max-height:34rem;overflow:auto}@media print{.scroll{max-height:none}figure,tr{break-inside:avoid}}
"""


def document(title: str, body: str, style: str = "", script: str = "") -> bytes:
    """Build a complete, encoded HTML page.

    Args:
        title: plain text.
        body: HTML.
        style: CSS, added after the common style.
        script: JavaScript, run after the body is loaded.
    """
    code = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>{body}{code}</body></html>\n"
    ).encode()
