"""The few pieces of HTML of the report: plain, without scripts and without anything external."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

__all__ = [
    "contents",
    "details",
    "escape",
    "heading",
    "list_of",
    "page",
    "paragraph",
    "picture",
    "table",
    "wide",
]

STYLE = """\
:root { --back: #ffffff; --text: #1c2024; --soft: #5f6b76; --line: #d5dbe1; --shade: #f3f5f7;
  --warn-back: #fff3d6; --warn: #7a4b00; --ngd: #0072b2; --newton: #b34a00; }
@media (prefers-color-scheme: dark) {
  :root { --back: #15191d; --text: #e4e8ec; --soft: #9aa6b2; --line: #38414a; --shade: #1e242a;
    --warn-back: #3d2f10; --warn: #ffd37a; --ngd: #6cc0f0; --newton: #ff9d5c; } }
* { box-sizing: border-box; }
body { background: var(--back); color: var(--text); margin: 0 auto; max-width: 98rem;
  padding: 1.5rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 .5rem; } h2 { margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line);
  padding-top: 1.2rem; } h3 { margin: 1.4rem 0 .3rem; }
p, li { max-width: 62rem; } .soft { color: var(--soft); }
.warn { background: var(--warn-back); color: var(--warn); padding: .6rem .9rem;
  border-radius: .4rem; font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .84rem; margin: .6rem 0;
  font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .3rem .5rem; text-align: left;
  vertical-align: top; } thead th { background: var(--shade); } td.number { white-space: nowrap; }
.paper, .minus { display: block; color: var(--soft); font-size: .85em; }
.missing { background: repeating-linear-gradient(45deg, transparent 0 6px, var(--shade) 6px 12px);
  color: var(--soft); } .missing b { font-weight: 400; font-style: italic; }
.ngd { color: var(--ngd); } .newton { color: var(--newton); }
img { max-width: 100%; background: #ffffff; border-radius: .4rem; }
pre { background: var(--shade); padding: .6rem .9rem; overflow-x: auto; font-size: .82rem; }
nav a { color: inherit; } nav ul { columns: 2; max-width: 62rem; }
summary { cursor: pointer; color: var(--soft); margin: .4rem 0; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """Return a whole document; it follows the reader's choice of light or dark."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{STYLE}</style>",
            "</head>",
            "<body>",
            f"<h1>{escape(title)}</h1>",
            *body,
            "</body>",
            "</html>\n",
        ]
    )


def heading(title: str) -> str:
    """Return the heading of a section, with a name to link to."""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return f'<h2 id="{name}">{escape(title)}</h2>'


def contents(sections: Iterable[str]) -> str:
    """Return links to the headings."""
    found = re.findall(r'<h2 id="([^"]*)">(.*?)</h2>', "".join(sections))
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in found)
    return f"<nav><ul>{links}</ul></nav>"


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of plain text; kind: "soft" or "warn"."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def list_of(items: Iterable[str]) -> str:
    """Return a list of plain texts; nothing if there are none."""
    entries = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{entries}</ul>" if entries else ""


def details(summary: str, body: str) -> str:
    """Return what opens when its summary is clicked."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of plain values; None becomes a dash."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{_value(value)}</td>" for value in row) + "</tr>" for row in rows
    )
    return wide(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def wide(inside: str) -> str:
    """Let something wide scroll by itself."""
    return f'<div class="wide">{inside}</div>'


def picture(path: Path, text: str) -> str:
    """Return a PNG with its bytes in the page."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'


def _value(value: object) -> str:
    if value is None:
        return "–"
    return escape(f"{value:.3g}" if isinstance(value, float) else str(value))


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
