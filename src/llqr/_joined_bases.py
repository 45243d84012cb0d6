"""Several torch optimizers as one, such as Muon for the matrices with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import count, islice
from operator import is_
from typing import Any

import torch

from ._parameters import check_group_options
from ._wrapper import (
    OptimizerWrapper,
    attributes_to_copy,
    call_if_there,
    load_with_hooks,
    save_with_hooks,
    step_base,
)
from .distributed._refused import refuse_deepspeed_optimizer

__all__ = ["BASE", "JoinedBases", "defaults_of_group", "join_bases", "optimizers_of"]

#: The entry of a parameter group that says which optimizer steps it: its place in the list.
BASE = "base"
#: The state dicts one by one, if one of them has another form than torch's.
OPTIMIZERS = "optimizers"


def join_bases(base: Any) -> torch.optim.Optimizer:
    """Return the optimizer that was given, or the optimizers of a list as one; refuse others."""
    if isinstance(base, (list, tuple)):
        return JoinedBases(base)
    check_base(base, "base", "optimizer or a list of them")
    return base  # type: ignore[no-any-return]


def check_base(base: Any, where: str, expected: str = "optimizer") -> None:
    """Refuse what is no optimizer, or not one that is supported."""
    refuse_deepspeed_optimizer(base, where)
    kind = type(base).__name__
    if not isinstance(base, torch.optim.Optimizer) or isinstance(base, OptimizerWrapper):
        raise TypeError(f"{where}: expected a torch.optim {expected}, got {kind}")
    if isinstance(base, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        raise TypeError(f"{where}: {kind} is not supported")
    for needed in ("param_groups", "state", "defaults"):
        if not hasattr(base, needed):
            raise TypeError(
                f"{where}: {kind} has no {needed!r}, which every torch.optim optimizer "
                "has; call super().__init__ in it, or hand over the optimizer that it contains"
            )
    # Not torch's own, which keep these options in their groups.
    check_group_options([vars(base)])


def defaults_of_group(base: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default options of the optimizer that steps a group of a base."""
    return (base[group[BASE]] if isinstance(base, JoinedBases) else base).defaults


def optimizers_of(base: torch.optim.Optimizer) -> Sequence[torch.optim.Optimizer]:
    """Return the optimizers that a base consists of."""
    return base.optimizers if isinstance(base, JoinedBases) else (base,)


