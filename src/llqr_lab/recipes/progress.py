"""How far a refresh of minutes is: on the bar of a terminal, or as lines of a log."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

import llqr

__all__ = ["show_refreshes"]

#: Seconds between two lines where there is no terminal.
MINUTE = 60.0


def show_refreshes(
    geometry: llqr.Geometry | None, bar: tqdm, say: Callable[[str], object] | None
) -> None:
    """Show how far each long refresh is.

    Args:
        geometry: whose refreshes; None: there are none.
        bar: of the run.
        say: writes a line where the bar is not shown, at most one per minute; None: nothing is.
    """
    if geometry is None or (bar.disable and say is None):
        return
    told = 0.0

    def show(done: int, total: int, seconds: float) -> None:
        nonlocal told
        text = f"refresh: product {done} of at most {total}, {seconds:.0f} s"
        if not bar.disable:
            bar.set_postfix_str(text, refresh=True)
            return
        # A new refresh starts its seconds anew.
        told = 0.0 if seconds < told else told
        if say is not None and seconds >= told + MINUTE:
            told = seconds
            say(text)

    geometry.on_progress = show
