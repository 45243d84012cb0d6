"""Pages with a part that is made of results."""

from __future__ import annotations

__all__ = ["fill_between"]


def fill_between(page: str, begin: str, end: str, inside: str) -> str:
    r"""Return a page with something else between two of its comments.

    Example:
        >>> fill_between("text <b> old <e> more", "<b>", "<e>", "new")
        'text <b>\n\nnew\n\n<e> more'
    """
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{inside}\n\n{end}{rest.split(end)[1]}"
