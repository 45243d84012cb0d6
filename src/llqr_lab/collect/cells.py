"""The cells of a table: which runs belong to one, which of them are used, and their statistics."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..common.statistics import paired_by_seed
from ..protocols import EXPERIMENTS, METHODS, SCALES, slug
from .likeness import differences_between
from .runs import Cell, Found, Run, RunError, finite_numbers

__all__ = [
    "Chosen",
    "choose_runs",
    "choose_scale",
    "notes_on_choices",
    "notes_on_differences",
    "run_command",
    "seed_differences",
    "used_runs",
]


@dataclass(frozen=True)
class Chosen:
    """The runs of a cell that are used, by seed, and what has to be said of them."""

    runs: Mapping[int, Run] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def numbers_by_seed(self, key: str) -> dict[int, float]:
        """Return a number of each run (``best``, ``last``, or one of the timing) by seed."""
        found = {seed: (run["timing"] or run.content).get(key) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    @property
    def example(self) -> Run | None:
        """Return one of the runs, which differ only in their seeds."""
        return next(iter(self.runs.values()), None)

    @property
    def changed_settings(self) -> list[str]:
        """Return the settings that were changed by hand, with their values."""
        run = self.example
        return [f"{key}={run['settings'].get(key)}" for key in run.changed_keys] if run else []

    def differences_from(self, other: Chosen) -> list[str]:
        """Return in what the runs differ from those of another method, apart from the method."""
        one, against = self.example, other.example
        return differences_between(one, against) if one and against else []


def choose_scale(found: Found, cells: Iterable[Cell], asked: str | None) -> tuple[str, list[str]]:
    """Return the scale to use, and notes on runs of the others.

    Args:
        found: the runs.
        cells: those that are wanted.
        asked: by the user; None: the largest scale that any of the cells has runs of.
    """
    wanted = set(cells)
    counts = dict.fromkeys(SCALES, 0)
    for run in found.runs:
        counts[run["scale"]] += run.cell in wanted
    scale = asked or next((name for name in SCALES if counts[name]), SCALES[0])
    notes = [
        f"{count} runs of scale {name} are not used: scales never mix."
        for name, count in counts.items()
        if count and name != scale
    ]
    return scale, notes


def choose_runs(runs: Sequence[Run], cell: Cell, recipe: str) -> Chosen:
    """Choose the runs of a cell, one per seed, all of equal settings.

    Runs with settings of the protocol go before those that were changed by hand, and those of the
    recipe asked for before those of other recipes, be it that their settings differ or that they
    repeat a seed. What is left out is said; where neither rule decides, nothing is chosen silently.

    Args:
        runs: of one scale.
        cell: the cell.
        recipe: the experiment that is made.

    Raises:
        RunError: two runs are equally good.
    """
    mine = [run for run in runs if run.cell == cell]
    notes = []
    # Runs repeat each other only if all their settings agree: a mean never mixes settings.
    variants: dict[str, list[Run]] = defaultdict(list)
    for run in mine:
        variants[run.variant].append(run)
    if len(variants) > 1:
        # The protocol's own settings win; of several changed ones none is more right.
        plain = [name for name, members in variants.items() if not members[0].changed_keys]
        of_recipe = [n for n in plain if any(run["recipe"] == recipe for run in variants[n])]
        if len(plain) > 1 and len(of_recipe) == 1:
            names = {r["recipe"] for n in plain if n not in of_recipe for r in variants[n]}
            notes.append(
                f"{describe_cell(cell)}: runs of {', '.join(sorted(names))} have other settings "
                "and are not used; --where recipe=NAME shows them."
            )
            plain = of_recipe
        if len(plain) != 1:
            differing = _differing_settings([members[0] for members in variants.values()])
            folders = ", ".join(str(members[0].folder) for members in variants.values())
            raise RunError(
                f"{describe_cell(cell)}: runs with different settings ({differing}): {folders}; "
                "choose with --where KEY=VALUE, or move the others elsewhere"
            )
        by_hand = sum(bool(run.changed_keys) for run in mine)
        if by_hand:
            notes.append(
                f"{describe_cell(cell)}: {by_hand} runs with settings changed by hand are not used."
            )
        mine = variants[plain[0]]
    by_seed: dict[int, list[Run]] = defaultdict(list)
    for run in mine:
        by_seed[run["seed"]].append(run)
    chosen = {}
    for seed, candidates in sorted(by_seed.items()):
        # Recipes share cells, so that a seed may have been run for two tables.
        own = [run for run in candidates if run["recipe"] == recipe]
        best = own if len(own) == 1 else candidates
        if len(best) > 1:
            raise RunError(
                f"{describe_cell(cell)}: {len(best)} runs of seed {seed}: "
                f"{', '.join(str(run.folder) for run in best)}; delete all but one, or choose with "
                "--where recipe=NAME"
            )
        if len(candidates) > 1:
            notes.append(
                f"{describe_cell(cell)}, seed {seed}: of {len(candidates)} equal runs that of "
                f"{recipe} is used."
            )
        # A run that diverged has no number; as NaN it would hide the other seeds.
        if best[0]["timing"] is None and not list(finite_numbers([best[0]["best"]])):
            notes.append(
                f"{describe_cell(cell)}, seed {seed}: no finite result; left out of the mean."
            )
            continue
        chosen[seed] = best[0]
    return Chosen(chosen, notes)


def used_runs(several: Iterable[Chosen]) -> list[Run]:
    """Return the runs of several cells."""
    return [run for chosen in several for run in chosen.runs.values()]


def notes_on_choices(several: Iterable[Chosen]) -> list[str]:
    """Return what has to be said of the runs of several cells."""
    return [note for chosen in several for note in chosen.notes]


def _differing_settings(runs: Sequence[Run]) -> str:
    keys = sorted({key for run in runs for key in run["settings"]} | {"source", "data.digest"})
    said = []
    for key in keys:
        values = {json.dumps(run.setting_or_entry(key)) for run in runs}
        if len(values) > 1 and key not in ("noise", "read"):
            said.append(f"{key}: {' or '.join(sorted(values))}")
    return ", ".join(said)


def describe_cell(cell: Cell) -> str:
    """Return the cell in words."""
    parts = [cell.dataset, cell.model, cell.method]
    parts += [f"noise {cell.noise:g}"] * bool(cell.noise)
    parts += [f"every {cell.every}"] * (cell.every is not None)
    return ", ".join(parts)


def seed_differences(mine: Chosen, baseline: Chosen, key: str) -> dict[str, Any] | None:
    """Return mean and standard error of the differences of a number over shared seeds.

    None if no seed is shared, or if the runs differ in more than their methods.
    """
    if mine.differences_from(baseline):
        return None
    return paired_by_seed(mine.numbers_by_seed(key), baseline.numbers_by_seed(key))


def notes_on_differences(pairs: Iterable[tuple[Cell, Chosen, Cell, Chosen]]) -> list[str]:
    """Say which cells are not compared, and in what they differ.

    Args:
        pairs: a cell and its runs, and those of its baseline.
    """
    said = {}
    for cell, mine, against, baseline in pairs:
        if unlike := mine.differences_from(baseline):
            said[cell, against] = (
                f"{describe_cell(cell)}: no difference to {against.method} is taken: the runs "
                f"differ in {', '.join(unlike)}."
            )
    return list(said.values())


def run_command(
    recipe: str,
    cell: Cell,
    scale: str,
    seed: int = 0,
    out: str = "outputs",
    weight_decay: float | None = None,
) -> str:
    """Return the command that makes a run of a cell, with the weight decay selected for its row.

    Example:
        >>> run_command("table1", Cell("CIFAR-10", "resnet18", "LLQR+SAM (NGD)"), "paper")
        'llqr run table1 model=resnet18 method=llqr-sam seed=0 data=/path out=outputs'
    """
    several = len(EXPERIMENTS[recipe].datasets) > 1
    words = [f"dataset={slug(cell.dataset)}"] * several
    words += [f"model={cell.model}", f"method={slug(cell.method)}"]
    words += [f"noise={cell.noise:g}"] * bool(cell.noise)
    words += [f"llqr.every={cell.every}"] * bool(cell.every and METHODS[cell.method].curvature)
    # Adam's is not the one that SGDM selects.
    if weight_decay is not None and not cell.method.startswith("Adam"):
        words.append(f"base.weight_decay={weight_decay:g}")
    words += [f"scale={scale}"] * (scale != SCALES[0])
    words += [f"seed={seed}"]
    # Timings read no data; what smaller runs read comes with the lab.
    words += ["data=/path"] * (scale == SCALES[0] and not cell.model.startswith("vit"))
    return " ".join(["llqr run", recipe, *words, f"out={out}"])
