"""One state dict for the base, the geometry, the perturbation and the counters.

torch.distributed.checkpoint keeps only what is per parameter or an option of a parameter group, so
everything of ours is in one of the two, under keys that begin with "llqr.".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ._coordinates import Coordinates
from ._joined_bases import BASE, JoinedBases, optimizers_of
from ._parameters import NamedParameters, check_group_options
from ._progress import Progress
from ._refresher import Refresher
from ._warnings import warn_caller
from .distributed import Ranks
from .geometry import Geometry, RefreshReport
from .geometry._bases import Bases
from .perturbations import Perturbation

__all__ = ["Checkpoint"]

PREFIX = "llqr."
#: Where the whole state dict of a base is, if it has another form than torch's.
OWN_FORM = f"{PREFIX}base"
#: The names of a group's parameters, one per line, if several optimizers step the model.
NAMES = f"{PREFIX}names"
#: Set if the base's state is in the bases of U.
IN_BASES = "in_bases"
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
        coordinates: that the base's state is in.
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
        coordinates: Coordinates,
        *,
        local_probes: bool,
    ) -> None:
        self._parameters, self._ranks = parameters, ranks
        self._geometry, self._perturbation = geometry, perturbation
        self._progress, self._refresher = progress, refresher
        self._coordinates = coordinates
        self._local_probes = local_probes

    @property
    def _parts(self) -> dict[str, Geometry | Perturbation | None]:
        return {"geometry": self._geometry, "perturbation": self._perturbation}

    # -- saving --------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Return the base's state dict with ours in it; one of another form lies beside ours."""
        self._refuse_leftovers()
        base = self._parameters.base
        whole = base.state_dict()
        if has_torchs_form(whole):
            # Copies: the dicts of the base's state live on. An entry may also be a mere number
            # or tensor, as MADGRAD's state["k"] is.
            state = {k: dict(e) if isinstance(e, Mapping) else e for k, e in whole["state"].items()}
            # A schedule is code: it would not load with weights_only, and the receiver has its own.
            groups = [
                {k: v for k, v in group.items() if not (k == "rho" and callable(v))}
                for group in whole["param_groups"]
            ]
        else:
            state, groups, whole = {}, _numbered_groups(base), {OWN_FORM: whole}
        self._add_parts(state, self._state_keys(groups))
        counters: dict[str, Any] = {"version": VERSION, **self._progress.counters()}
        if self._geometry is not None:
            counters.update({f"geometry.{k}": v for k, v in self._geometry.counters().items()})
        counters.update(_report_entries(self._refresher.last_report))
        if self._coordinates.bases is not None:
            counters[IN_BASES] = 1
        for group in groups:
            group.update({PREFIX + k: v for k, v in counters.items()})
        if isinstance(base, JoinedBases):
            for group, names in zip(groups, self._names_of_groups(), strict=True):
                group[NAMES] = "\n".join(names)
        return {**whole, "state": state, "param_groups": groups}

    def _add_parts(self, state: dict[Any, Any], ids: Mapping[str, Any]) -> None:
        """Add the tensors of geometry and perturbation to the entries of their parameters."""
        for part, source in self._parts.items():
            for name, entries in ({} if source is None else source.state()).items():
                # An entry for every parameter, also an empty one: torch.distributed.checkpoint
                # takes a parameter without one for an incomplete checkpoint.
                own = state.setdefault(ids[name], {})
                if part == "perturbation" and self._local_probes:
                    entries = {k: self._ranks.stack(v) for k, v in entries.items()}
                own.update({f"{PREFIX}{part}.{k}": v.detach() for k, v in entries.items()})

    def _refuse_leftovers(self) -> None:
        """Raise if the base has a state of tensors that left its groups: torch cannot number it."""
        for one in optimizers_of(self._parameters.base):
            held = {id(p) for group in one.param_groups for p in group["params"]}
            for key in one.state:
                if isinstance(key, Tensor) and id(key) not in held:
                    raise RuntimeError(
                        f"state_dict: {type(one).__name__} holds the state of a parameter of shape "
                        f"{tuple(key.shape)} that left its groups; drop it when you replace or "
                        "move a parameter: its optimizer's state.pop(old, None)"
                    )

    # -- loading -------------------------------------------------------------------------------

    @torch.no_grad()
    def load(self, given: Mapping[str, Any]) -> None:
        """Take over a state dict; nothing is changed if it does not fit."""
        base = self._parameters.base
        if any(p.is_meta for p in self._parameters.named.values()):
            raise ValueError(
                "load_state_dict: the parameters are on the meta device, which holds no numbers; "
                "load after the model has its weights"
            )
        if not has_torchs_form(given):
            if saves_in_torchs_form(base):
                found = list(given)[:5] if isinstance(given, Mapping) else type(given).__name__
                raise ValueError(
                    f"state_dict: expected the keys 'state' and 'param_groups', got {found}"
                )
            self._load_plain(given)
            return
        if isinstance(base, JoinedBases):
            base.check_saved_groups(given["param_groups"])
        names = {i: n for n, i in self._state_keys(given["param_groups"]).items()}
        self._refuse_names_of_another_base(given["param_groups"])
        ours, state = _split_state(given["state"], names)
        counters = {
            k[len(PREFIX) :]: v
            for k, v in given["param_groups"][0].items()
            if str(k).startswith(PREFIX)
        }
        if OWN_FORM in given:
            theirs = given[OWN_FORM]
        else:
            groups = self._groups_for_base(given["param_groups"])
            check_group_options(groups)
            theirs = {**given, "state": state, "param_groups": groups}
            if not counters:
                self._load_plain(theirs)
                return
            if not saves_in_torchs_form(base):
                raise ValueError(
                    f"state_dict: has no {OWN_FORM!r}, under which the state of "
                    f"{type(base).__name__} is saved; torch.distributed.checkpoint drops it, so "
                    "save optimizer.state_dict() with torch.save"
                )
        _check_version(counters["version"])
        geometry = self._geometry
        sharded = geometry is not None and geometry.sharded
        if counters.get(IN_BASES) and (sharded or self._find_bases() is None):
            raise ValueError(
                "state_dict: the base's state was saved in the bases of a geometry "
                f"(transport='bases'), but geometry={geometry!r} "
                f"{'is sharded' if sharded else 'has none'}; load it into an optimizer with that "
                "geometry, whole in every process"
            )
        self._load_parts(ours, theirs, counters)
        self._load_counters(counters)
        self._coordinates.assume(self._find_bases() if counters.get(IN_BASES) else None)

    def _find_bases(self) -> Bases | None:
        """Return the bases that U has now, if it has any."""
        named = self._parameters.named
        return None if self._geometry is None else self._geometry.bases_for(named)

    def _load_plain(self, given: Any) -> None:
        """Hand a state dict without anything of ours to the base."""
        warn_caller(
            "load_state_dict: the state was saved by a plain optimizer; the base takes it over, "
            "the geometry and the perturbation stay as they are"
        )
        self._parameters.base.load_state_dict(given)
        self._coordinates.assume(None)

    def _groups_for_base(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the groups without our entries; a schedule of rho stays the receiver's."""
        return [
            {
                **{k: v for k, v in group.items() if not str(k).startswith(PREFIX)},
                **{k: v for k, v in mine.items() if k == "rho" and k not in group},
            }
            for group, mine in zip(groups, self._parameters.base.param_groups, strict=True)
        ]

    def _load_parts(
        self, ours: dict[str, PartState], base: Any, counters: Mapping[str, Any]
    ) -> None:
        """Load geometry, perturbation and base; put the first two back if one does not fit."""
        receivers = {part: source for part, source in self._parts.items() if source is not None}
        fresh: list[str] = []
        for part, source in self._parts.items():
            keeps_state = source is not None and bool(source.state())
            if ours.get(part) and not keeps_state:
                warn_caller(
                    f"load_state_dict: the state of a {part} is dropped, since this optimizer has "
                    f"{part}={source!r}, which keeps none"
                )
                receivers.pop(part, None)
            saved = ours.get(part) or any(k.startswith(f"{part}.") for k in counters)
            if keeps_state and not saved:
                fresh.append(part)
        if fresh:
            warn_caller(
                f"load_state_dict: the state was saved without a {' and a '.join(fresh)} that "
                "keeps something, so what this optimizer's learned starts anew"
            )
        ours["perturbation"] = self._memory_of_this_process(ours.get("perturbation", {}))
        kept = {part: _copy_state(source.state()) for part, source in receivers.items()}
        numbers = {} if self._geometry is None else self._geometry.counters()
        try:
            for part, source in receivers.items():
                if part in fresh:
                    source.reset()
                else:
                    source.load_state(ours.get(part, {}))
            self._parameters.base.load_state_dict(base)
        except Exception:
            for part, state in kept.items():
                receivers[part].load_state(state)
            if self._geometry is not None and numbers:
                self._geometry.load_counters(numbers)
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

    def _names_of_groups(self) -> list[list[str]]:
        """Return the names of the parameters of each group."""
        names = {id(p): name for name, p in self._parameters.named.items()}
        return [[names[id(p)] for p in g["params"]] for g in self._parameters.base.param_groups]

    def _refuse_names_of_another_base(self, groups: list[dict[str, Any]]) -> None:
        """Raise if a group was saved with a parameter that another optimizer of the list steps.

        Two optimizers of one kind with groups of one size are told apart by nothing else.
        """
        base = self._parameters.base
        if not isinstance(base, JoinedBases):
            return
        bases = [group[BASE] for group in base.param_groups]
        owners = {n: bases[i] for n, i in self._parameters.group_of.items()}
        for number, (group, here) in enumerate(zip(groups, bases, strict=True)):
            for name in group.get(NAMES, "").split("\n"):
                if owners.get(name, here) != here:
                    raise ValueError(
                        f"state_dict: group {number} has the state of {name!r}, which optimizer "
                        f"{owners[name]} of the list steps here, not optimizer {here}; give the "
                        "optimizers in the order of the run that saved it"
                    )

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


def has_torchs_form(state: Any) -> bool:
    """Tell whether a state dict has torch's form: entries by number, and groups of numbers."""
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        return False
    groups = state.get("param_groups")
    return isinstance(groups, list) and all("params" in group for group in groups)


def saves_in_torchs_form(base: torch.optim.Optimizer) -> bool:
    """Tell whether an optimizer's state dict has torch's form."""
    if type(base).state_dict is torch.optim.Optimizer.state_dict:
        return True
    return has_torchs_form(base.state_dict())


def _numbered_groups(base: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the groups with numbers in the place of parameters, counted on as torch does."""
    number = count()
    return [{"params": [next(number) for _ in group["params"]]} for group in base.param_groups]


def _split_state(
    state: Mapping[Any, Mapping[Any, Any]], names: Mapping[Any, str]
) -> tuple[dict[str, PartState], dict[Any, Any]]:
    """Return our entries as {part: {name: {key: tensor}}}, and those of the base."""
    ours: dict[str, PartState] = {}
    theirs: dict[Any, Any] = {}
    for key, entry in state.items():
        if not isinstance(entry, Mapping):  # of the base as a whole
            theirs[key] = entry
            continue
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
