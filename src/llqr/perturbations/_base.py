"""What a perturbation is: the public base class, and what it is shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from .._checks import Schedule, check_integer, check_number
from .._vectors import (
    Scalar,
    ScaledTensors,
    Tensors,
    scale_tensors,
    total_inner_product,
    total_on_device,
)

__all__ = ["EPS0", "Metric", "Perturbation", "Probe"]

#: Inside every square root. It shortens a probe once |g| is below 1e-6.
EPS0 = 1e-12
Metric = Callable[[Tensors], dict[str, Tensor]]


@dataclass(frozen=True)
class Probe:
    """What a perturbation decides by, at one step.

    Attributes:
        gradients: g of the perturbed parameters, unscaled, in float32 or float64; empty for a
            perturbation that looks ahead.
        parameters: all parameters that the optimizer trains.
        radii: rho of each parameter.
        metric: the function g -> U g; without a geometry the identity.
        layers: the layer of each parameter.
        momentum: the base's running mean of gradients (``momentum_buffer`` or ``exp_avg``) of the
            perturbed parameters, in its own dtype, not copied; empty before the first step.
        step: how many steps counted before this one.
    """

    gradients: Tensors
    parameters: Tensors
    radii: Mapping[str, float]
    metric: Metric
    layers: Mapping[str, str]
    momentum: Tensors = field(default_factory=dict)
    step: int = 0
    _stays: bool = field(default=False, repr=False)
    _seen: list[Scalar] = field(default_factory=list, repr=False, compare=False)

    @property
    def is_finite(self) -> bool | Tensor:
        """Whether an inner product was taken, and all that were are finite.

        A tensor without dimensions if some of them stayed on the device.
        """
        read = [x for x in self._seen if not isinstance(x, Tensor)]
        if not (self._seen and all(map(math.isfinite, read))):
            return False
        return reduce(torch.add, self._staying).abs() < math.inf if self._staying else True

    @property
    def _is_negative(self) -> bool | Tensor:
        """Whether the square that eps is divided by stayed on the device and is negative."""
        return self._staying[-1] < 0 if self._staying else False

    @property
    def _staying(self) -> list[Tensor]:
        return [x for x in self._seen if isinstance(x, Tensor)]

    def inner_product(self, a: Tensors, b: Tensors) -> float:
        """Return a'b over all tensors and shards."""
        product = total_inner_product(a, b)
        self._seen.append(product)
        return product

    def _inverse_length(self, a: Tensors, b: Tensors) -> Scalar:
        """Return 1 / sqrt(a'b), or 0 if a'b is not positive although b is not 0.

        Without a read of the device if nobody asks for numbers.
        """
        if self._stays and b:
            square = total_on_device(a, b)
            self._seen.append(square)
            return torch.where(square > 0, (square + EPS0).rsqrt(), 0.0)
        product = self.inner_product(a, b)
        if not product > 0 and total_inner_product(b, b) > 0:
            return 0.0
        return 1 / math.sqrt(product + EPS0)

    def scale_by_radius(self, tensors: Tensors, unit: Scalar) -> Tensors:
        """Return each tensor times its radius and a common factor."""
        radii = {self.radii[n] for n in tensors}
        if len(radii) == 1:
            return ScaledTensors(tensors, radii.pop() * unit)
        return ScaledTensors(scale_tensors(tensors, {n: self.radii[n] for n in tensors}), unit)


