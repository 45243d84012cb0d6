"""Like with like: whether two runs differ in anything but their methods and seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import Any

from ..protocols import EXPERIMENTS, resolve_settings
from .runs import Run

__all__ = ["differences_between"]

# Settings that a method may lack altogether; of all others, to lack one is a difference.
OF_METHODS = ("llqr.", "refresh.", "probe.", "optimizer.")


def differences_between(one: Run, other: Run, besides: str = "") -> list[str]:
    """Return in what two runs differ though their methods do not; nothing: they compare.

    A setting may differ only if the protocol itself gives the two methods different values, and
    nobody changed it by hand. Data are the same if their digests are; runs of earlier versions,
    which have none, compare only among themselves.

    Args:
        one: a run.
        other: another one.
        besides: what the names of settings begin with that may differ, such as ``model.``.
    """
    found = []
    if one.data_read != other.data_read:
        found.append(f"data: {' or '.join(map(_data_text, (one, other)))}")
    usual = [_protocol_values(*_names_of(run)) for run in (one, other)]
    changed = {*one["changed"], *other["changed"]}
    keys = one["settings"] | other["settings"]
    for key in sorted(keys):
        values = [run["settings"].get(key) for run in (one, other)]
        if values[0] == values[1] or key in ("noise", "read"):
            continue  # of the cell, of the data
        if key.startswith(OF_METHODS) and None in values:
            continue
        of_methods = usual[0].get(key) != usual[1].get(key) and key not in changed
        if not of_methods and not (besides and key.startswith(besides)):
            found.append(f"{key}: {' or '.join(map(json.dumps, values))}")
    return found


def _data_text(run: Run) -> str:
    preparation = (run["data"] or {}).get("preparation", "data unknown")
    return f"{run['source']} ({preparation}, {run.data_digest})"


def _names_of(run: Run) -> tuple[str, ...]:
    return tuple(run[k] for k in ("recipe", "dataset", "model", "method", "scale"))


@cache
def _protocol_values(
    recipe: str, dataset: str, model: str, method: str, scale: str
) -> Mapping[str, Any]:
    about = EXPERIMENTS.get(recipe)
    if about is None or (dataset, model, method) not in product(
        about.datasets, about.models, about.methods
    ):
        return {}  # of another version of the protocol
    settings = resolve_settings(recipe, dataset, model, method, scale)
    return {key: setting.value for key, setting in settings.items()}
