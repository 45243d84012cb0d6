"""A refresh of minutes is seen: on the bar, or in a line a minute."""

from types import SimpleNamespace

import pytest

from llqr_lab.recipes.progress import show_refreshes


class Bar:
    def __init__(self, disable: bool) -> None:
        self.disable, self.shown = disable, []

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        self.shown.append(text)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_refresh_is_shown(terminal: bool):
    geometry, bar, lines = SimpleNamespace(on_progress=None), Bar(not terminal), []
    show_refreshes(geometry, bar, lines.append)
    for done, seconds in ((1, 2.0), (9, 61.0), (10, 62.0), (20, 130.0)):
        geometry.on_progress(done, 52, seconds)
    geometry.on_progress(3, 52, 65.0)  # the next refresh
    shown = bar.shown if terminal else lines
    expected = (1, 9, 10, 20, 3) if terminal else (9, 20, 3)
    assert [int(text.split()[2]) for text in shown] == list(expected)
    assert shown[-1] == "refresh: product 3 of at most 52, 65 s" and not (bar.shown and lines)


def test_nothing_is_shown_where_nobody_asks():
    geometry = SimpleNamespace(on_progress=None)
    show_refreshes(geometry, Bar(True), None)
    assert geometry.on_progress is None
    show_refreshes(None, Bar(False), print)
