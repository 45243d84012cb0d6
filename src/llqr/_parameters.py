"""The base optimizer's parameters by name, and what of them is not supported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from .distributed._refused import check_sharding, hint_of_deepspeed, refuse_wrappers
from .distributed._sharded import is_sharded
from .geometry.layout import layers_of, unwrap_model

__all__ = ["NamedParameters", "check_group_options"]

# Attributes that are read of all parameters in every step, without a loop in Python.
DEVICE, LAYOUT = attrgetter("device"), attrgetter("layout")
STRIDED = frozenset({torch.strided})

REFUSED_OPTIONS = {
    "maximize": "negate the loss instead",
    "differentiable": "leave it out",
    "capturable": "leave it out",
}


def check_group_options(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse options of the base that do not go with two passes or a metric."""
    for group in groups:
        for option, remedy in REFUSED_OPTIONS.items():
            if group.get(option, False):
                raise ValueError(f"base: {option}=True is not supported; {remedy}")


class NamedParameters:
    """Names, layers and groups of the parameters that a base optimizer holds.

    Tensors are followed by identity: after a parameter was replaced, renamed or moved, in the
    groups or in the model, :attr:`outdated` is true until :meth:`read_groups` accepts the change.

    Attributes:
        base: the optimizer.
        model: the network, as it was given.
        named: {name: parameter}, in model order.
        layers: {name: layer}.
        group_of: {name: index of the parameter group}.
        filled_groups: the indices of the groups that have parameters.
    """

    def __init__(self, base: torch.optim.Optimizer, model: nn.Module) -> None:
        self.base, self.model = base, model
        self.named: dict[str, nn.Parameter] = {}
        self._seen: _Seen | None = None
        self.read_groups()

    def read_groups(self) -> None:
        """Take over the groups and the model as they are now; if refused, nothing changes."""
        base, inner = self.base, unwrap_model(self.model)
        refuse_wrappers(inner)
        check_group_options(base.param_groups)
        groups: dict[int, int] = {}
        twice: dict[int, int] = {}
        for index, group in enumerate(base.param_groups):
            for parameter in group["params"]:
                if isinstance(parameter, nn.UninitializedParameter):
                    raise ValueError(
                        f"base: group {index} has a parameter of a lazy module that is not "
                        "initialised; run the model once before the optimizer is made"
                    )
                first = groups.setdefault(id(parameter), index)
                if first != index:
                    twice[id(parameter)] = index
        named = {name: p for name, p in inner.named_parameters() if id(p) in groups}
        self._refuse_strangers(named)
        self._refuse_untied(inner, groups)
        for name, parameter in named.items():
            if id(parameter) in twice:
                raise ValueError(
                    f"base: parameter {name!r} is in groups {groups[id(parameter)]} and "
                    f"{twice[id(parameter)]} of the parameter groups; each parameter belongs to "
                    "one group of one optimizer"
                )
        _refuse_unsupported(named)
        check_sharding(inner, named)
        layers, _ = layers_of(inner)
        self.named, self.layers = named, {name: layers[name] for name in named}
        self.group_of = {name: groups[id(p)] for name, p in named.items()}
        self.filled_groups = sorted(set(self.group_of.values()))
        self._seen = _Seen(base, inner, named)
        self._held = frozenset(map(id, named.values()))
        self._forgotten = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The copies of the parameters have ids of their own.
        self.__dict__.update(state, _held=frozenset(map(id, state["named"].values())))

    def forget(self) -> None:
        """Count as outdated: what follows from these parameters could not be set up."""
        self._forgotten = True

    @property
    def outdated(self) -> bool:
        """Whether the groups or the model hold other tensors than were read, or elsewhere."""
        return self._forgotten or self._seen is None or self._seen.differs_from(self.base)

    def _refuse_strangers(self, named: Mapping[str, Tensor]) -> None:
        """Raise if the base holds a parameter that the model does not have."""
        known = {id(p) for p in named.values()}
        for index, group in enumerate(self.base.param_groups):
            for parameter in group["params"]:
                if id(parameter) not in known:
                    raise ValueError(self._explain_stranger(parameter, index))

    def _refuse_untied(self, model: nn.Module, groups: Mapping[int, int]) -> None:
        """Raise if a parameter at several places was replaced at some, by one of no group."""
        places = self._seen.places if self._seen is not None else {}
        now = dict(model.named_parameters(remove_duplicate=False))
        kept = {id(p): name for name, p in now.items()}
        for name, old in places.items():
            new = now.get(name, old)
            tied = kept.get(id(old))
            if new is not old and tied and id(new) not in groups and new.requires_grad:
                raise ValueError(
                    f"base: {name!r} was tied to {tied!r} and is another parameter now, which no "
                    "group holds and nothing trains: tie it again, or add it by "
                    "optimizer.add_param_group, or set its requires_grad to False"
                )

    def _explain_stranger(self, stranger: Tensor, index: int) -> str:
        """Return what is wrong with a parameter of a group that the model does not have."""
        present = dict(unwrap_model(self.model).named_parameters())
        old = next((n for n, p in self.named.items() if p is stranger), None)
        if old is not None and old in present:
            text = (
                f"base: group {index} still holds the old {old!r}, which the model has replaced "
                "by another parameter: put the new one in its place in "
                f"optimizer.param_groups[{index}]['params'] and drop the old one's state "
                "(optimizer.state.pop(old, None))"
            )
        elif old is not None:
            text = (
                f"base: group {index} still holds {old!r}, which the model no longer has: take it "
                f"out of optimizer.param_groups[{index}]['params']"
            )
        else:
            held = {id(p) for group in self.base.param_groups for p in group["params"]}
            left = [n for n, p in self.named.items() if id(p) not in held and present.get(n) is p]
            remedy = (
                f"the model still has {left[0]!r}, which left the groups: assign the new parameter "
                "in the model too"
                if left
                else "llqr.Optimizer takes names and layers from the model, so build the base from "
                "model.parameters()"
            )
            text = (
                f"base: a parameter of shape {tuple(stranger.shape)} in group {index} is not a "
                f"parameter of the model; {remedy}"
            )
        text += hint_of_deepspeed()
        if stranger.is_meta:
            text += (
                "; the parameter is on the meta device: to_empty() and load_state_dict(assign=True)"
                " make new ones, so make the base and llqr.Optimizer after them"
            )
        return text

    def parameters_not_held(self, modules: Iterable[nn.Module]) -> list[nn.Parameter]:
        """Return the parameters of the modules that the base does not hold."""
        held = self._held
        return [
            p
            for module in modules
            for p in module._parameters.values()
            if p is not None and id(p) not in held
        ]

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(iter(self.named.values())).device

    @property
    def devices(self) -> set[torch.device]:
        """The devices of all parameters."""
        return set(map(DEVICE, self.named.values()))

    def gradients(self) -> dict[str, Tensor]:
        """Return p.grad of all parameters that have one; refuse sparse ones."""
        found = {name: g for name, p in self.named.items() if (g := p.grad) is not None}
        if STRIDED.issuperset(map(LAYOUT, found.values())):
            return found
        for name, gradient in found.items():
            if gradient.layout != torch.strided:
                raise ValueError(
                    f"the gradient of {name!r} is sparse, which is not supported; build the "
                    "embedding with sparse=False"
                )
        return found

    def require_gradients(self, where: str) -> dict[str, Tensor]:
        """Return p.grad of all parameters that have one; raise if none has."""
        gradients = self.gradients()
        if not gradients:
            raise RuntimeError(
                f"no parameter has a gradient after {where}: call backward() in it, on a loss "
                "that depends on the optimizer's parameters"
            )
        return gradients


