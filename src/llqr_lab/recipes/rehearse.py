"""The rehearsal of the recipes: ``python -m llqr_lab.recipes.rehearse``.

Before days are spent on a recipe, see that every cell of it can run: each network at the paper's
size, with each method, makes two steps with one refresh on made-up data in the format of the real
ones. The batch and the number of inner steps are smaller, nothing is compiled or in bfloat16, and
the probe starts at once; no number that it prints says anything of accuracy. One cell runs at a
time, in a process of its own with one thread, so that its peak of memory and its seconds (of the
processor) are its own; a cell that exceeds a limit is ended, and the table says so. A rehearsal
that was killed goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

import llqr

from ..common.limited_process import Limits, run_in_process
from ..common.output import without_nan, write_whole
from ..data.made_up import FORMATS, made_up_data
from ..protocols import EXPERIMENTS, resolve_settings, slug
from .cadence import measure_cadence
from .config import RECIPES, compose_config, resolve_config
from .halving import Journal
from .loop import Training
from .records import Records
from .run import TIMINGS, describe_run, make_task
from .workers import Workers

__all__ = ["Cell", "Sizes", "cells_of", "main", "rehearse_cell", "table_of"]

STEPS = 2


@dataclass(frozen=True)
class Sizes:
    """What is smaller than in the recipe.

    Attributes:
        batch: pictures of a step and of a refresh; sentences of a refresh.
        tokens: of a step in translation.
        inner_steps: of a refresh.
        changes: further settings, as key=value.
    """

    batch: int = 4
    tokens: int = 48
    inner_steps: int = 2
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One network, data set and method of a recipe."""

    recipe: str
    dataset: str
    network: str
    method: str
    read: str = ""  # another format of the same data

    @property
    def key(self) -> str:
        """What identifies it in a journal."""
        return "/".join((self.recipe, self.read or slug(self.dataset), self.network, self.method))

    def config(self, data: str | None, sizes: Sizes) -> DictConfig:
        """Return the recipe's configuration with what is smaller here."""
        words = [f"dataset={slug(self.dataset)}", f"model={self.network}"]
        words += [f"method={slug(self.method)}", "device=cpu", "workers=0", "tracker=none"]
        words += [f"data={data}"] if data else []
        words += ["noise=0.2"] if self.recipe == "table8" else []
        own = compose_config(self.recipe, words)
        smaller = {
            "train.batch": sizes.batch,
            "train.tokens": sizes.tokens,
            "train.images": STEPS * sizes.batch,
            "train.epochs": 1,
            "train.compile": "false",  # on a processor it takes longer than the steps
            "train.precision": "float32",
            "refresh.batch": sizes.batch,
            "llqr.steps": sizes.inner_steps,
            "probe.start": 0,  # otherwise two steps of a warm-up show no probe
        }
        # Only what the run has: a setting without effect is an error.
        for key, value in smaller.items():
            group, _, name = key.partition(".")
            if own[group][name] is not None:
                words.append(f"{key}={value}")
        return resolve_config(compose_config(self.recipe, [*words, *sizes.changes]))


def cells_of(recipes: Sequence[str], methods: Sequence[str] = ()) -> Iterator[Cell]:
    """Yield the cells of recipes, in the order of the tables."""
    for recipe in recipes:
        experiment = EXPERIMENTS[recipe]
        for dataset in experiment.datasets:
            for network in experiment.models:
                for method in experiment.methods:
                    if methods and slug(method) not in methods:
                        continue
                    yield Cell(recipe, dataset, network, method)
                    # The archive's raw text is read too, once without and once with a probe.
                    if recipe == "table6" and "LLQR" not in method:
                        yield Cell(recipe, dataset, network, method, read="iwslt14-raw")


def geometry_of(cell: Cell) -> str | None:
    """Return what cells with the same network and geometry have in common; None: no refreshes.

    They differ in the probe, in the number of classes or in the size of the pictures, and their
    refreshes take the same time and memory but for the activations.
    """
    settings = resolve_settings(cell.recipe, cell.dataset, cell.network, cell.method)
    if "llqr.curvature" not in settings:
        return None
    left_out = {"model.classes", "model.source", "model.image"}
    own = {
        key: setting.value
        for key, setting in settings.items()
        if key.startswith(("llqr.", "model.")) and key not in left_out
    }
    return json.dumps([cell.network, own], sort_keys=True)


