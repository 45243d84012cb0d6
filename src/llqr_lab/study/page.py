"""The tables of a study, as Markdown, and the page that they stand in."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.pages import fill_between
from .metrics import METRICS
from .plan import STUDIES, two_by_twos
from .readings import Difference, best_tuned, gain, interaction, metrics_of, time_to, verdict

__all__ = ["chance_of_a_win", "in_short", "section", "write_page"]

READING_TITLES = {"seconds": "equal seconds", "steps": "equal steps"}

#: What the README shows of the proof.
IN_SHORT = (
    "SGDM",
    "SAM",
    "AdamW",
    "SOAP",
    "NG",
    "AdamW in U's bases",
    "AdamW in GM's bases",
    "AdamW in GM's bases + SAM along g",
)
Results = Mapping[str, Any]


def marks(study: str) -> tuple[str, str]:
    """Return the comments that a study's tables stand between."""
    return f"<!-- llqr study {study} -->", f"<!-- end of llqr study {study} -->"


def _between(text: str, marked: str, inside: str) -> str:
    """Return a text with something else between two of its comments, if it has them."""
    begin, end = marks(marked)
    if begin not in text:
        return text
    return fill_between(text, begin, end, inside)


def write_page(page: Path, results: Path) -> Path:
    """Put the tables of all kept studies into the page; the rest of the page stays."""
    text = page.read_text()
    kept = json.loads(results.read_text()) if results.exists() else {}
    for study in STUDIES:
        text = _between(text, study, section(kept.get(study)))
    text = _between(text, "proof, in short", in_short(kept.get("proof")))
    page.write_text(text)
    return page


def section(results: Results | None) -> str:
    """Return what the page shows of a study."""
    if not results or not results["problems"]:
        return "The study has not been run yet."
    blocks = [_conditions(results)]
    for baseline in STUDIES[results["study"]].baselines:
        blocks += [f"### Against {baseline}", _gains(results, baseline)]
        if baseline == STUDIES[results["study"]].baselines[0]:
            if STUDIES[results["study"]].glanced:
                blocks.append(f"![Differences](images/study-{results['study']}-gains.svg)")
            blocks.append(_count_wins(results, baseline))
    if two_by_twos(results["methods"]):
        blocks += ["### Does SAM add more with a metric than without?", _interactions(results)]
    for name, problem in results["problems"].items():
        blocks += [f"### {name}: {problem['title']}", _problem_table(results, problem)]
        blocks.append(f"![{name}](images/study-{results['study']}-{name}.svg)")
    return "\n\n".join(blocks)


def in_short(results: Results | None) -> str:
    """Return the results of a few methods at equal seconds.

    Of a problem that was also tuned with its weight decay, the better tuned one is shown.
    """
    if not results or not results["problems"]:
        return "The study has not been run yet."
    problems = best_tuned(results["problems"])
    rows = [
        [
            method,
            *(
                _mean_and_deviation(p["methods"][method], "seconds", 2)
                if method in p["methods"]
                else "not run"
                for p in problems.values()
            ),
        ]
        for method in IN_SHORT
    ]
    units = (METRICS[p["metric"]].unit for p in problems.values())
    return _table(
        ["method", *(f"{n}, {unit}" for n, unit in zip(problems, units, strict=True))], rows
    )


