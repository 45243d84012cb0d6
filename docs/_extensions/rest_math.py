r"""Turn the reStructuredText of docstrings into the Markdown of these pages.

``:math:`x` `` becomes ``\(x\)``, a ``.. math::`` block becomes ``\[ ... \]``, a cross-reference
such as ``:class:`llqr.SAM` `` becomes a link, and an ``Example:`` a section of examples.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

INLINE = re.compile(r":math:`([^`]+)`")
ROLE = re.compile(r":(?:class|func|meth|attr|mod):`~?([^`]+)`")
BLOCK = re.compile(
    r"^(?P<margin> *)\.\. math::[ ]*(?P<first>[^\n]*)\n?"
    r"(?P<rest>(?:(?P=margin) +[^\n]*\n?|[ ]*\n)*)",
    re.MULTILINE,
)


EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


def to_markdown(text: str, owner: str = "llqr") -> str:
    """Return ``text`` with math and cross-references in Markdown.

    Args:
        text: a docstring, dedented.
        owner: the public path of the class around it; lower-case names without a dot are its
            members, other names without a dot are public names of llqr.
    """

    def block(match: re.Match[str]) -> str:
        margin = match["margin"]
        body = "\n".join([match["first"], textwrap.dedent(match["rest"])]).strip()
        return textwrap.indent(f"\\[\n{body}\n\\]\n\n", margin)

    def link(match: re.Match[str]) -> str:
        name = match[1]
        scope = owner if name[0].islower() else "llqr"
        target = name if "." in name else f"{scope}.{name}"
        return f"[`{name}`][{target}]"

    text = EXAMPLE.sub("Examples:", BLOCK.sub(block, text))
    return ROLE.sub(link, INLINE.sub(r"\\(\1\\)", text))


class RestMath(griffe.Extension):
    """Apply :func:`to_markdown` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one object's docstring, if it has one."""
        if obj.docstring is None:
            return
        around = obj if obj.is_class else obj.parent
        owner = f"llqr.{around.name}" if around is not None and around.is_class else "llqr"
        obj.docstring.value = to_markdown(obj.docstring.value, owner)