class Perturbation:
    """Say where the loss is probed (base class).

    A subclass needs :meth:`displacement`. One with a memory updates it in :meth:`observe` and
    :meth:`commit`, keeps it in :meth:`state`, follows replaced parameters in :meth:`rebind` and
    forgets in :meth:`reset`. One that steps along something other than the gradient of the second
    pass overrides :meth:`combine`; one that changes the gradient of steps without a second pass,
    :meth:`adjust`. With ``looks_ahead = True`` in the class, eps is asked for before the forward,
    from what is known by then, and the step has one pass, at theta + eps.

    Args:
        rho: radius; a number >= 0 or a function of the optimizer step. A parameter group's own
            option ``rho`` (number or function) takes precedence; 0 leaves the group unperturbed.
        start: first optimizer step that is probed.
        interval: every interval-th step is probed, counted from ``start``; those in between have
            one pass and step along its gradient.

    Example:
        Probe along the sign of the gradient:

        >>> import torch, llqr
        >>> class SignProbe(llqr.Perturbation):
        ...     def displacement(self, probe):
        ...         return {n: probe.radii[n] * g.sign() for n, g in probe.gradients.items()}
        >>> model = torch.nn.Linear(2, 1)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = llqr.Optimizer(base, model, perturbation=SignProbe(0.01))
        >>> _ = optimizer.minimize(lambda: model(torch.ones(3, 2)).square().mean())
    """

    #: Whether eps needs no gradient of the step, so that its only pass is at theta + eps.
    looks_ahead: ClassVar[bool] = False
    # Whether eps is finite if the gradients are, so that nobody has to look, and whether observe()
    # and combine() keep nothing of a step that does not count, so that they may see gradients that
    # are not finite. It holds for these methods of the same class only, not for one that overrides
    # them.
    _is_bounded: ClassVar[bool] = False
    _forgets_skipped: ClassVar[bool] = True

    def __init__(self, rho: Schedule, *, start: int = 0, interval: int = 1) -> None:
        check_number("rho", rho, low=0, schedule=True)
        check_integer("start", start, low=0)
        check_integer("interval", interval, low=1)
        self.rho, self.start, self.interval = rho, start, interval

    def probes_at(self, step: int) -> bool:
        """Tell whether an optimizer step is probed, if its rho is not 0."""
        return step >= self.start and (step - self.start) % self.interval == 0

    def displacement(self, probe: Probe) -> Tensors | None:
        """Return eps as {name: tensor}, or None if the metric gives g no positive norm."""
        raise NotImplementedError

    def combine(self, clean: Tensors, perturbed: Tensors) -> Tensors:
        """Return the gradient to step with, as {name: tensor}; by default the perturbed one.

        Called after each second pass. A subclass that overrides it keeps the clean gradients in
        memory during that pass.

        Args:
            clean: gradients of the first pass, unscaled, in float32 or float64.
            perturbed: gradients of the second pass, likewise.
        """
        return perturbed

    def adjust(self, gradients: Tensors) -> Tensors:
        """Return the gradient to step with when there was no second pass; by default g itself.

        Called by ``step()``, after clipping, from step ``start`` on unless rho is 0.

        Args:
            gradients: g, unscaled, in float32 or float64.
        """
        return gradients

    def observe(self, gradients: Tensors) -> None:
        """See the clean gradients of a step, before it is known whether the step counts."""

    def commit(self) -> None:
        """Learn that the step counted."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return tensors to checkpoint as {parameter name: {key: tensor}}."""
        return {}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over tensors that :meth:`state` returned."""

    def reset(self) -> None:
        """Forget the memory: a checkpoint without one was loaded."""

    def bind(self, parameters: Tensors) -> None:
        """Attach to the parameters, by name (called by the optimizer)."""

    def rebind(self, parameters: Tensors) -> None:
        """Attach again after parameters were added, replaced, renamed or removed; default: bind.

        A memory stays with its tensor, also under a new name, and starts anew for new tensors.
        """
        self.bind(parameters)

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({shown})"


def bounds_displacement(kind: type[Perturbation]) -> bool:
    """Tell whether the class that defines ``displacement`` says that eps is finite."""
    return bool(vars(_definer_of("displacement", kind)).get("_is_bounded", False))


def forgets_skipped(method: str, kind: type[Perturbation]) -> bool:
    """Tell whether the class that defines a method says that skipped steps leave nothing in it."""
    return bool(vars(_definer_of(method, kind)).get("_forgets_skipped", False))


def _definer_of(method: str, kind: type[Perturbation]) -> type:
    return next(c for c in kind.__mro__ if method in vars(c))
