"""Finished runs: folders with a ``result.json``, found below a root and read with suspicion."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..common.output import RESULT_FORMAT
from ..protocols import METHODS, SCALES

__all__ = [
    "Cell",
    "Found",
    "Run",
    "RunError",
    "find_runs",
    "finite_numbers",
    "read_result",
]

NUMBER = (int, float)
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
        return json.dumps([self["source"].lower(), kept], sort_keys=True)

    @property
    def changed_keys(self) -> list[str]:
        """Return the settings that were changed by hand; the interval of a timing is its cell's."""
        return [k for k in self["changed"] if not (k == "llqr.every" and self["timing"])]

    def setting_or_entry(self, key: str) -> Any:
        """Return a setting, or one of the run's own entries such as ``recipe``."""
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
    """

    root: Path
    runs: Sequence[Run]
    unfinished: Sequence[Path]
    notes: Sequence[str] = ()


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


def find_runs(root: Path, where: Sequence[str] = ()) -> Found:
    """Find the runs below a root, at any depth.

    Args:
        root: a folder; that it is not there is no error.
        where: ``key=value`` of settings; runs that have the key with another value are left out.

    Raises:
        RunError: a result is damaged.
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
    held_out = [run for run in runs if run.setting_or_entry("data.holdout")]
    if held_out:
        notes.append(
            f"{len(held_out)} runs were left out: they were evaluated on held out training data "
            "(data.holdout)."
        )
    runs = [run for run in runs if run not in held_out]
    return Found(root, runs, unfinished, notes)


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
