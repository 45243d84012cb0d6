"""Check that built pages need nothing from elsewhere, and that their own files are there.

Usage: python check_pages.py SITE
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Attributes by which a browser loads something without being asked; links are followed on a click.
LOADING = {
    "src": {"audio", "embed", "iframe", "img", "input", "script", "source", "track", "video"},
    "srcset": {"img", "source"},
    "poster": {"video"},
    "data": {"object"},
    "href": {"link", "image", "use"},
}
#: Relations of <link> that only name an address.
NAMES_ONLY = {"canonical", "next", "prev", "alternate", "license", "author"}
URL = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")


class _Loaded(HTMLParser):
    """Collects what a page loads, style sheets within the page included."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_style = tag == "style"
        given = {name: value or "" for name, value in attrs}
        if tag == "link" and given.get("rel", "") in NAMES_ONLY:
            return
        for name, value in given.items():
            if name == "srcset":
                self.addresses += [part.split()[0] for part in value.split(",") if part.split()]
            elif tag in LOADING.get(name, ()):
                self.addresses.append(value)
            elif name == "style":
                self.addresses += in_style_sheet(value)

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.addresses += in_style_sheet(data)


def in_style_sheet(text: str) -> list[str]:
    """Return the addresses that a style sheet loads."""
    return [first or second for first, second in URL.findall(text)]


def loaded_by(path: Path) -> list[str]:
    """Return the addresses that a page or a style sheet loads."""
    if path.suffix == ".css":
        return in_style_sheet(path.read_text())
    page = _Loaded()
    page.feed(path.read_text())
    return page.addresses


def faults(site: Path) -> Iterator[str]:
    """Yield what a reader without a network would miss."""
    for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        for address in loaded_by(path):
            parts = urlsplit(address)
            where = f"{path.relative_to(site)}: {address[:100]}"
            if parts.scheme == "data" or address.startswith("#"):
                continue
            if parts.scheme or parts.netloc:
                yield f"{where} is loaded from elsewhere"
            elif not _target(site, path, unquote(parts.path)).exists():
                yield f"{where} is not there"


def _target(site: Path, page: Path, address: str) -> Path:
    return site / address.lstrip("/") if address.startswith("/") else page.parent / address


def main() -> None:
    """Check; exit with what is missing."""
    site = Path(sys.argv[1])
    if not any(site.rglob("*.html")):
        sys.exit(f"{site} has no pages")
    found = list(faults(site))
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