class JoinedBases(torch.optim.Optimizer):
    """Step several optimizers as one; also a sequence of them.

    Groups and state stay in the optimizers, so what is done to one of them directly (its
    ``load_state_dict``, a scheduler, a hook, ``train`` and ``eval``) is seen here. ``param_groups``
    is one list of their very dicts, each with its ``base``; a group that joins is the last one, so
    that the rates a scheduler counts by number stay with their groups. A change of the list itself
    is handed on to the optimizers.

    Args:
        optimizers: with disjoint parameters.
    """

    optimizers: tuple[torch.optim.Optimizer, ...]
    _listed: list[dict[str, Any]]
    _known: list[tuple[int, dict[str, Any]]]

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        if not optimizers:
            raise ValueError("base: expected at least one torch.optim optimizer, got an empty list")
        for i, optimizer in enumerate(optimizers):
            check_base(optimizer, f"base[{i}]")
            if isinstance(optimizer, JoinedBases):
                raise TypeError(f"base[{i}]: is a list of optimizers; give one flat list")
            if any(optimizer is other for other in optimizers[:i]):
                raise ValueError(f"base[{i}]: {type(optimizer).__name__} is in the list twice")
        # As for an optimizer that is not built from parameters: hooks only.
        super().__setstate__({"optimizers": tuple(optimizers), "_listed": [], "_known": []})

    # -- a sequence of the optimizers ----------------------------------------------------------

    def __len__(self) -> int:
        return len(self.optimizers)

    def __getitem__(self, index: int) -> torch.optim.Optimizer:
        return self.optimizers[index]

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.optimizers)

    # -- groups and state ----------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all, always the same list."""
        if not self._list_is_as_known():
            self._hand_on(self._listed)
        left = [iter(optimizer.param_groups) for optimizer in self.optimizers]
        known = [(i, group) for i, _ in self._known for group in islice(left[i], 1)]
        known += [(i, group) for i, groups in enumerate(left) for group in groups]
        for i, group in known:
            group[BASE] = i
        self._known = known
        self._listed[:] = [group for _, group in known]
        return self._listed

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._hand_on(groups)

    def _list_is_as_known(self) -> bool:
        """Tell whether the list holds what was put in it."""
        return len(self._listed) == len(self._known) and all(
            map(is_, self._listed, (group for _, group in self._known))
        )

    def _hand_on(self, groups: Iterable[dict[str, Any]]) -> None:
        """Give each optimizer its groups of a list: those that it has, and those that name it."""
        places = {id(group): i for i, group in self._known}
        known = [
            (places[id(g)] if id(g) in places else self._base_of(g, "param_groups"), g)
            for g in groups
        ]
        for i, optimizer in enumerate(self.optimizers):
            optimizer.param_groups[:] = [group for j, group in known if j == i]
        self._known = known
        self._listed[:] = [group for _, group in known]

    def _base_of(self, group: Mapping[str, Any], where: str) -> int:
        index = group.get(BASE)
        if isinstance(index, int) and 0 <= index < len(self):
            return index
        choices = ", ".join(f"{i} ({type(o).__name__})" for i, o in enumerate(self.optimizers))
        raise ValueError(
            f"{where}: the group says base={index!r}; with several optimizers it needs the number "
            f"of the one that steps it, one of {choices}"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the optimizer whose number is the group's ``base``."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        index = self._base_of(param_group, "add_param_group")
        self.optimizers[index].add_param_group(param_group)

    @property
    def state(self) -> JoinedState:  # type: ignore[override]
        """The states of all as one mapping; what is written goes to the holder's own."""
        return JoinedState(self.optimizers)

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The options that all have, as the first has them.

        Schedulers that cycle the momentum look here whether every group has one.
        """
        first, *others = (optimizer.defaults for optimizer in self.optimizers)
        return {k: v for k, v in first.items() if all(k in defaults for defaults in others)}

    # -- the step ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step one after the other."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            step_base(optimizer)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def train(self) -> None:
        """Call ``train`` of those that have it."""
        for optimizer in self.optimizers:
            call_if_there(optimizer, "train")

    def eval(self) -> None:
        """Call ``eval`` of those that have it."""
        for optimizer in self.optimizers:
            call_if_there(optimizer, "eval")

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return one state dict in torch's form, or {"optimizers": one each} if one has another."""
        return save_with_hooks(self, self._save)

    def load_state_dict(self, state_dict: Any) -> None:
        """Take over what :meth:`state_dict` returned, or a list of the optimizers' own."""
        load_with_hooks(self, state_dict, self._load)

    def _save(self) -> dict[str, Any]:
        places = self._places()
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        if not all(map(_has_only_numbered_state, states)):
            return {OPTIMIZERS: states}
        left = [iter(state["param_groups"]) for state in states]
        number = count()
        state: dict[int, Any] = {}
        groups = []
        for i in places:
            group, entries = next(left[i]), states[i]["state"]
            numbers = [next(number) for _ in group["params"]]
            owned = zip(numbers, group["params"], strict=True)
            state.update({n: entries[key] for n, key in owned if key in entries})
            groups.append({**group, "params": numbers})
        return {"state": state, "param_groups": groups}

    def _load(self, given: Any) -> None:
        one_by_one = given.get(OPTIMIZERS) if isinstance(given, Mapping) else given
        parts = self._split(given) if one_by_one is None else list(one_by_one)
        if len(parts) != len(self):
            raise ValueError(
                f"state_dict: has the states of {len(parts)} optimizers, expected {len(self)}"
            )
        # torch's own loading makes new objects, so these stay what they are.
        replaced = ("state", "param_groups")
        before = [{k: v for k, v in vars(o).items() if k in replaced} for o in self.optimizers]
        try:
            for optimizer, part in zip(self.optimizers, parts, strict=True):
                optimizer.load_state_dict(part)
        except Exception:
            for optimizer, attributes in zip(self.optimizers, before, strict=True):
                vars(optimizer).update(attributes)
            raise

    def _split(self, given: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the state dict of each optimizer, cut out of one for all."""
        groups, places = given["param_groups"], self._places()
        if len(groups) != len(places):
            raise ValueError(
                f"state_dict: has {len(groups)} parameter groups, this optimizer {len(places)}"
            )
        self.check_saved_groups(groups)
        parts = []
        for i in range(len(self)):
            own = [group for j, group in zip(places, groups, strict=True) if j == i]
            keys = {key for group in own for key in group["params"]}
            state = {k: v for k, v in given["state"].items() if k in keys}
            parts.append({"state": state, "param_groups": own})
        return parts

    def check_saved_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuse groups of a state dict that belong to another optimizer of the list.

        Its number or its options show it. Options that only this optimizer lacks are new ones.
        """
        remedy = "give the optimizers in the order of the run that saved it"
        options = [set(optimizer.defaults) for optimizer in self.optimizers]
        kinds = [f"optimizer {i} ({type(o).__name__})" for i, o in enumerate(self.optimizers)]
        places = self._places()
        if len(groups) != len(places):  # of an optimizer with other groups, as is told elsewhere
            return
        for number, (i, group) in enumerate(zip(places, groups, strict=True)):
            if group.get(BASE, i) != i:
                raise ValueError(
                    f"state_dict: group {number} belongs to optimizer {group[BASE]} of the list, "
                    f"here to {kinds[i]}; {remedy}"
                )
            others = [j for j, own in enumerate(options) if own and own <= set(group)]
            if others and not options[i] <= set(group):
                raise ValueError(
                    f"state_dict: group {number} has the options of {kinds[others[0]]}, here it "
                    f"belongs to {kinds[i]}; {remedy}"
                )

    def _places(self) -> list[int]:
        """Return the optimizer's number of each group, in the list's order."""
        return [group[BASE] for group in self.param_groups]

    def __getstate__(self) -> dict[str, Any]:
        return attributes_to_copy(self)

    def __repr__(self) -> str:
        return "\n".join(repr(optimizer) for optimizer in self.optimizers)


class JoinedState(MutableMapping[Any, Any]):
    """The states of several optimizers as one: {parameter: entries}, read and written through.

    Args:
        optimizers: whose states they are.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers

    def _state_with(self, key: Any) -> Any:
        """Return the state that a key belongs to: it is there, or the parameter is held."""
        states = [o.state for o in self._optimizers if key in o.state]
        if len(states) == 1:
            return states[0]
        for optimizer in self._optimizers:  # of a parameter that moved, the holder's counts
            if any(p is key for group in optimizer.param_groups for p in group["params"]):
                return optimizer.state
        if states:
            return states[0]
        raise KeyError(key)

    def __getitem__(self, key: Any) -> Any:
        return self._state_with(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._state_with(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._state_with(key)[key]

    # A look is no entry, though torch's mapping makes one when it is indexed.
    def __contains__(self, key: Any) -> bool:
        return any(key in optimizer.state for optimizer in self._optimizers)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the entries of a parameter, if there are any."""
        return self[key] if key in self else default

    def __iter__(self) -> Iterator[Any]:
        return iter(dict.fromkeys(key for o in self._optimizers for key in o.state))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


def _has_only_numbered_state(state: Any) -> bool:
    """Tell whether a state dict is of torch's form, with nothing but parameters' entries in it."""
    if not isinstance(state, Mapping) or set(state) != {"state", "param_groups"}:
        return False
    held = {key for group in state["param_groups"] for key in group["params"]}
    return set(state["state"]) <= held
