"""Warnings that point at the user's line, however deep in the library they are raised."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_caller"]

# Whose lines say nothing to a reader: ours, those of what calls back into us, and of decorators.
INNER_PACKAGES = ("llqr", "torch", "contextlib")


def warn_caller(message: str) -> None:
    """Warn at the innermost line that is neither this library's nor torch's.

    A fixed ``stacklevel`` names another line for each way into the library.

    Args:
        message: what is wrong, and the remedy.
    """
    level = 2
    frame = sys._getframe(1).f_back
    while frame is not None:
        level += 1
        if frame.f_globals.get("__name__", "").partition(".")[0] not in INNER_PACKAGES:
            break
        frame = frame.f_back
    warnings.warn(message, stacklevel=level)
