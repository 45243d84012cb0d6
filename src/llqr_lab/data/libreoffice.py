"""German-English sentence pairs from LibreOffice's help, as Debian packages it.

The pages of two languages have the same paths and their paragraphs the same ids. The texts are the
LibreOffice contributors', under the Mozilla Public License 2.0; none of them is in this repository.
"""

from __future__ import annotations

import hashlib
import html
import re
from pathlib import Path

from .errors import DataError, explain_errors, required_path
from .pairs import Pair, Pairs

__all__ = ["DEBIAN", "libreoffice_help", "paragraphs_by_id"]

DEBIAN = Path("/usr/share/libreoffice/help")
HOW = (
    "On Debian or Ubuntu: apt-get install libreoffice-help-de libreoffice-help-en-us (no root, and "
    "without LibreOffice itself: apt-get download both, dpkg -x each .deb DIR, and pass "
    "DIR/usr/share/libreoffice/help)."
)
PARAGRAPH = re.compile(r'<(p|h[1-6]) id="([^"]+)"[^>]*>(.*?)</\1>', re.DOTALL)
TAGS = re.compile(r"(<[^>]*>)")
# Wording for one system or one application; the general wording is hidden too, but has no class.
ALTERNATIVE = re.compile(r'<span hidden="true" id="[^"]*" class=')
SHARES = {"valid": 0.04, "test": 0.04}  # of the pages


def libreoffice_help(root: str | Path = DEBIAN) -> Pairs:
    """Load distinct pairs of German and English paragraphs, a sentence or a few each.

    Left out: paragraphs that are equal in both languages, those that lack a translation, and
    repetitions of a German or of an English paragraph. Pages are drawn into the three parts by a
    hash of their path; in the order test, valid, train, so that no text of the test set, in either
    language, is trained on.

    Args:
        root: folder with de/text and en-US/text; by default where the Debian packages put it.

    Raises:
        DataError: the folders are missing, or hold no pairs.
    """
    root = Path(root)
    german, english = (required_path(root / language / "text", HOW) for language in ("de", "en-US"))
    pages: dict[str, list[Pair]] = {"test": [], "valid": [], "train": []}
    for page in sorted(german.rglob("*.html")):
        name = page.relative_to(german)
        if (english / name).exists():
            pages[_part_of(name.as_posix())] += _matching_pairs(page, english / name)
    if not any(pages.values()):
        raise DataError(f"{root}: no page has paragraphs in both languages. {HOW}")
    seen: tuple[set[str], set[str]] = (set(), set())
    parts = {name: _distinct_pairs(pairs, seen) for name, pairs in pages.items()}
    return Pairs(**parts)


def paragraphs_by_id(page: str) -> dict[str, str]:
    """Return the text of each paragraph and heading of a page by its id; markup removed."""
    return {name: _plain_text(markup) for _, name, markup in PARAGRAPH.findall(page)}


def _plain_text(markup: str) -> str:
    kept, spans = [], [False]  # for every open <span>: whether its text is left out
    for piece in TAGS.split(markup):
        if piece.startswith("<span"):
            spans.append(spans[-1] or bool(ALTERNATIVE.match(piece)))
        elif piece == "</span>" and len(spans) > 1:
            spans.pop()
        elif not spans[-1] and (not piece.startswith("<") or piece.startswith("<br")):
            kept.append(" " if piece.startswith("<br") else piece)
    return " ".join(html.unescape("".join(kept)).split())


def _matching_pairs(german: Path, english: Path) -> list[Pair]:
    texts = []
    for page in (german, english):
        with explain_errors(page, HOW):
            texts.append(paragraphs_by_id(page.read_text(encoding="utf-8")))
    both = ((text, texts[1].get(name, "")) for name, text in texts[0].items())
    return [(a, b) for a, b in both if a and b and a != b]


def _part_of(name: str) -> str:
    # Stable over machines, Python versions and the set of pages, unlike a shuffle.
    u = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
    if u < SHARES["test"]:
        return "test"
    return "valid" if u < SHARES["test"] + SHARES["valid"] else "train"


def _distinct_pairs(pairs: list[Pair], seen: tuple[set[str], set[str]]) -> list[Pair]:
    kept = []
    for pair in pairs:
        if not any(side in known for side, known in zip(pair, seen, strict=True)):
            kept.append(pair)
        for side, known in zip(pair, seen, strict=True):
            known.add(side)
    return kept