def _conditions(results: Results) -> str:
    effort, place = results["effort"], results["environment"]
    seeds = effort["tuning_seeds"]
    of_seeds = f", each on {seeds} seed{'s' if seeds > 1 else ''}"
    tuning = f"tries {effort['tuning']} settings on every problem{of_seeds}"
    if effort["tuning"] == 0:
        tuning = "has the usual learning rate and radius, without a search"
    device = place.get("accelerator", place["processor"])
    return (
        f"Scale `{results['scale']}`: every method {tuning}; "
        f"the results are of {effort['seeds']} other seeds. "
        f"Costs were measured on: {device}; torch {place['torch']}."
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([_row(header), _row(["---"] * len(header)), *map(_row, rows)])


def _digits(problem: Mapping[str, Any]) -> int:
    return METRICS[problem["metric"]].digits


def _shown(difference: Difference | None, digits: int) -> str:
    """Return "mean ± standard error", bold beyond two of them."""
    if difference is None:
        return ""
    text = f"{difference['mean']:+.{digits}f}"
    if difference["standard_error"] is not None:
        text += f" ± {difference['standard_error']:.{digits}f}"
    return f"**{text}**" if verdict(difference) in ("better", "worse") else text


def _gains(results: Results, baseline: str) -> str:
    problems = results["problems"]
    rows = [
        [method]
        + [
            _shown(gain(problem, method, baseline, "seconds"), _digits(problem))
            for problem in problems.values()
        ]
        for method in results["methods"]
        if method != baseline
    ]
    header = [f"minus {baseline}, equal seconds", *problems]
    return _table(header, [row for row in rows if any(row[1:])])


def chance_of_a_win(seeds: int) -> float:
    """Return how often two standard errors in a given direction come by chance.

    The mean of n differences over its standard error has Student's distribution with n - 1 degrees
    of freedom if there is nothing to find.

    Example:
        >>> round(chance_of_a_win(5), 3)
        0.058
    """
    n, points = seeds - 1, 2_000
    if n == 0:
        return math.nan
    log_scale = math.lgamma((n + 1) / 2) - math.lgamma(n / 2) - math.log(n * math.pi) / 2
    middles = (2 * (i + 0.5) / points for i in range(points))
    inside = sum((1 + x**2 / n) ** (-(n + 1) / 2) for x in middles) * 2 / points
    return 0.5 - math.exp(log_scale) * inside


def _count_wins(results: Results, baseline: str) -> str:
    claimed = [m for m in STUDIES[results["study"]].claimed if m in results["methods"]]
    found = [
        (reading, verdict(gain(problem, method, baseline, reading)))
        for reading in READING_TITLES
        for problem in results["problems"].values()
        for method in claimed
    ]
    found = [(reading, what) for reading, what in found if what]
    if not found:
        return (
            "No direction was stated beforehand: the differences beyond two standard errors "
            "are what to look at again, not findings."
        )
    lines = [
        "Stated beforehand: every method with a metric is better than " + baseline + ". A win is a "
        "mean difference of at least two standard errors in that direction."
    ]
    for reading, title in READING_TITLES.items():
        said = [what for r, what in found if r == reading]
        counts = ", ".join(f"{said.count(w)} {w}" for w in ("better", "level", "worse"))
        lines.append(f"At {title}, of {len(said)} comparisons: {counts}.")
    seeds = results["effort"]["seeds"]
    chance = chance_of_a_win(seeds)
    lines.append(
        f"With {seeds} seeds, {100 * chance:.1f} % of comparisons are beyond two standard errors "
        f"in a given direction by chance: {chance * len(found):.1f} of these {len(found)}. "
        "No direction was stated for the other differences on this page."
    )
    return " ".join(lines)


def _interactions(results: Results) -> str:
    problems = results["problems"]
    rows = [
        [f"{square[3]} - {square[2]} - ({square[1]} - {square[0]})", title]
        + [_shown(interaction(p, square, reading), _digits(p)) for p in problems.values()]
        for square in two_by_twos(results["methods"])
        for reading, title in READING_TITLES.items()
    ]
    return _table(["what SAM adds with U, minus without", "at", *problems], rows)


def _problem_table(results: Results, problem: Mapping[str, Any]) -> str:
    first, *others = STUDIES[results["study"]].baselines
    target = others[0] if others else first
    size, digits = problem["size"], _digits(problem)
    searched = _searched(problem)
    unit = METRICS[problem["metric"]].title
    header = [
        "method", "ms per step", *searched, f"equal steps: test {unit}", f"better than {first}",
        "steps in equal seconds", f"test {unit}", f"better than {first}",
        f"to {target}'s training loss: steps, seconds", f"to its test {unit}: steps, seconds",
    ]  # fmt: skip
    rows = []
    for method, entry in problem["methods"].items():
        if "error" in entry:
            rows.append([method, f"failed: {entry['error']}"] + [""] * (len(header) - 2))
            continue
        cost, tuned = entry["cost"], entry["tuned"]
        cells = [method, f"{1e3 * cost['seconds'][-1] / cost['steps'][-1]:.1f}"]
        for name in searched:
            value = tuned["settings"].get(name)
            end = " (end)" if name in tuned["ends"] else ""
            cells.append("" if value is None else f"{value:.2g}{end}")
        for reading in ("steps", "seconds"):
            if reading == "seconds":
                cells.append(str(entry["lengths"]["seconds"]))
            cells.append(_mean_and_deviation(entry, reading, digits))
            same = method == first
            cells.append("" if same else _shown(gain(problem, method, first, reading), digits))
        cells += [_shares(time_to(problem, method, target, column)) for column in (1, 2)]
        rows.append(cells)
    about = (
        f"Data: {size['source']}, {size['train']:,} training examples, batches of {size['batch']}; "
        f"{size['steps']} steps at equal steps; {problem['budget']:.2g} s at equal seconds, what "
        f"{first} takes for them. Shares are of what {target} takes in the equal seconds; a dash: "
        "not reached by all seeds."
    ) + _unusual_tuning(results, problem)
    return about + "\n\n" + _table(header, rows)


def _entries(problem: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what there is of the methods that did not fail."""
    return [entry for entry in problem["methods"].values() if "error" not in entry]


def _searched(problem: Mapping[str, Any]) -> list[str]:
    """Return the columns of the settings that were searched."""
    found = {name for entry in _entries(problem) for name in entry["tuned"]["settings"]}
    return ["lr", "rho", *(["decay"] if "decay" in found else [])]


def _unusual_tuning(results: Results, problem: Mapping[str, Any]) -> str:
    """Return a sentence if a problem's methods had other numbers of runs than elsewhere."""
    counts = {len(entry["tuned"]["trials"]) for entry in _entries(problem)}
    if counts <= {results["effort"]["tuning"]}:
        return ""
    return f" Every method tried {' or '.join(map(str, sorted(counts)))} settings here."


def _mean_and_deviation(entry: Mapping[str, Any], reading: str, digits: int) -> str:
    values = list(metrics_of(entry, reading).values())
    if not values:
        return "failed"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    bad = sum(run["ended"] != "finished" for run in entry["runs"][reading])
    note = f", {bad} diverged" if bad else ""
    return f"{statistics.fmean(values):.{digits}f} ± {spread:.{digits}f}{note}"


def _shares(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ""
    return "-" if math.isinf(found["steps"]) else f"{found['steps']:.2f}, {found['seconds']:.2f}"
