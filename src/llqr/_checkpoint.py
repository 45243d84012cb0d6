"""One state dict for the base, the geometry, the perturbation and the counters.

torch.distributed.checkpoint keeps only what is per parameter or an option of a parameter group, so
everything of ours is in one of the two, under keys that begin with "llqr.".
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._parameters import check_options
from .geometry import RefreshReport

if TYPE_CHECKING:
    from ._optimizer import Optimizer

__all__ = ["load_state_dict", "state_dict"]

PREFIX = "llqr."
VERSION = 1
PARTS = ("geometry", "perturbation")


def state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """Return the base's state dict with ours in it."""
    for pre in optimizer._optimizer_state_dict_pre_hooks.values():
        pre(optimizer)
    whole = optimizer.base.state_dict()
    state = {key: dict(entry) for key, entry in whole["state"].items()}  # the base's dicts live on
    # A schedule is code: it would not load with weights_only, and the receiver has its own.
    groups = [
        {k: v for k, v in group.items() if not (k == "rho" and callable(v))}
        for group in whole["param_groups"]
    ]
    ids = _ids(optimizer, groups)
    for part in PARTS:
        source = getattr(optimizer, part)
        for name, entries in ({} if source is None else source.state()).items():
            # An entry for every parameter, also an empty one: torch.distributed.checkpoint takes a
            # parameter without one for an incomplete checkpoint.
            own = state.setdefault(ids[name], {})
            if part == "perturbation" and optimizer.local_probes:
                entries = {k: optimizer.ranks.stack(v) for k, v in entries.items()}
            own.update({f"{PREFIX}{part}.{k}": v.detach() for k, v in entries.items()})
    counters: dict[str, Any] = {"version": VERSION, "step": optimizer._step, **_skips(optimizer)}
    if optimizer.geometry is not None:
        counters.update({f"geometry.{k}": v for k, v in optimizer.geometry.counters().items()})
    counters.update(_report_entries(optimizer.last_report))
    for group in groups:
        group.update({PREFIX + k: v for k, v in counters.items()})
    result = {**whole, "state": state, "param_groups": groups}
    for post in optimizer._optimizer_state_dict_post_hooks.values():
        changed = post(optimizer, result)
        result = result if changed is None else changed
    return result


@torch.no_grad()
def load_state_dict(optimizer: Optimizer, given: Mapping[str, Any]) -> None:
    """Take over a state dict; nothing is changed if it does not fit."""
    given = dict(given)
    for pre in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = pre(optimizer, given)
        given = given if changed is None else dict(changed)
    names = {i: n for n, i in _ids(optimizer, given["param_groups"]).items()}
    own: dict[str, dict[str, dict[str, Tensor]]] = {part: {} for part in PARTS}
    state: dict[Any, Any] = {}
    for key, entry in given["state"].items():
        state[key] = {k: v for k, v in entry.items() if not str(k).startswith(PREFIX)}
        for k, v in entry.items():
            if str(k).startswith(PREFIX):
                part, _, rest = str(k)[len(PREFIX) :].partition(".")
                own.setdefault(part, {}).setdefault(names[key], {})[rest] = v
    groups = [
        {
            **{k: v for k, v in group.items() if not str(k).startswith(PREFIX)},
            **{k: v for k, v in ours.items() if k == "rho" and k not in group},
        }
        for group, ours in zip(given["param_groups"], optimizer.param_groups, strict=True)
    ]
    check_options(groups)
    counters = {
        k[len(PREFIX) :]: v
        for k, v in given["param_groups"][0].items()
        if str(k).startswith(PREFIX)
    }
    base = {**given, "state": {k: v for k, v in state.items() if v}, "param_groups": groups}
    if not counters:
        warnings.warn(
            "load_state_dict: the state was saved by a plain optimizer; the base takes it over, "
            "the geometry and the perturbation stay as they are",
            stacklevel=3,
        )
        optimizer.base.load_state_dict(base)
    else:
        _check_version(counters["version"])
        _load_parts(optimizer, own, counters, base)
    for post in optimizer._optimizer_load_state_dict_post_hooks.values():
        post(optimizer)