class _Seen:
    """Where the tensors of a base and its model were, kept by reference so that no id is reused.

    Args:
        base: the optimizer.
        model: without wrappers.
        named: the parameters of the base, by their names in the model.

    Attributes:
        places: the same, with all names of each.
    """

    def __init__(
        self, base: torch.optim.Optimizer, model: nn.Module, named: Mapping[str, Tensor]
    ) -> None:
        held = {id(p) for p in named.values()}
        every = model.named_parameters(remove_duplicate=False)
        self._model, self.places = model, {name: p for name, p in every if id(p) in held}
        self._groups = [list(group["params"]) for group in base.param_groups]
        self._links: tuple[Any, ...] = self._find_links()

    def _find_links(self) -> tuple[list[dict[str, Any]], list[str], list[Any]]:
        """Return the entries of modules that lead to the parameters: (tables, keys, values)."""
        modules = dict(self._model.named_modules(remove_duplicate=False))
        links: dict[str, tuple[Any, str, Any]] = {}
        for name, parameter in self.places.items():
            if is_sharded(parameter):  # fully_shard swaps the model's entries by itself
                continue
            path, _, last = name.rpartition(".")
            links[name] = modules[path]._parameters, last, parameter
            while path and path not in links:
                above, _, last = path.rpartition(".")
                links[path] = modules[above]._modules, last, modules[path]
                path = above
        # TorchScript has tables of its own, whose entries cannot be replaced.
        plain = [link for link in links.values() if isinstance(link[0], dict)]
        return [t for t, _, _ in plain], [k for _, k, _ in plain], [v for _, _, v in plain]

    def differs_from(self, base: torch.optim.Optimizer) -> bool:
        """Tell whether anything is elsewhere now."""
        groups = base.param_groups
        if len(groups) != len(self._groups):
            return True
        for group, seen in zip(groups, self._groups, strict=True):
            now = group["params"]
            if len(now) != len(seen) or not all(map(is_, now, seen)):
                return True
        if not self._links:
            self._links = self._find_links()
        tables, keys, values = self._links
        # Mapped without a loop in Python, since this runs twice per step over all parameters.
        return not all(map(is_, map(dict.get, tables, keys), values))

    def __getstate__(self) -> dict[str, Any]:
        # A copied module may keep its parameters in other tables than the copies of these.
        return {**self.__dict__, "_links": ()}


def _refuse_unsupported(named: Mapping[str, Tensor]) -> None:
    for name, parameter in named.items():
        if parameter.layout != torch.strided or parameter.is_complex():
            kind = "complex" if parameter.is_complex() else "sparse"
            raise ValueError(f"base: parameter {name!r} is {kind}, which is not supported")
        if not parameter.is_floating_point():
            raise ValueError(f"base: parameter {name!r} has dtype {parameter.dtype}")
