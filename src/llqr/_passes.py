"""The two passes of a step: clean, then perturbed, with everything put back in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._checks import at
from ._module_state import Buffers, RandomState, without_autocast
from ._parameters import widened
from .distributed._sharded import local, reshard

if TYPE_CHECKING:
    from ._optimizer import Optimizer

__all__ = ["Passes", "check_scaler"]


class Displaced:
    """What one perturbed pass has to put back, once.

    Attributes:
        weights: (parameter, its clean value).
        gradients: (parameter that is not ours, its p.grad).
        buffers: those after the clean pass, or None where they may stay.
    """

    def __init__(self) -> None:
        self.weights: list[tuple[Tensor, Tensor]] = []
        self.gradients: list[tuple[Tensor, Tensor | None]] = []
        self.buffers: Buffers | None = None

    def end(self) -> None:
        """Put everything back; a second call does nothing."""
        weights, self.weights = self.weights, []
        gradients, self.gradients = self.gradients, []
        buffers, self.buffers = self.buffers, None
        if weights:
            with torch.no_grad():
                torch._foreach_copy_([local(p) for p, _ in weights], [local(w) for _, w in weights])
        for p, gradient in gradients:
            p.grad = gradient
        if buffers is not None:
            buffers.restore()


class Passes:
    """Run the passes of one step for an optimizer.

    Attributes:
        probed: whether a perturbed pass ran since the last step that counted.
        observed: whether the perturbation saw the clean gradients of the coming step.
        displaced: whether a perturbed pass is open, so that the weights are theta + eps.
    """

    def __init__(self, optimizer: Optimizer, buffers: str, replay_rng: bool) -> None:
        self._optimizer = optimizer
        self._keep_clean = buffers == "clean"
        self._replay_rng = replay_rng
        self.probed = self.observed = self.displaced = False
        self._start: Buffers | None = None
        # Each step's passes have their own, so that those left open end nothing but themselves.
        self._open = Displaced()

    # -- what is needed ------------------------------------------------------------------------

    @property
    def radii(self) -> dict[str, float]:
        """The radius of each parameter at the coming step; 0 where it is not perturbed."""
        opt = self._optimizer
        perturbation, named = opt.perturbation, opt._parameters
        if perturbation is None or opt._step < perturbation.start:
            return dict.fromkeys(named.named, 0.0)
        groups: list[float] = []
        taken = "rho" in opt.base.defaults  # Adadelta's own option of that name is no radius
        for index, group in enumerate(opt.param_groups):
            rho = perturbation.rho if taken else group.get("rho", perturbation.rho)
            rho = at(rho, opt._step)
            if not (isinstance(rho, Real) and 0 <= rho < float("inf")):
                raise ValueError(f"rho: expected a number >= 0 (group {index}), got {rho!r}")
            groups.append(float(rho))
        return {name: groups[i] for name, i in named.group_of.items()}

    @property
    def needed(self) -> bool:
        """Whether the coming step has a second pass."""
        return any(self.radii.values())

    # -- the passes ----------------------------------------------------------------------------

    def run(self, scaler: Any) -> Iterator[int]:
        """Yield once for the clean pass and, if needed, once for the perturbed pass."""
        check_scaler(scaler)
        self.close()
        self.forget()
        opt, own = self._optimizer, self._open
        modules = list(opt.model.modules())
        self._start = Buffers(modules)
        random = RandomState(opt._parameters.device) if self._replay_rng else None
        opt.zero_grad()
        with opt.ranks.quiet(opt.local_probes and self.needed):
            yield 0
        if self._open is not own:
            if self.needed:
                raise RuntimeError(
                    "passes: step() or other passes came between the first pass and the second; "
                    "call step() after the loop over passes()"
                )
            return
        clean = self._clean_gradients("the first pass")
        if not self.needed:
            if opt.perturbation is not None:
                self._observe(clean, scaler)
            if scaler is not None and not opt.ranks.finite(clean):
                self.undo()  # the scaler will skip: the step is not ours to restore then
            return
        with self._displaced(clean, scaler, modules, start=self._start, random=random):
            yield 1

    @contextmanager
    def perturbed(self, scaler: Any) -> Iterator[None]:
        """Run the body at theta + eps, from the gradients that are there."""
        check_scaler(scaler)
        self.close()
        self.forget()
        clean = self._clean_gradients("the clean backward")
        modules = list(self._optimizer.model.modules())
        with self._displaced(clean, scaler, modules, start=None, random=None):
            yield

    @contextmanager
    def _displaced(
        self,
        clean: dict[str, Tensor],
        scaler: Any,
        modules: list[nn.Module],
        start: Buffers | None,
        random: RandomState | None,
    ) -> Iterator[None]:
        opt, own = self._optimizer, self._open
        healthy = opt.ranks.finite(clean)
        eps = self._displacement(clean, scaler) if healthy else {}
        if self._keep_clean or start is None:
            own.buffers = Buffers(modules)
        else:
            start.restore()
        opt.zero_grad()
        # Gradients of parameters that are not ours would add up over the two passes.
        own.gradients = [(p, p.grad) for p in opt._parameters.others(modules)]
        try:
            for p, _ in own.gradients:
                p.grad = None
            self._move(own, eps)
            del eps  # as large as the model
            if random is not None:
                random.restore()
            self.displaced = True
            yield
        finally:
            if self._open is own:
                self.displaced = False
            self._end(own)
        if self._open is not own:
            return  # step() or other passes came before the end: the rest is no more ours
        self.probed = True
        second = self._clean_gradients("the second pass")
        if not healthy:
            # What follows must see it: a GradScaler looks for infinities in p.grad, step() too.
            for gradient in second.values():
                gradient.fill_(float("nan"))
        # A scaler that will skip tells nobody; without one step() finds out, and restores itself.
        if start is not None and not (healthy and (scaler is None or opt.ranks.finite(second))):
            start.restore()

    @torch.no_grad()
    def _displacement(self, clean: dict[str, Tensor], scaler: Any) -> dict[str, Tensor]:
        opt = self._optimizer
        perturbation, geometry = opt.perturbation, opt.geometry
        if perturbation is None:
            return {}
        wide = self._observe(clean, scaler)
        rho = self.radii
        chosen = {n: g for n, g in wide.items() if rho[n] > 0}
        if not chosen:
            return {}
        with without_autocast(opt._parameters.device):  # the passes may run within the caller's
            eps = perturbation.displacement(
                chosen,
                opt._parameters.named,
                rho,
                dict if geometry is None else geometry.apply,
                opt._parameters.layers,
            )
        if eps is None:
            opt.skipped_probes += 1
            return {}
        if not opt.ranks.finite(eps):
            raise RuntimeError(
                f"{type(perturbation).__name__} gave a displacement that is not finite although "
                f"the gradients are; rho = {max(rho.values())}"
            )
        return eps

    @torch.no_grad()
    def _observe(self, clean: dict[str, Tensor], scaler: Any) -> dict[str, Tensor]:
        """Show the perturbation the clean gradients, unscaled and in at least float32."""
        wide = widened(clean)
        scale = 1.0 if scaler is None else scaler.get_scale()
        if scale != 1.0:
            wide = {n: g / scale for n, g in wide.items()}
        assert self._optimizer.perturbation is not None
        self._optimizer.perturbation.observe(wide)
        self.observed = True
        return wide

    def _clean_gradients(self, where: str) -> dict[str, Tensor]:
        gradients = self._optimizer._parameters.gradients()
        if not gradients:
            raise RuntimeError(
                f"no parameter has a gradient after {where}: call backward() in it, on a loss "
                "that depends on the optimizer's parameters"
            )
        return gradients

    # -- weights and buffers -------------------------------------------------------------------

    @torch.no_grad()
    def _move(self, own: Displaced, eps: dict[str, Tensor]) -> None:
        """Add eps to the weights, keeping copies: subtraction would not give the bits back."""
        named = self._optimizer._parameters.named
        if not eps:
            return
        moving: list[Tensor] = [named[n] for n in eps]
        own.weights = [(p, p.detach().clone()) for p in moving]
        steps: list[Tensor] = [e.to(named[n].dtype) for n, e in eps.items()]
        torch._foreach_add_(moving, steps)
        reshard(self._optimizer.model)

    def _end(self, own: Displaced) -> None:
        moved = bool(own.weights)
        own.end()
        if moved:
            reshard(self._optimizer.model)

    def close(self) -> None:
        """End the passes so far, bringing the weights back if one was left open."""
        self.displaced = False
        self._end(self._open)
        self._open = Displaced()

    def refuse(self, what: str, remedy: str) -> None:
        """Raise while the weights are at theta + eps; the pass stays open."""
        if self.displaced:
            raise RuntimeError(
                f"{what}: called within a perturbed pass, where the weights are theta + eps; "
                f"{remedy}"
            )

    def undo(self) -> bool:
        """Put the buffers back to the start of the skipped step; tell whether that was known."""
        known = self._start is not None
        if self._start is not None:
            self._start.restore()
        self.forget()
        return known

    def forget(self) -> None:
        """Start over: nothing was probed or observed for the coming step."""
        self.probed = self.observed = False
        self._start = None


def check_scaler(scaler: Any) -> None:
    """Refuse what does not scale losses and tell its scale, as torch's GradScaler does."""
    wrong = isinstance(scaler, type) or not (
        hasattr(scaler, "scale") and hasattr(scaler, "get_scale")
    )
    if scaler is not None and wrong:
        raise TypeError(f"scaler: expected a torch.amp.GradScaler or None, got {scaler!r}")
