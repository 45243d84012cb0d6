"""The base optimizer's parameters by name, and what of them is not supported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .distributed._sharded import check_sharding
from .geometry.layout import layers_of, unwrap_model

__all__ = ["NamedParameters", "check_group_options"]

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

    Attributes:
        base: the optimizer.
        model: the network, as it was given.
        named: {name: parameter}, in model order.
        layers: {name: layer}.
        group_of: {name: index of the parameter group}.
    """

    def __init__(self, base: torch.optim.Optimizer, model: nn.Module) -> None:
        self.base, self.model = base, model
        self.read_groups()

    def read_groups(self) -> None:
        """Take over the groups as they are now, or refuse them."""
        base, inner = self.base, unwrap_model(self.model)
        check_group_options(base.param_groups)
        groups: dict[int, int] = {}
        for index, group in enumerate(base.param_groups):
            for parameter in group["params"]:
                if isinstance(parameter, nn.UninitializedParameter):
                    raise ValueError(
                        f"base: group {index} has a parameter of a lazy module that is not "
                        "initialised; run the model once before the optimizer is made"
                    )
                groups[id(parameter)] = index
        self.named: dict[str, nn.Parameter] = {
            name: p for name, p in inner.named_parameters() if id(p) in groups
        }
        self._refuse_strangers()
        self._refuse_unsupported()
        check_sharding(inner, self.named)
        layers, _ = layers_of(inner)
        self.layers = {name: layers[name] for name in self.named}
        self.group_of = {name: groups[id(p)] for name, p in self.named.items()}
        self._count = self._count_in_groups()

    def _refuse_strangers(self) -> None:
        """Raise if the base holds a parameter that the model does not have."""
        known = {id(p) for p in self.named.values()}
        for index, group in enumerate(self.base.param_groups):
            for parameter in group["params"]:
                if id(parameter) not in known:
                    raise ValueError(
                        f"base: a parameter of shape {tuple(parameter.shape)} in group {index} is "
                        "not a parameter of the model; llqr.Optimizer takes names and layers from "
                        "the model, so build the base from model.parameters()"
                    )

    def _refuse_unsupported(self) -> None:
        for name, parameter in self.named.items():
            if parameter.layout != torch.strided or parameter.is_complex():
                kind = "complex" if parameter.is_complex() else "sparse"
                raise ValueError(f"base: parameter {name!r} is {kind}, which is not supported")
            if not parameter.is_floating_point():
                raise ValueError(f"base: parameter {name!r} has dtype {parameter.dtype}")

    def _count_in_groups(self) -> int:
        return sum(len(group["params"]) for group in self.base.param_groups)

    @property
    def outdated(self) -> bool:
        """Whether the base holds more or fewer parameters than were read."""
        return self._count_in_groups() != self._count

    def parameters_not_held(self, modules: Iterable[nn.Module]) -> list[nn.Parameter]:
        """Return the parameters of the modules that the base does not hold."""
        held = {id(p) for p in self.named.values()}
        found = (p for module in modules for p in module._parameters.values())
        return [p for p in found if p is not None and id(p) not in held]

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(iter(self.named.values())).device

    def gradients(self) -> dict[str, Tensor]:
        """Return p.grad of all parameters that have one; refuse sparse ones."""
        found = {}
        for name, parameter in self.named.items():
            if parameter.grad is None:
                continue
            if parameter.grad.layout != torch.strided:
                raise ValueError(
                    f"the gradient of {name!r} is sparse, which is not supported; build the "
                    "embedding with sparse=False"
                )
            found[name] = parameter.grad
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
