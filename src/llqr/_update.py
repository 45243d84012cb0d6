"""The update of a step: p.grad -> U p.grad -> base.step(), or nothing at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from ._autocast import without_autocast
from ._checks import short_repr
from ._coordinates import Coordinates, check_bases
from ._devices import WIDE
from ._parameters import NamedParameters
from ._passes import Passes
from ._probing import Probing
from ._progress import Progress
from ._refresher import Refresher
from ._vectors import (
    DTYPE,
    lay_out_like,
    rescale_each_to_norm,
    rescale_to_norm,
    widen_to_float32,
)
from ._wrapper import step_base
from .distributed import Ranks
from .distributed._sharded import local
from .geometry import Geometry
from .perturbations import Perturbation

__all__ = ["Graft", "Transport", "Update"]

#: Whose length U g gets: that of all gradients together, or each parameter's that of its own.
Graft = bool | Literal["layer"]
#: What U does to the update: all, nothing, or it names the coordinates of the base.
Transport = bool | Literal["bases"]

NOT_FINITE = (
    "a step was skipped because its gradients are not finite; {kept} "
    "(optimizer.skipped_steps counts)"
)
OUT_OF_RANGE = (
    "a step was skipped because {what} left the range of their dtype; {kept} "
    "(optimizer.skipped_steps counts)"
)


class Update:
    """Step the base along U g, and let everything that learns from steps know.

    Args:
        parameters: of the base optimizer.
        geometry: U, or None for the identity.
        perturbation: told of steps that count.
        ranks: the processes that train together.
        progress: the counters of the training.
        passes: whether there was a second one, and what a skipped step restores.
        probing: what was seen of the gradients.
        refresher: whether a refresh was due.
        check_finite: whether a step is skipped if its gradients are not finite.

    Attributes:
        transport: whether the update goes through U, or the base steps in its bases.
        graft: whether, and how, U g is rescaled to the length of g.
        coordinates: that the base steps in.
    """

    transport: Transport = True
    graft: Graft = False

    def __init__(
        self,
        parameters: NamedParameters,
        geometry: Geometry | None,
        perturbation: Perturbation | None,
        ranks: Ranks,
        progress: Progress,
        passes: Passes,
        probing: Probing,
        refresher: Refresher,
        check_finite: bool,
    ) -> None:
        self._parameters, self._base = parameters, parameters.base
        self._geometry, self._perturbation = geometry, perturbation
        self._ranks, self._progress = ranks, progress
        self._passes, self._probing, self._refresher = passes, probing, refresher
        self._check_finite = check_finite
        self.coordinates = Coordinates(parameters)

    def choose(self, transport: Any, graft: Any) -> None:
        """Set how U enters the update; refuse what is no way, or does not go with the parts."""
        if not isinstance(transport, bool) and transport != "bases":
            shown = short_repr(transport)
            raise TypeError(f"transport: expected True, False or 'bases', got {shown}")
        if not isinstance(graft, bool) and graft != "layer":
            raise TypeError(f"graft: expected True, False or 'layer', got {short_repr(graft)}")
        if transport == "bases":
            named = self._parameters.named
            check_bases(self._base, self._geometry, self._perturbation, graft, named)
        self.transport, self.graft = transport, graft

    def make(self) -> None:
        """Update the parameters from the gradients that are there."""
        self._passes.close()
        gradients = self._parameters.gradients()
        if not gradients:
            step_base(self._base)
            return
        if self._changes_nothing(gradients):
            self.follow_bases()
            with self.coordinates.entered(self.coordinates.rotated_weights(gradients)):
                step_base(self._base)
            return
        # A scaler steps only what it found finite, but does not compare processes.
        looked = self._passes.found_finite and self._ranks.size == 1
        if self._check_finite and not looked and not self._ranks.finite(gradients, equal=True):
            self._skip_step(NOT_FINITE)
            return
        self._warn_of_omissions()
        direction = gradients if self._passes.probed else self._probing.adjust(gradients)
        self.follow_bases()
        if self.coordinates.bases is not None:
            direction = self.coordinates.rotate(direction)
        elif self._geometry is not None and self.transport is True:
            direction = self._transport(self._geometry, direction)
        if self._step_along(direction, gradients):
            self._count_step(gradients)

    def _changes_nothing(self, gradients: Mapping[str, Tensor]) -> bool:
        """Tell a step that changes nothing; torch.distributed.checkpoint makes such steps."""
        if any(bool(group.get("lr", 1.0) != 0) for group in self._base.param_groups):
            return False
        return self._ranks.all(not any(bool(local(g).any()) for g in gradients.values()))

    def follow_bases(self) -> None:
        """Turn the base's state to the bases that U has now, or to the parameters' own."""
        bases = None
        if self._geometry is not None and self.transport == "bases":
            bases = self._geometry.bases_for(self._parameters.named)
        self.coordinates.change_to(bases)

    def _transport(self, geometry: Geometry, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return U g~ (algorithm 1, line 8)."""
        with without_autocast(*self._parameters.devices):  # a step may be taken within the caller's
            moved = geometry.apply(gradients)
            if not self.graft:
                return moved
            rescale = rescale_each_to_norm if self.graft == "layer" else rescale_to_norm
            return rescale(moved, gradients)

    def _step_along(self, direction: dict[str, Tensor], gradients: dict[str, Tensor]) -> bool:
        """Step the base; False: skipped, since U takes it out of the range of half precision."""
        if direction is gradients:
            step_base(self._base)
            return True
        named, weights = self._parameters.named, self.coordinates.rotated_weights(direction)
        if self._check_finite and not WIDE.issuperset(map(DTYPE, direction.values())):
            turned = "its gradients in the bases of U" if weights else "U times its gradients"
            for what, values in ((turned, direction), ("its weights in the bases of U", weights)):
                if not self._ranks.finite(values):
                    self._skip_step(OUT_OF_RANGE, what)
                    return False
        try:
            for name, value in direction.items():
                named[name].grad = lay_out_like(value, named[name])
            with self.coordinates.entered(weights):
                step_base(self._base)
        finally:
            for name, gradient in gradients.items():
                named[name].grad = gradient
        return True

    def _count_step(self, gradients: dict[str, Tensor]) -> None:
        """Let everything that learns from steps learn that this one counted."""
        passes, probing = self._passes, self._probing
        if self._perturbation is not None:
            if not probing.observed:  # one pass of the user's own, without passes()
                self._perturbation.observe(widen_to_float32(gradients))
            self._perturbation.commit()
        if self._geometry is not None and probing.geometry_observes:
            clean = widen_to_float32(gradients) if probing.clean is None else probing.clean
            with without_autocast(*self._parameters.devices):
                self._geometry.observe(clean)
        passes.forget_step()
        self._progress.step += 1

    def _skip_step(self, message: str, what: str = "") -> None:
        self._progress.skipped_steps += 1
        kept = (
            "weights, buffers and counters are as before it"
            if self._passes.undo_step()
            else "weights and counters are as before it, buffers as the backward pass left them"
        )
        self._progress.warn_once(message.format(what=what, kept=kept))

    def _warn_of_omissions(self) -> None:
        if not self._passes.probed and self._probing.displaces:
            self._progress.warn_once(
                "step() ran without a perturbed pass although a perturbation is set: use "
                "minimize, step(closure), passes, perturbed, or TwoPasses of llqr.integrations "
                "in a framework"
            )
        if self._refresher.due:
            self._progress.warn_once(
                "step() ran although a refresh of the geometry is due, so U is not learned: call "
                "optimizer.refresh_if_due(forward) before it, use minimize, or pass "
                "refresh_forward to llqr.Optimizer"
            )