def representatives_of(cells: Sequence[Cell]) -> dict[Cell, Cell]:
    """Return the cell that runs in the place of each: one of its network and geometry.

    That is the first with SAM, which makes two passes and applies U in both, or the first. A cell
    without refreshes takes seconds and runs itself.
    """
    keys = {cell: geometry_of(cell) or cell.key for cell in cells}
    chosen: dict[str, Cell] = {}
    for cell, key in keys.items():
        if key not in chosen or ("SAM" in cell.method and "SAM" not in chosen[key].method):
            chosen[key] = cell
    return {cell: chosen[key] for cell, key in keys.items()}


def rehearse_cell(cell: Cell, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Make two steps with one refresh; return their losses and what the refresh came to."""
    torch.set_num_threads(1)
    name = cell.read or slug(cell.dataset)
    data = str(made_up_data(name, folder)) if name in FORMATS else None
    config, workers = cell.config(data, sizes), Workers("cpu")
    reports: list[llqr.RefreshReport] = []

    def note_report(optimizer: llqr.Optimizer, report: llqr.RefreshReport) -> None:
        reports.append(report)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a refusal is in the table
        if cell.recipe in TIMINGS:
            measured = measure_cadence(config, workers, note_report)
            found = {"parameters": measured["parameters"], "skipped": measured["skipped_steps"]}
        else:
            task = make_task(config, workers, describe_run(config))
            training = Training(config, task, workers, Records())
            training.optimizer.register_refresh_hook(note_report)
            task.network.train()
            steps = islice(task.batches(0, 0), STEPS)
            losses = [float(training.take_step(batch)) for batch in steps]
            found = {
                "parameters": sum(p.numel() for p in task.network.parameters()),
                "skipped": training.optimizer.skipped_steps,
                "losses": losses,
            }
    if reports:
        (report,) = reports
        found |= without_nan({"J_before": report.J_before, "J_after": report.J_after})
        found |= {"accepted": report.accepted, "reason": report.reason}
    return found


def outcome_text(found: dict[str, Any]) -> str:
    """Say in a few words what became of a cell."""
    if found.get("stopped"):
        return f"stopped: {found['stopped']}"
    if found.get("error"):
        return f"failed: {found['error']}"
    if "accepted" not in found:
        text = "no refresh"
    else:
        text = "accepted" if found["accepted"] else f"refused: {found['reason']}"
    return text + (f", {found['skipped']} steps skipped" if found["skipped"] else "")


def table_of(rows: Sequence[tuple[Cell, dict[str, Any]]]) -> str:
    """Return the table in Markdown."""
    header = ("Recipe", "Data", "Network", "Method", "Seconds", "Peak GiB", "Refresh")
    lines = [header, ("---",) * 4 + ("---:",) * 2 + ("---",)]
    for cell, found in rows:
        shared = found.get("as")
        numbers = ("", "") if shared else (f"{found['seconds']:.0f}", f"{found['peak_gib']:.2f}")
        # The verdict of another data set's refresh would be a guess.
        outcome = f"not run: see {shared}" if shared else outcome_text(found)
        data = cell.read or cell.dataset
        lines.append((cell.recipe, data, cell.network, cell.method, *numbers, outcome))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _is_good(found: dict[str, Any]) -> bool:
    return not (found.get("stopped") or found.get("error"))


def main(argv: Sequence[str] | None = None) -> int:
    """Rehearse the cells that were asked for; 0 when all of them made their steps."""
    about = (__doc__ or "").split("\n\n", 1)[1]
    parser = argparse.ArgumentParser(
        prog="python -m llqr_lab.recipes.rehearse",
        description=about,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, metavar="RECIPE")
    parser.add_argument("--methods", nargs="+", default=[], metavar="METHOD", help="e.g. llqr-sam")
    parser.add_argument("--networks", nargs="+", default=[], metavar="NETWORK", help="e.g. vit-b16")
    parser.add_argument("--list", action="store_true", help="show the cells, and run nothing")
    parser.add_argument(
        "--table", action="store_true", help="show what the journal has so far, and run nothing"
    )
    parser.add_argument("--batch", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--inner-steps", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every cell"
    )
    parser.add_argument(
        "--limit-seconds", type=int, default=900, help="of the processor, per cell (900)"
    )
    parser.add_argument("--limit-gib", type=float, default=12.0, help="of memory, per cell (12)")
    parser.add_argument(
        "--every-cell",
        action="store_true",
        help="run also cells whose network and geometry another cell has",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/rehearsal"),
        metavar="DIR",
        help="folder of rehearsal.md and of the journal (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    cells = [
        cell
        for cell in cells_of(arguments.recipes, arguments.methods)
        if not arguments.networks or cell.network in arguments.networks
    ]
    if not cells:
        parser.error("no cell has this recipe, network and method; --list shows what there is")
    if arguments.list:
        print("\n".join(cell.key for cell in cells))
        return 0
    sizes = Sizes(arguments.batch, Sizes.tokens, arguments.inner_steps, tuple(arguments.set))
    limits = Limits(arguments.limit_seconds, arguments.limit_gib)
    rows = rehearse_all(
        cells,
        sizes,
        limits,
        arguments.out,
        share=not arguments.every_cell,
        run=not arguments.table,
    )
    table = table_of(rows)
    write_whole(arguments.out / "rehearsal.md", table)
    print(f"\n{table}\n{arguments.out / 'rehearsal.md'}")
    return 0 if len(rows) == len(cells) and all(_is_good(found) for _, found in rows) else 1


def rehearse_all(
    cells: Sequence[Cell],
    sizes: Sizes,
    limits: Limits,
    out: Path,
    *,
    share: bool,
    run: bool = True,
) -> list[tuple[Cell, dict[str, Any]]]:
    """Run the cells one after the other, those in the journal excepted; return what they did.

    Args:
        cells: to run.
        sizes: what is smaller than in the recipes.
        limits: of a cell.
        out: folder of the journal.
        share: run only one of the cells with the same network and geometry.
        run: the cells that the journal lacks; otherwise they are left out.
    """
    about = {"batch": sizes.batch, "inner_steps": sizes.inner_steps, "set": list(sizes.changes)}
    journal = Journal(out / "rehearsal.jsonl", about)
    runs_as = representatives_of(cells) if share else {cell: cell for cell in cells}
    distinct = dict.fromkeys(runs_as.values()) if run else ()
    to_run = [cell for cell in distinct if cell.key not in journal.results]
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        for number, cell in enumerate(to_run, 1):
            place = f"[{number}/{len(to_run)}] {cell.key}"
            print(f"{place} ...", flush=True)
            found = run_in_process(partial(rehearse_cell, cell, sizes, Path(folder)), limits)
            journal.record(cell.key, found)
            took = f"{found['seconds']:.0f} s, {found['peak_gib']:.2f} GiB"
            print(f"{place}: {outcome_text(found)} ({took})", flush=True)
    results = journal.results
    return [
        (cell, results[one.key] | ({} if one == cell else {"as": one.key}))
        for cell, one in runs_as.items()
        if one.key in results
    ]


EXAMPLES = """\
examples:
  python -m llqr_lab.recipes.rehearse --list                      the cells
  python -m llqr_lab.recipes.rehearse                             all of them
  python -m llqr_lab.recipes.rehearse --recipes table1 --networks pyramidnet-110
  python -m llqr_lab.recipes.rehearse --recipes table5 --methods llqr-f-sam --inner-steps 50
  python -m llqr_lab.recipes.rehearse --methods llqr --set llqr.batch_norm=batch --out outputs/batch

In the table, "Seconds" are of one thread of the processor, and "Peak GiB" the largest memory of the
process, Python and torch included. A row without them has not run: it has the network and the
geometry of the row that it names, which ran in its place (--every-cell runs all).
"""


if __name__ == "__main__":
    sys.exit(main())
