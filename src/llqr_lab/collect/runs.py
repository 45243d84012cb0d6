"""Finished runs: folders with a ``result.json``, found below a root and read with suspicion."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..common.output import RESULT_FORMAT
from ..protocols import METHODS, SCALES

__all__ = [
    "Cell",
    "Found",
    "Run",
    "RunError",
    "SELECTED",
    "find_runs",
    "finite_numbers",
    "read_result",
    "read_selections",
]

NUMBER = (int, float)
SELECTED = "base.weight_decay"  # the setting that `llqr select` chooses
REQUIRED: dict[str, type | tuple[type, ...]] = {
    "recipe": str,
    "scale": str,
    "dataset": str,
    "source": str,
    "model": str,
    "method": str,
    "noise": NUMBER,
    "seed": int,
    "settings": dict,
    "changed": list,
    "metric": str,
    "environment": dict,
}


class RunError(ValueError):
    """Say which run cannot be used, and what to do about it."""


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and what its ``result.json`` says."""

    folder: Path
    content: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        """Return what the run says of a key; None if it is silent."""
        return self.content.get(key)

    @property
    def cell(self) -> Cell:
        """Return what the run is a run of."""
        timed = self["timing"]
        return Cell(
            self["dataset"],
            self["model"],
            self["method"],
            float(self["noise"]),
            timed["every"] if timed else None,
        )

    @property
    def variant(self) -> str:
        """Return what has to agree for two runs of a cell to be repetitions, as text."""
        own = ("noise", "read", *(["llqr.every"] if self["timing"] else []))
        kept = {k: v for k, v in self["settings"].items() if k not in own}
        return json.dumps([*self.data_read, kept], sort_keys=True)

    @property
    def data_digest(self) -> str:
        """Return the digest of what was read; "unknown" of runs that did not record it."""
        return str((self["data"] or {}).get("digest", "unknown"))

    @property
    def data_read(self) -> tuple[str, str]:
        """Return the name and the digest of what was read."""
        return self["source"].lower(), self.data_digest

    @property
    def changed_keys(self) -> list[str]:
        """Return the settings that were changed by hand; the interval of a timing is its cell's."""
        return [k for k in self["changed"] if not (k == "llqr.every" and self["timing"])]

    def as_selected(self) -> Run:
        """Return the run with a weight decay that does not count as changed by hand."""
        changed = [key for key in self["changed"] if key != SELECTED]
        return replace(self, content={**self.content, "changed": changed})

    def setting_or_entry(self, key: str) -> Any:
        """Return a setting, the ``data.digest``, or one of the run's entries such as ``recipe``."""
        if key == "data.digest":
            return self.data_digest
        return self["settings"].get(key, self.content.get(key))


@dataclass(frozen=True, order=True)
class Cell:
    """What runs that differ by their seeds are runs of.

    Attributes:
        dataset: the paper's name.
        model: as in the protocols.
        method: as in the protocols.
        noise: share of the training labels that are wrong.
        every: steps between refreshes, of a timing; else None.
    """

    dataset: str
    model: str
    method: str
    noise: float = 0.0
    every: int | None = None

    def with_method(self, method: str) -> Cell:
        """Return the cell of another method."""
        return replace(self, method=method)


@dataclass(frozen=True)
class Found:
    """What lies below a root.

    Attributes:
        root: where it was looked for.
        runs: the finished ones that were asked for.
        unfinished: folders of runs that have not written a result.
        notes: what was left out, and why.
        selected: weight decays that `llqr select` chose, by scale, data set, network and noise.
    """

    root: Path
    runs: Sequence[Run]
    unfinished: Sequence[Path]
    notes: Sequence[str] = ()
    selected: Mapping[tuple[str, str, str, float], float] = field(default_factory=dict)

    def selected_for(self, scale: str, cell: Cell) -> float | None:
        """Return the weight decay that was selected for the row of a cell, if one was."""
        return self.selected.get((scale, cell.dataset, cell.model, cell.noise))