def _load_parts(
    optimizer: Optimizer,
    own: dict[str, dict[str, dict[str, Tensor]]],
    counters: dict[str, Any],
    base: dict[str, Any],
) -> None:
    geometry = optimizer.geometry
    receivers = {part: getattr(optimizer, part) for part in PARTS}
    for part, source in receivers.items():
        if own[part] and (source is None or not source.state()):
            warnings.warn(
                f"load_state_dict: the state of a {part} is dropped, since this optimizer has "
                f"{part}={source!r}, which keeps none",
                stacklevel=4,
            )
            receivers[part] = None
    own["perturbation"] = _of_this_process(optimizer, own["perturbation"])
    kept = {part: _copy(s.state()) for part, s in receivers.items() if s is not None}
    try:
        for part, source in receivers.items():
            if source is not None:
                source.load_state(own[part])
        optimizer.base.load_state_dict(base)
    except Exception:
        for part, state in kept.items():
            receivers[part].load_state(state)
        raise
    if geometry is not None:
        prefix = "geometry."
        numbers = {k[len(prefix) :]: int(v) for k, v in counters.items() if k.startswith(prefix)}
        if numbers:
            geometry.load_counters(numbers)
    optimizer._step = int(counters["step"])
    report = _report_of(counters)
    optimizer._reports[:] = [] if report is None else [report]
    for key in _skips(optimizer):
        setattr(optimizer, key, int(counters[key]))


def _of_this_process(
    optimizer: Optimizer, state: dict[str, dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Return the perturbation's state; local probes have one a process."""
    ranks = optimizer.ranks
    if not optimizer.local_probes:
        return state
    for name, entry in state.items():
        for key, value in entry.items():
            if value.dim() == 0 or len(value) != ranks.size:
                raise ValueError(
                    f"state: {key!r} of {name!r} has shape {tuple(value.shape)}, expected one for "
                    f"each of {ranks.size} processes (sync=False): load it with as many processes "
                    "and the same `sync` as saved it"
                )
    return {n: {k: v[ranks.rank] for k, v in e.items()} for n, e in state.items()}


def _check_version(version: Any) -> None:
    if int(version) != VERSION:
        raise ValueError(
            f"state_dict: written in format {version} of llqr, this is format {VERSION}; load it "
            "with the llqr that wrote it"
        )


def _ids(optimizer: Optimizer, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Map names to the identifiers that a state dict uses, through the order in the groups."""
    own = optimizer.param_groups
    sizes, expected = ([len(g["params"]) for g in gs] for gs in (groups, own))
    if sizes != expected:
        raise ValueError(
            f"state_dict: has parameter groups of sizes {sizes}, this optimizer of {expected}"
        )
    names = {id(p): name for name, p in optimizer._parameters.named.items()}
    return {
        names[id(p)]: key
        for theirs, ours in zip(groups, own, strict=True)
        for key, p in zip(theirs["params"], ours["params"], strict=True)
    }


def _skips(optimizer: Optimizer) -> dict[str, int]:
    return {
        "skipped_steps": optimizer.skipped_steps,
        "skipped_probes": optimizer.skipped_probes,
    }


def _report_entries(report: RefreshReport | None) -> dict[str, Any]:
    """Return the last report's fields, all keys also where there is no report yet."""
    values = dict.fromkeys((f.name for f in fields(RefreshReport)), "")
    return {f"report.{k}": v for k, v in (asdict(report) if report else values).items()}


def _report_of(counters: Mapping[str, Any]) -> RefreshReport | None:
    values = {f.name: counters.get(f"report.{f.name}", "") for f in fields(RefreshReport)}
    return None if values["step"] == "" else RefreshReport(**values)


def _copy(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {n: {k: v.clone() for k, v in e.items()} for n, e in state.items()}
