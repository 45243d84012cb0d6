"""What the perturbation and the geometry see of a step, and what the perturbation answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ._autocast import without_autocast
from ._checks import value_at_step
from ._devices import reads_are_free
from ._joined_bases import defaults_of_group
from ._parameters import NamedParameters
from ._progress import Progress
from ._vectors import (
    DEVICE,
    LazyTensors,
    Scalar,
    Tensors,
    are_one_run,
    copies_of,
    copy_all,
    scale_tensors,
    widen_to_float32,
    zeros_unless,
)
from .distributed import Ranks
from .distributed._sharded import any_sharded, local_all
from .geometry import FixedGeometry, Geometry, StructuredGeometry
from .perturbations import Perturbation, Probe
from .perturbations._base import bounds_displacement, forgets_skipped

__all__ = ["Probing", "copy_gradients", "widen_gradients"]

#: Where torch.optim's optimizers keep a running mean of gradients, and the options that make them.
MOMENTUM_KEYS = ("momentum_buffer", "exp_avg")
MOMENTUM_OPTIONS = ("momentum", "betas")


class Probing:
    """Ask a perturbation where to probe and along what to step.

    Args:
        parameters: of the base optimizer.
        geometry: the metric of the probe, or None for U = I.
        perturbation: where to probe, or None for one pass.
        ranks: the processes that train together.
        progress: the counters of the training.
        check_finite: whether anybody looks at whether gradients are finite.

    Attributes:
        observed: whether the gradients of the coming step were shown.
        clean: copies of them, if the geometry observes them.
    """

    def __init__(
        self,
        parameters: NamedParameters,
        geometry: Geometry | None,
        perturbation: Perturbation | None,
        ranks: Ranks,
        progress: Progress,
        check_finite: bool = True,
    ) -> None:
        self._parameters, self._ranks, self._progress = parameters, ranks, progress
        self._geometry, self._perturbation = geometry, perturbation
        self._check_finite = check_finite
        self._bounded = perturbation is not None and bounds_displacement(type(perturbation))
        # A metric of our own makes what is not finite out of it.
        applies = (None, FixedGeometry.apply, StructuredGeometry.apply)
        self._passed_on = getattr(type(geometry), "apply", None) in applies
        self._may_observe_all, self._may_combine_all = (
            perturbation is None or forgets_skipped(method, type(perturbation))
            for method in ("observe", "combine")
        )
        self.observed = False
        self.clean: dict[str, Tensor] | None = None
        if self.looks_ahead:
            self._require_momentum()

    # -- what is needed ------------------------------------------------------------------------

    @property
    def radii(self) -> dict[str, float]:
        """The radius rho of each parameter at the coming step; 0 if it is not perturbed."""
        return self._by_name(self.radii_of_groups())

    def _by_name(self, radii: Sequence[float]) -> dict[str, float]:
        groups = self._parameters.group_of
        if len(radii) == 1:  # as mostly
            return dict.fromkeys(groups, radii[0])
        return {name: radii[i] for name, i in groups.items()}

    def radii_of_groups(self) -> list[float]:
        """Return the radius of each parameter group at the coming step; 0 if it is not probed."""
        perturbation, base = self._perturbation, self._parameters.base
        if perturbation is None or not perturbation.probes_at(self._progress.step):
            return [0.0] * len(base.param_groups)
        return self._radii_between_probes_too(perturbation)

    def _radii_between_probes_too(self, perturbation: Perturbation) -> list[float]:
        base, radii = self._parameters.base, list[float]()
        for index, group in enumerate(base.param_groups):
            # Adadelta's own option of that name is no radius.
            taken = "rho" in defaults_of_group(base, group)
            rho = perturbation.rho if taken else group.get("rho", perturbation.rho)
            rho = value_at_step(rho, self._progress.step)
            number = isinstance(rho, float) or isinstance(rho, Real)  # the first is faster
            if not (number and 0 <= rho < math.inf):
                raise ValueError(f"rho: expected a number >= 0 (group {index}), got {rho!r}")
            radii.append(float(rho))
        return radii

    @property
    def displaces(self) -> bool:
        """Whether a pass of the coming step runs at theta + eps."""
        return self.any_moves(self.radii_of_groups())

    def any_moves(self, radii: Sequence[float]) -> bool:
        """Tell whether a parameter has a radius that is not 0."""
        return any(radii[i] for i in self._parameters.filled_groups)

    @property
    def looks_ahead(self) -> bool:
        """Whether that is the only pass."""
        return self._perturbation is not None and self._perturbation.looks_ahead

    @property
    def combines(self) -> bool:
        """Whether the perturbation makes the step's gradient from those of both passes."""
        return self._overrides("combine")

    def _overrides(self, method: str) -> bool:
        kind = type(self._perturbation)
        return self._perturbation is not None and (
            getattr(kind, method) is not getattr(Perturbation, method)
        )

    @property
    def geometry_observes(self) -> bool:
        """Whether the geometry learns from the gradients of steps."""
        return self._geometry is not None and self._geometry.observes

    # -- the displacement ----------------------------------------------------------------------

    def find_displacement(
        self,
        clean: Mapping[str, Tensor],
        scaler: Any,
        radii_of_groups: Sequence[float] | None = None,
    ) -> tuple[Tensors, bool | Tensor]:
        """Show g to who learns from it; return eps(g; U, rho) or {} (algorithm 1, line 5).

        Called without a graph.

        Args:
            clean: g, scaled; empty if no pass was run yet.
            scaler: the GradScaler that scaled it.
            radii_of_groups: :meth:`radii_of_groups`, if it was asked for.

        Returns:
            eps, and whether g is finite in every process, as far as anybody looks. That is a tensor
            if it is not worth a wait for the device; where it is false eps is zero.
        """
        perturbation, wide = self._perturbation, widen_gradients(clean, scaler)
        radii = self.radii if radii_of_groups is None else self._by_name(radii_of_groups)
        everything, alone = all(radii.values()), self._ranks.size == 1 and not self._ranks.sharded
        # The length that eps is divided by tells it too, and that takes one read.
        unknown = bool(clean) and self._check_finite
        told = self._bounded and self._passed_on and self._may_observe_all
        joined = everything and alone and told
        if unknown and not joined and not self._ranks.finite(clean):
            return {}, False
        if clean:
            self._show(clean, wide, scaler)
        if perturbation is None:
            return {}, True
        chosen = radii.keys() if everything else {n for n, rho in radii.items() if rho > 0}
        gradients = wide if everything else {n: g for n, g in wide.items() if n in chosen}
        if not chosen or not (gradients or self.looks_ahead):
            return {}, True
        devices = self._parameters.devices
        stays = alone and not reads_are_free(devices)
        if stays and unknown:
            # Then a copy of eps is zero where g is not finite, which of large networks is dear.
            stays = joined and self._may_combine_all and are_one_run(list(wide.values()))
        probe = Probe(
            gradients=gradients,
            parameters=self._parameters.named,
            radii=radii,
            metric=dict if self._geometry is None else self._geometry.apply,
            layers=self._parameters.layers,
            momentum=LazyTensors(
                lambda: {n: m for n, m in self._find_momentum().items() if n in chosen}
            ),
            step=self._progress.step,
            _stays=stays,
        )
        # The passes may run within the caller's autocast.
        with without_autocast(*devices):
            eps = perturbation.displacement(probe)
        finite = probe.is_finite if unknown and joined else True
        if finite is False and not self._ranks.finite(clean):
            return {}, False
        if stays:
            self._progress.skipped_probes += probe._is_negative
        healthy = finite if isinstance(finite, Tensor) else True
        if eps is None:
            self._progress.skipped_probes += 1
            return {}, healthy
        if isinstance(healthy, Tensor):
            return zeros_unless(healthy, eps), healthy
        if self._check_finite and not (self._bounded or self._ranks.finite(eps)):
            raise RuntimeError(
                f"{type(perturbation).__name__} gave a displacement that is not finite although "
                f"the gradients are; rho = {max(radii.values())}"
            )
        return eps, True

    def _find_momentum(self) -> dict[str, Tensor]:
        """Return the base's running mean of gradients, of the parameters that have one."""
        state = self._parameters.base.state
        found: dict[str, Tensor] = {}
        for name, p in self._parameters.named.items():
            entry = state.get(p, {})
            kept = (entry.get(key) for key in MOMENTUM_KEYS)
            value = next((m for m in kept if isinstance(m, Tensor)), None)
            if value is not None:
                found[name] = value
        if self.looks_ahead and not found and any(map(state.get, self._parameters.named.values())):
            self._refuse_base(f"its state has none of {', '.join(MOMENTUM_KEYS)}")
        return found

    def _require_momentum(self) -> None:
        """Refuse a base that has no momentum, before its first step shows that."""
        groups = self._parameters.base.param_groups
        if not any(group.get(option) for group in groups for option in MOMENTUM_OPTIONS):
            self._refuse_base(f"it has none of the options {', '.join(MOMENTUM_OPTIONS)}, or 0")

    def _refuse_base(self, why: str) -> None:
        raise ValueError(
            f"base: {type(self._parameters.base).__name__} keeps no momentum, along which "
            f"{type(self._perturbation).__name__} perturbs: {why}; take a base such as "
            "torch.optim.SGD(..., momentum=0.9) or torch.optim.AdamW, or llqr.SAM"
        )

    # -- the gradients -------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, clean: Mapping[str, Tensor], scaler: Any) -> None:
        """Show the gradients of the first pass to who learns from them."""
        if self._overrides("observe") or self.geometry_observes:
            self._show(clean, widen_gradients(clean, scaler), scaler)

    def _show(self, clean: Mapping[str, Tensor], wide: dict[str, Tensor], scaler: Any) -> None:
        if self._perturbation is not None:
            self._perturbation.observe(wide)
        if self.geometry_observes:
            self.clean = copy_gradients(clean, scaler)
        self.observed = True

    @torch.no_grad()
    def combine(
        self, clean: Mapping[str, Tensor], second: Mapping[str, Tensor], scaler: Any
    ) -> None:
        """Put the combination of both passes' gradients into p.grad, scaled as it was.

        Args:
            clean: unscaled.
            second: p.grad as it is.
            scaler: the GradScaler that scaled it.
        """
        assert self._perturbation is not None
        wide = widen_gradients(second, scaler)
        if clean.keys() != wide.keys():
            # A forward that takes another way may leave a parameter out of one of the passes.
            clean = {n: clean[n] if n in clean else torch.zeros_like(g) for n, g in wide.items()}
        with without_autocast(*self._parameters.devices):
            chosen = self._perturbation.combine(clean, wide)
        scale = loss_scale(scaler, second)
        found = chosen if scale is None else scale_tensors(chosen, scale)
        if found is not wide:  # else p.grad is what was chosen, if it was not widened
            copy_all(local_all(second.values()), local_all([found[n] for n in second]))

    @torch.no_grad()
    def adjust(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a step without a second pass goes along; the very argument if that is g."""
        perturbation = self._perturbation
        if perturbation is None or not self._overrides("adjust"):
            return gradients
        if self._progress.step < perturbation.start:
            return gradients
        if not self.any_moves(self._radii_between_probes_too(perturbation)):
            return gradients
        with without_autocast(*self._parameters.devices):
            adjusted = perturbation.adjust(widen_to_float32(gradients))
        return {n: adjusted[n].to(g.dtype) for n, g in gradients.items()}

    def forget(self) -> None:
        """Nothing was shown for the coming step."""
        self.observed, self.clean = False, None


def loss_scale(scaler: Any, gradients: Mapping[str, Tensor]) -> Scalar | None:
    """Return the factor that a GradScaler puts on the loss; None: it is known to be one.

    It stays on the gradients' device where a read would take a wait.
    """
    if scaler is None:
        return None
    devices = set(map(DEVICE, gradients.values()))
    if reads_are_free(devices):
        factor = float(scaler.get_scale())
        return None if factor == 1.0 else factor
    scale: Tensor = scaler.scale(torch.ones((), device=devices.pop()))
    return scale


def widen_gradients(gradients: Mapping[str, Tensor], scaler: Any) -> dict[str, Tensor]:
    """Return gradients in at least float32, without the scale of the loss."""
    wide, scale = widen_to_float32(gradients), loss_scale(scaler, gradients)
    if scale is None:
        return wide
    return dict(zip(wide, torch._foreach_div(list(wide.values()), scale), strict=True))


@torch.no_grad()
def copy_gradients(gradients: Mapping[str, Tensor], scaler: Any) -> dict[str, Tensor]:
    """Return :func:`widen_gradients` in memory of their own.

    What follows writes into p.grad in place: clipping does, and so does a second backward of
    DistributedDataParallel with ``gradient_as_bucket_view``.
    """
    wide = widen_gradients(gradients, scaler)
    shared = {n: g for n, g in wide.items() if g is gradients[n]}
    if any_sharded(shared.values()):
        copies = [g.clone() for g in shared.values()]
    else:
        copies = copies_of(list(shared.values()))
    return {**wide, **dict(zip(shared, copies, strict=True))}