def read_result(path: Path) -> Run:
    """Read a ``result.json``.

    Raises:
        RunError: it is damaged, of an unknown format, or lacks something.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); delete it and run again") from error

    def refusal_of(key: str, expected: str, got: Any) -> RunError:
        return RunError(
            f"{path}: {key}: expected {expected}, got {got!r}; delete the folder and run again"
        )

    if not isinstance(content, dict) or content.get("format") != RESULT_FORMAT:
        got = content.get("format") if isinstance(content, dict) else content
        raise refusal_of("format", f"{RESULT_FORMAT}", got)
    for key, kind in REQUIRED.items():
        value = content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise refusal_of(key, " or ".join(k.__name__ for k in kinds), value)
    for key, allowed in (("scale", SCALES), ("method", tuple(METHODS))):
        if content[key] not in allowed:
            raise refusal_of(key, f"one of {', '.join(allowed)}", content[key])
    if content.get("timing"):
        for key in ("every", "step_seconds", "epoch_seconds", "epoch_seconds_without"):
            if key not in content["timing"]:
                raise refusal_of(f"timing.{key}", "a number or null", None)
    elif not content.get("epochs") or "best" not in content or "last" not in content:
        raise refusal_of("epochs, best, last", "what was measured", content.get("epochs"))
    return Run(path.parent, content)


def find_runs(
    root: Path, where: Sequence[str] = (), *, selects: bool = True, held_out: bool = False
) -> Found:
    """Find the runs below a root, at any depth.

    Args:
        root: a folder; that it is not there is no error.
        where: ``key=value`` of settings; runs that have the key with another value are left out.
        selects: of rows for which `llqr select` chose a weight decay, leave out runs with another
            one, unless ``where`` says which.
        held_out: find the runs that were evaluated on held out training data, and no others.

    Raises:
        RunError: a result is damaged, or two selections contradict each other.
        ValueError: ``where`` is not of that form, or no run has the key.
    """
    results = sorted(root.rglob("result.json"))
    runs = [read_result(path) for path in results]
    # A run writes these before it has a result.
    begun = {p.parent for name in ("metrics.jsonl", "checkpoint.pt") for p in root.rglob(name)}
    unfinished = sorted(begun - {path.parent for path in results})
    notes = []
    for condition in where:
        key, value = _parse_condition(condition)
        if runs and all(run.setting_or_entry(key) is None for run in runs):
            raise ValueError(f"--where: no run has the setting {key!r}")
        kept = [run for run in runs if run.setting_or_entry(key) in (None, value)]
        notes.append(f"{len(runs) - len(kept)} runs were left out by --where {condition}.")
        runs = kept
    # Evaluated on data that a search looks at: no test results.
    apart = [run for run in runs if bool(run.setting_or_entry("data.holdout")) != held_out]
    if apart and not held_out:
        notes.append(
            f"{len(apart)} runs were left out: they were evaluated on held out training data "
            "(data.holdout)."
        )
    runs = [run for run in runs if run not in apart]
    selected = {}
    if selects and not any(condition.startswith(SELECTED) for condition in where):
        selected = read_selections(root)
        runs, said = _with_selected(runs, selected)
        notes += said
    return Found(root, runs, unfinished, notes, selected)


def read_selections(root: Path) -> dict[tuple[str, str, str, float], float]:
    """Return the weight decays that `llqr select` wrote below a root.

    Raises:
        RunError: a file is damaged, or two files contradict each other.
    """
    found: dict[tuple[str, str, str, float], float] = {}
    for path in sorted(root.rglob("selection-*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = [row for row in content["rows"] if row["chosen"] is not None]
            chosen = {
                (content["scale"], row["dataset"], row["model"], float(row["noise"])): row["chosen"]
                for row in rows
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: cannot be read ({error}); run `llqr select` again") from error
        for row, value in chosen.items():
            if found.setdefault(row, value) != value:
                raise RunError(
                    f"{path}: selects {SELECTED}={value} for {', '.join(map(str, row[1:3]))}, "
                    f"another file {found[row]}; delete one of them"
                )
    return found


def _with_selected(
    runs: Sequence[Run], selected: Mapping[tuple[str, str, str, float], float]
) -> tuple[list[Run], list[str]]:
    """Return the runs that have the selected weight decay where one was, and what to say."""
    kept, left_out, used = [], 0, set()
    for run in runs:
        cell = run.cell
        value = selected.get((run["scale"], cell.dataset, cell.model, cell.noise))
        # It was selected with SGD; Adam's weight decay means something else.
        if value is None or run["settings"].get("base.optimizer") != "SGD":
            kept.append(run)
        elif run["settings"].get(SELECTED) == value:
            kept.append(run.as_selected())
            used.add((cell.dataset, cell.model, value))
        else:
            left_out += 1
    notes = [
        f"{dataset}, {model}: weight decay {value:g}, selected by the baseline's best result."
        for dataset, model, value in sorted(used)
    ]
    notes += [f"{left_out} runs have a weight decay that was not selected."] * bool(left_out)
    return kept, notes


def _parse_condition(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--where: expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def finite_numbers(values: Sequence[Any]) -> Iterator[float]:
    """Return those of the values that are finite numbers."""
    return (float(v) for v in values if v is not None and math.isfinite(v))
