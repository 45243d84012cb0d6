"""The checks of every statement of section 4 and appendix B."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from . import (
    damping,
    escape,
    hovering,
    selection,
    storage,
    toy_limits,
    transfer,
    two_scale,
    vanilla_sam,
)
from .findings import Finding

__all__ = ["CHECKS", "finding_lines"]

CHECKS: dict[str, Callable[[], list[Finding]]] = {
    "recursions": two_scale.check_recursions,
    "hovering": hovering.check_hovering,
    "escape": escape.check_escape,
    "vanilla SAM": vanilla_sam.check_vanilla_sam,
    "selection": selection.check_selection,
    "damping": damping.check_damping,
    "toys": toy_limits.check_toys,
    "storage": storage.check_storage,
    "transfer": transfer.check_transfer,
}

INDENT = {"initial_indent": " " * 4, "subsequent_indent": " " * 6}


def finding_lines(finding: Finding) -> list[str]:
    """Return one finding as lines of at most 100 characters."""
    row = finding.plain_row()
    head = f"{row['verdict']:<18} {row['source']}: {row['statement']}"
    body = [text for text in (row["measured"], row["note"]) if text]
    return [head, *(line for text in body for line in textwrap.wrap(text, 96, **INDENT))]
