"""One HTML file: sections of text, tables, pictures and videos; light and dark; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from attrs import frozen

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --card: #f6f8fa; --page: #ffffff;
  --accent: #0969da; --good: #1a7f37; --bad: #d1242f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4ae; --line: #30363d; --card: #161b22;
  --page: #0d1117; --accent: #58a6ff; --good: #3fb950; --bad: #f85149; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.lede { color: var(--soft); font-size: 1.05rem; }
figure { margin: 1rem 0; } figure svg, figure img, video { max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .875rem; max-width: 46rem; }
video { border-radius: 6px; background: #000; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { text-align: left; padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; font-size: .875rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto;
  font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.paper { background: #fff; border-radius: 6px; padding: .5rem; width: min(100%, 30rem); }
.paper svg { display: block; width: 100%; }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.4rem 0 .5rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.2; } .tile span { color: var(--soft); font-size: .85rem; }
"""


@frozen
class Section:
    """A heading and what stands below it (HTML)."""

    title: str
    body: str


def page(title: str, lede: str, sections: Sequence[Section], tiles: Sequence[tuple[str, str]] = ()) -> str:
    """The whole file.

    Args:
        title, lede: plain text.
        sections: in order.
        tiles: (figure, what it is) shown large at the top, plain text.
    """
    shown = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    body = "\n".join(f"<section><h2>{escape(s.title)}</h2>\n{s.body}\n</section>" for s in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lede">{escape(lede)}</p>\n'
        + (f'<div class="tiles">{shown}</div>\n' if shown else "")
        + f"{body}\n</main></body></html>\n"
    )


def text(*paragraphs: str) -> str:
    """Plain paragraphs."""
    return "".join(f"<p>{escape(p)}</p>" for p in paragraphs)


def code(content: str) -> str:
    """Preformatted text."""
    return f"<pre>{escape(content)}</pre>"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of plain values."""
    head = "".join(f"<th>{escape(str(c))}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(svg: str, caption: str = "", paper: bool = False) -> str:
    """An SVG in the page; `paper` puts white behind a picture drawn for white."""
    inner = f'<div class="paper">{svg}</div>' if paper else svg
    return f'<figure class="scroll">{inner}{_caption(caption)}</figure>'


def image(png: bytes, caption: str = "", alt: str = "") -> str:
    """A PNG in the page."""
    return f'<figure><img alt="{escape(alt)}" src="{_data(png, "image/png")}">{_caption(caption)}</figure>'


def video(mp4: bytes, caption: str = "") -> str:
    """An mp4 in the page, playing in a loop."""
    player = f'<video autoplay loop muted playsinline controls src="{_data(mp4, "video/mp4")}"></video>'
    return f"<figure>{player}{_caption(caption)}</figure>"


def _caption(caption: str) -> str:
    return f"<figcaption>{escape(caption)}</figcaption>" if caption else ""


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
