"""The demo's page: what stands between ``<!-- demo NAME -->`` and ``<!-- end -->`` is made of runs.

``llqr demo --seeds 10 --page docs`` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.environment import describe_environment
from .pictures import draw_curves
from .runs import NOISE, History
from .summary import Summary, conclusion_lines, result_rows, summarise_runs

__all__ = ["fill_page", "settings_text", "write_page"]

BLOCK = re.compile(r"(<!-- demo (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FEW = 3  # seeds of `llqr demo`
Settings = Mapping[str, Mapping[str, Any]]


def write_page(
    folder: Path, settings: Settings, histories: Mapping[str, Sequence[History]]
) -> None:
    """Put the results, those of the first three seeds too, into demo.md and its picture.

    Args:
        folder: of the pages.
        settings: of each method.
        histories: of each method, a run per seed.
    """
    whole = summarise_runs(settings, histories)
    few = summarise_runs(settings, {name: hs[:FEW] for name, hs in histories.items()})
    blocks = {
        "few": _results_text(few),
        "all": _results_text(whole),
        "conclusion": "\n".join(f"- {line}" for line in conclusion_lines(whole)).replace("+-", "±"),
        "refreshes": _refreshes_text(whole),
        "settings": settings_text(settings),
        "environment": _environment_text(few, whole),
    }
    page = folder / "demo.md"
    page.write_text(fill_page(page.read_text(encoding="utf-8"), blocks), encoding="utf-8")
    draw_curves(whole, NOISE, folder / "images" / "demo-curves.png")


def fill_page(page: str, blocks: Mapping[str, str]) -> str:
    """Return a page with its blocks made anew."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{blocks[found[2]]}\n\n{found[3]}", page)


def settings_text(settings: Settings) -> str:
    """Return what the search found, one method per row."""
    words = {"lr": "lr ", "rho": "rho ", "structure": "", "inner_lr": "inner lr "}
    rows = [
        (name, ", ".join(f"{words[key]}{_plain(value)}" for key, value in found.items()))
        for name, found in settings.items()
    ]
    return _markdown_table(("method", "found"), rows)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _results_text(methods: Mapping[str, Summary]) -> str:
    rows = result_rows(methods)
    cells = [[value.replace("+-", "±") for value in row.values()] for row in rows]
    return _markdown_table(list(rows[0]), cells)


def _refreshes_text(methods: Mapping[str, Summary]) -> str:
    rows = []
    for name, method in methods.items():
        if (r := method["refreshes"]) is not None:
            inactive = "" if r["active"] else ", inactive"
            ends = [r[f"{which}_eigenvalue"] for which in ("smallest", "largest")]
            rows.append(
                (
                    name,
                    f"{r['accepted']} of {r['count']}",
                    f"{_number(r['change'])}{inactive}",
                    *(_number(r[key]) for key in ("ratio", "cosine")),
                    " .. ".join(map(_number, ends)),
                )
            )
    header = ("method", "accepted", "change", "ratio", "cosine", "eigenvalues of \\(U\\)")
    return _markdown_table(header, rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _environment_text(few: Mapping[str, Summary], whole: Mapping[str, Summary]) -> str:
    about = describe_environment()
    seconds = [
        sum(run[-1] for m in methods.values() for run in m["seconds_by_epoch"])
        for methods in (few, whole)
    ]
    return (
        f"{about['processor']}, {about['cores']} cores, processes of one thread each; Python "
        f"{about['python']}, torch {about['torch']}.\nThe steps and refreshes of {FEW} seeds took "
        f"{seconds[0]:.0f} s of the processor, all {seconds[1]:.0f} s."
    )


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
