"""One state dict for the base, the geometry, the perturbation and the counters.

torch.distributed.checkpoint keeps only what is per parameter or an option of a parameter group, so
everything of ours is in one of the two, under keys that begin with "llqr.".
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from ._parameters import NamedParameters, check_group_options
from ._progress import Progress
from ._refresher import Refresher
from .distributed import Ranks
from .geometry import Geometry, RefreshReport
from .perturbations import Perturbation

__all__ = ["Checkpoint"]

PREFIX = "llqr."
VERSION = 1
#: {parameter name: {key: tensor}}
PartState = dict[str, dict[str, Tensor]]


class Checkpoint:
    """Add our state to the state dict of the base, and take it out again.

    Args:
        parameters: of the base optimizer.
        geometry: whose U and counters are saved, or None.
        perturbation: whose memory is saved, or None.
        ranks: the processes that train together.
        progress: the counters of the training.
        refresher: whose last report is saved.
        local_probes: whether each process has a memory of its own.
    """

    def __init__(
        self,
        parameters: NamedParameters,
        geometry: Geometry | None,
        perturbation: Perturbation | None,
        ranks: Ranks,
        progress: Progress,
        refresher: Refresher,
        *,
        local_probes: bool,
    ) -> None:
        self._parameters, self._ranks = parameters, ranks
        self._geometry, self._perturbation = geometry, perturbation
        self._progress, self._refresher = progress, refresher
        self._local_probes = local_probes

    @property
    def _parts(self) -> dict[str, Geometry | Perturbation | None]:
        return {"geometry": self._geometry, "perturbation": self._perturbation}

    # -- saving --------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Return the base's state dict with ours in it."""
        whole = self._parameters.base.state_dict()
        # Copies: the dicts of the base's state live on.
        state = {key: dict(entry) for key, entry in whole["state"].items()}
        # A schedule is code: it would not load with weights_only, and the receiver has its own.
        groups = [
            {k: v for k, v in group.items() if not (k == "rho" and callable(v))}
            for group in whole["param_groups"]
        ]
        ids = self._state_keys(groups)
        for part, source in self._parts.items():
            for name, entries in ({} if source is None else source.state()).items():
                # An entry for every parameter, also an empty one: torch.distributed.checkpoint
                # takes a parameter without one for an incomplete checkpoint.
                own = state.setdefault(ids[name], {})
                if part == "perturbation" and self._local_probes:
                    entries = {k: self._ranks.stack(v) for k, v in entries.items()}
                own.update({f"{PREFIX}{part}.{k}": v.detach() for k, v in entries.items()})
        counters: dict[str, Any] = {"version": VERSION, **self._progress.counters()}
        if self._geometry is not None:
            counters.update({f"geometry.{k}": v for k, v in self._geometry.counters().items()})
        counters.update(_report_entries(self._refresher.last_report))
        for group in groups:
            group.update({PREFIX + k: v for k, v in counters.items()})
        return {**whole, "state": state, "param_groups": groups}

    # -- loading -------------------------------------------------------------------------------

    @torch.no_grad()
    def load(self, given: Mapping[str, Any]) -> None:
        """Take over a state dict; nothing is changed if it does not fit."""
        names = {i: n for n, i in self._state_keys(given["param_groups"]).items()}
        ours, state = _split_state(given["state"], names)
        groups = self._groups_for_base(given["param_groups"])
        check_group_options(groups)
        counters = {
            k[len(PREFIX) :]: v
            for k, v in given["param_groups"][0].items()
            if str(k).startswith(PREFIX)
        }
        base = {**given, "state": state, "param_groups": groups}
        if not counters:
            warnings.warn(
                "load_state_dict: the state was saved by a plain optimizer; the base takes it "
                "over, the geometry and the perturbation stay as they are",
                stacklevel=3,
            )
            self._parameters.base.load_state_dict(base)
            return
        _check_version(counters["version"])
        self._load_parts(ours, base)
        self._load_counters(counters)

    def _groups_for_base(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the groups without our entries; a schedule of rho stays the receiver's."""
        return [
            {
                **{k: v for k, v in group.items() if not str(k).startswith(PREFIX)},
                **{k: v for k, v in mine.items() if k == "rho" and k not in group},
            }
            for group, mine in zip(groups, self._parameters.base.param_groups, strict=True)
        ]

    def _load_parts(self, ours: dict[str, PartState], base: dict[str, Any]) -> None:
        """Load geometry, perturbation and base; put the first two back if one does not fit."""
        receivers = dict(self._parts)
        for part, source in self._parts.items():
            if ours.get(part) and (source is None or not source.state()):
                warnings.warn(
                    f"load_state_dict: the state of a {part} is dropped, since this optimizer has "
                    f"{part}={source!r}, which keeps none",
                    stacklevel=4,
                )
                receivers[part] = None
        ours["perturbation"] = self._memory_of_this_process(ours.get("perturbation", {}))
        kept = {part: _copy_state(s.state()) for part, s in receivers.items() if s is not None}
        try:
            for part, source in receivers.items():
                if source is not None:
                    source.load_state(ours.get(part, {}))
            self._parameters.base.load_state_dict(base)
        except Exception:
            for part, state in kept.items():
                source = receivers[part]
                assert source is not None
                source.load_state(state)
            raise

    def _load_counters(self, counters: dict[str, Any]) -> None:
        prefix = "geometry."
        numbers = {k[len(prefix) :]: int(v) for k, v in counters.items() if k.startswith(prefix)}
        if self._geometry is not None and numbers:
            self._geometry.load_counters(numbers)
        self._progress.load_counters(counters)
        self._refresher.last_report = _report_from(counters)

    def _memory_of_this_process(self, state: PartState) -> PartState:
        """Return the perturbation's state; with local probes each process has its own."""
        ranks = self._ranks
        if not self._local_probes:
            return state
        for name, entry in state.items():
            for key, value in entry.items():
                if value.dim() == 0 or len(value) != ranks.size:
                    raise ValueError(
                        f"state: {key!r} of {name!r} has shape {tuple(value.shape)}, expected one "
                        f"for each of {ranks.size} processes (sync=False): load it with as many "
                        "processes and the same `sync` as saved it"
                    )
        return {n: {k: v[ranks.rank] for k, v in e.items()} for n, e in state.items()}

    def _state_keys(self, groups: list[dict[str, Any]]) -> dict[str, Any]:
        """Map names to the keys that a state dict uses, through the order in the groups."""
        own = self._parameters.base.param_groups
        sizes, expected = ([len(g["params"]) for g in gs] for gs in (groups, own))
        if sizes != expected:
            raise ValueError(
                f"state_dict: has parameter groups of sizes {sizes}, this optimizer of {expected}"
            )
        names = {id(p): name for name, p in self._parameters.named.items()}
        return {
            names[id(p)]: key
            for theirs, ours in zip(groups, own, strict=True)
            for key, p in zip(theirs["params"], ours["params"], strict=True)
        }


def _split_state(
    state: Mapping[Any, Mapping[Any, Any]], names: Mapping[Any, str]
) -> tuple[dict[str, PartState], dict[Any, Any]]:
    """Return our entries as {part: {name: {key: tensor}}}, and those of the base."""
    ours: dict[str, PartState] = {}
    theirs: dict[Any, Any] = {}
    for key, entry in state.items():
        rest = {k: v for k, v in entry.items() if not str(k).startswith(PREFIX)}
        if rest:
            theirs[key] = rest
        for k, v in entry.items():
            if str(k).startswith(PREFIX):
                part, _, last = str(k)[len(PREFIX) :].partition(".")
                ours.setdefault(part, {}).setdefault(names[key], {})[last] = v
    return ours, theirs


def _check_version(version: Any) -> None:
    if int(version) != VERSION:
        raise ValueError(
            f"state_dict: written in format {version} of llqr, this is format {VERSION}; load it "
            "with the llqr that wrote it"
        )


def _report_entries(report: RefreshReport | None) -> dict[str, Any]:
    """Return the last report's fields, all keys also if there is no report yet."""
    values = dict.fromkeys((f.name for f in fields(RefreshReport)), "")
    return {f"report.{k}": v for k, v in (asdict(report) if report else values).items()}


def _report_from(counters: Mapping[str, Any]) -> RefreshReport | None:
    values: dict[str, Any] = {
        f.name: counters.get(f"report.{f.name}") for f in fields(RefreshReport)
    }
    return None if values["step"] in ("", None) else RefreshReport(**values)


def _copy_state(state: Mapping[str, Mapping[str, Tensor]]) -> PartState:
    return {n: {k: v.clone() for k, v in e.items()} for n, e in state.items()}
