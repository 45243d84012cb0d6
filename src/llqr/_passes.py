"""The two passes of a step: clean, then perturbed, with everything put back in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._autocast import AS_IT_IS
from ._current_pass import RunningPass
from ._module_state import ForwardState
from ._parameters import NamedParameters
from ._probing import Probing, copy_gradients
from ._progress import Progress
from ._random_state import RandomState
from ._step_modules import StepModules
from ._vectors import DTYPE, ScaledTensors, Tensors, copies_of, copy_all
from ._wrapper import clear_gradients
from .distributed import Ranks
from .distributed._sharded import WHOLE, any_sharded, local_all, reshard

__all__ = ["Passes", "check_scaler"]


class PassRecord:
    """What one perturbed pass has to put back, once.

    Attributes:
        moved: the parameters that are at theta + eps.
        weights: their clean values.
        gradients: (parameter that the optimizer does not hold, its p.grad).
        after: what the clean pass left, or None if nothing is put back.
        lost: the parameters that were written to without a copy.
        running: the pass whose body runs, if one does.
    """

    def __init__(self) -> None:
        self.moved: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.gradients: list[tuple[Tensor, Tensor | None]] = []
        self.after: ForwardState | None = None
        self.lost: list[Tensor] = []
        self.running: RunningPass | None = None

    def put_back(self) -> bool:
        """Put everything back, once; tell whether sharded weights had moved."""
        moved, weights, self.moved, self.weights = self.moved, self.weights, [], []
        gradients, self.gradients = self.gradients, []
        after, self.after = self.after, None
        sharded = False
        if moved:
            # From copies: subtracting eps would not give the bits back.
            sharded = any_sharded(moved)
            with torch.no_grad():
                if sharded:
                    moved, weights = local_all(moved), local_all(weights)
                copy_all(moved, weights)
        for p, gradient in gradients:
            p.grad = gradient
        if after is not None:
            self.lost += after.learn()
            after.restore()
        return sharded


class Passes:
    """Run the passes of one step.

    Args:
        parameters: of the base optimizer.
        probing: where the loss is probed.
        ranks: the processes that train together.
        progress: the counters of the training.
        modules: whose state is that of the clean pass after both.
        keep_clean_buffers: whether buffers advance as in the first pass only.
        replay_rng: whether the second pass gets the random numbers of the first.
        sync: whether several processes probe with the gradient of all; False: each with its own.
        check_finite: whether anybody looks at whether gradients are finite.

    Attributes:
        probed: whether a perturbed pass ran since the last step that counted.
        displaced: whether a perturbed pass is open, so that the weights are theta + eps.
        found_finite: whether the gradients that a scaler will look at again were looked at here,
            and are finite.
    """

    def __init__(
        self,
        parameters: NamedParameters,
        probing: Probing,
        ranks: Ranks,
        progress: Progress,
        modules: StepModules,
        *,
        keep_clean_buffers: bool,
        replay_rng: bool,
        sync: bool,
        check_finite: bool,
    ) -> None:
        self._parameters, self._ranks, self._progress = parameters, ranks, progress
        self._probing, self._modules = probing, modules
        self._keep_clean_buffers, self._replay_rng = keep_clean_buffers, replay_rng
        self._sync, self._check_finite = sync, check_finite
        self.probed = self.displaced = False
        self.found_finite = False
        self._start: ForwardState | None = None
        # Each step's passes have their own, so that those left open end nothing but themselves.
        self._open = PassRecord()

    # -- what is needed ------------------------------------------------------------------------

    @property
    def needed(self) -> bool:
        """Whether the coming step has a second pass."""
        return self._probing.displaces and not self._probing.looks_ahead

    @property
    def local_probes(self) -> bool:
        """Whether each of several processes probes with its own gradient."""
        return not self._sync and self._ranks.size > 1

    # -- the passes ----------------------------------------------------------------------------

    def run_both(self, scaler: Any, functions: Iterable[Any] = ()) -> Iterator[int]:
        """Yield once for the clean pass and, if needed, once for the perturbed pass.

        Args:
            scaler: the GradScaler of the body.
            functions: what the body calls; the modules that they name are looked after too.
        """
        check_scaler(scaler)
        self.close()
        self.forget_step()
        record, ranks = self._open, self._ranks
        modules = self._modules.all(functions)
        radii = self._probing.radii_of_groups()  # asked once per step
        ahead = self._probing.looks_ahead
        twice = self._probing.any_moves(radii) and not ahead
        others = self._parameters.parameters_not_held(modules) if twice else []
        start = self._start = self._state_of(modules, others, "start")
        replays = twice and self._replay_rng
        random = RandomState(*self._parameters.devices) if replays else None
        clear_gradients(self._parameters.base)
        quiet = ranks.no_gradient_sync(self.local_probes and twice)
        place = self._ahead(record) if ahead else AS_IT_IS
        with quiet, place, RunningPass("clean") as record.running:
            yield 0
        if self._open is not record:
            if self.needed:
                raise RuntimeError(
                    "passes: step() or other passes came between the first pass and the second; "
                    "call step() after the loop over passes()"
                )
            return
        if not twice:
            self._finish_only_pass(scaler)
            return
        after = "the first pass"
        yield from self._run_displaced(after, scaler, radii, modules, start=start, random=random)

    @contextmanager
    def _ahead(self, record: PassRecord) -> Iterator[None]:
        """Run the body, the only pass, at theta + eps: eps is known before it."""
        self.displaced = self._probing.displaces
        try:
            with torch.no_grad():
                self._move_weights(record, self._probing.find_displacement({}, None)[0])
            yield
            self.probed = self.displaced
        finally:
            if self._open is record:
                self.displaced = False
            self._put_back(record)

    def _finish_only_pass(self, scaler: Any) -> None:
        gradients = self._parameters.require_gradients("the first pass")
        self._probing.observe(gradients, scaler)
        if not self._scaler_will_step(gradients, scaler):
            self.undo_step()

    def _scaler_will_step(self, gradients: Mapping[str, Tensor], scaler: Any) -> bool:
        """Tell whether the scaler, if any, will not skip, of which it would tell nobody."""
        if scaler is None or not self._check_finite:
            return True
        finite = self._ranks.finite(gradients)
        # One that is disabled looks at nothing.
        self.found_finite = finite and getattr(scaler, "is_enabled", bool)()
        return finite

    def keep_start(self) -> ForwardState:
        """Return what a forward may write to, as it is now: before the clean pass of a step."""
        modules = self._modules.all()
        return self._state_of(modules, self._parameters.parameters_not_held(modules), "start")

    @contextmanager
    def run_perturbed(self, scaler: Any, start: ForwardState | None = None) -> Iterator[None]:
        """Run the body at theta + eps, from the gradients that are there.

        Args:
            scaler: the GradScaler of the clean backward.
            start: what :meth:`keep_start` gave before it; None: the body goes on from what it left.
        """
        check_scaler(scaler)
        self.close()
        self.forget_step()
        if self._probing.looks_ahead and start is None:  # the only pass, whose buffers stay
            record = self._open
            clear_gradients(self._parameters.base)
            with self._ahead(record), RunningPass("perturbed") as record.running:
                yield
            if self._open is record:
                self._finish_only_pass(scaler)
            return
        modules, radii = self._modules.all(), self._probing.radii_of_groups()
        after = "the clean backward"
        displaced = contextmanager(self._run_displaced)
        with displaced(after, scaler, radii, modules, start=start, random=None):
            yield

    def _run_displaced(
        self,
        after: str,
        scaler: Any,
        radii: Sequence[float],
        modules: list[nn.Module],
        start: ForwardState | None,
        random: RandomState | None,
    ) -> Iterator[int]:
        """Yield once, at theta + eps; afterwards p.grad holds the gradient to step with."""
        record = self._open
        clean = self._parameters.require_gradients(after)
        try:
            with torch.no_grad():
                eps, healthy = self._probing.find_displacement(clean, scaler, radii)
                displaces = self._probing.any_moves(radii)
                # The clean gradients are as large as the model: only who combines both keeps them.
                combines = healthy is not False and displaces and self._probing.combines
                kept = copy_gradients(clean, scaler) if combines else None
                del clean
                others = self._parameters.parameters_not_held(modules)
                if start is not None:
                    record.lost += start.learn()
                record.after = self._state_after_clean(
                    modules, others, eps, known_start=start is not None
                )
                # Gradients of parameters that are not ours would add up over the two passes.
                record.gradients = [(p, p.grad) for p in others]
                # The second pass has the loss of the first. Before the weights move: a buffer may
                # be a view of one.
                if start is not None:
                    start.restore()
                # Before the gradients are cleared: eps may be a multiple of them, and a base may
                # fill them with zeros.
                self._move_weights(record, eps)
                del eps  # as large as the model
            clear_gradients(self._parameters.base)
            for p, _ in record.gradients:
                p.grad = None
            if random is not None:
                random.restore()
            self.displaced = True
            with RunningPass("perturbed") as record.running:
                yield 1
        finally:
            if self._open is record:
                self.displaced = False
            self._put_back(record)
        if self._open is not record:
            return  # another step took over; nothing is left to clean up
        self.probed = displaces
        second = self._parameters.require_gradients("the second pass")
        if kept is not None:
            self._probing.combine(kept, second, scaler)
        if healthy is not True:
            # What follows must see it: a GradScaler looks for infinities in p.grad, step() too.
            fill_with_nan_unless(healthy, list(second.values()))
        # Without a scaler step() finds out, and restores itself.
        known = healthy is not False and self._scaler_will_step(second, scaler)
        if start is not None and not known:
            start.restore()

    # -- weights and state ---------------------------------------------------------------------

    def _move_weights(self, record: PassRecord, eps: Tensors) -> None:
        """Form theta + eps, without a graph, keeping copies of theta (algorithm 1, line 6)."""
        named = self._parameters.named
        if not eps:
            return
        moving: list[Tensor] = [named[n] for n in eps]
        whole = WHOLE.issuperset(map(type, moving))
        record.weights = copies_of(moving) if whole else [p.detach().clone() for p in moving]
        record.moved = moving
        add_displacement(moving, eps)
        if any_sharded(moving):
            reshard(self._parameters.model)

    def _state_of(
        self, modules: Iterable[nn.Module], parameters: Iterable[Tensor], moment: str
    ) -> ForwardState:
        # The modules of fully_shard swap their parameters during a forward.
        watched = () if self._ranks.sharded else parameters
        held = self._parameters.named.values()
        return ForwardState(modules, self._modules.written.values_of(watched, moment, held))

    def _state_after_clean(
        self,
        modules: list[nn.Module],
        others: list[nn.Parameter],
        eps: Tensors,
        *,
        known_start: bool,
    ) -> ForwardState:
        """Keep what the clean pass left and the second must not change.

        Without the start's state a second pass goes on from the clean one's, which counts then.
        """
        named = self._parameters.named
        whole = len(eps) == len(named)
        unmoved = [] if whole else [p for n, p in named.items() if n not in eps]
        if known_start and not self._keep_clean_buffers:
            return self._state_of((), unmoved, "after the clean pass")
        return self._state_of(modules, [*unmoved, *others], "after the clean pass")

    def _put_back(self, record: PassRecord) -> None:
        if record.put_back():
            reshard(self._parameters.model)
        if record.lost:
            self._modules.warn_of_lost(record.lost, "a second pass", self._progress)

    def close(self) -> None:
        """End the passes so far, bringing the weights back if one was left open."""
        self.displaced = False
        if self._open.running is not None:
            self._open.running.end()
        self._put_back(self._open)
        self._open = PassRecord()

    def refuse_if_displaced(self, what: str, remedy: str) -> None:
        """Raise while the weights are at theta + eps; the pass stays open."""
        if self.displaced:
            raise RuntimeError(
                f"{what}: called within a perturbed pass, where the weights are theta + eps; "
                f"{remedy}"
            )

    def undo_step(self) -> bool:
        """Put the buffers back to the start of the skipped step; tell whether that was known."""
        known = self._start is not None
        if self._start is not None:
            self._start.restore()
        self.forget_step()
        return known

    def forget_step(self) -> None:
        """Start over: nothing was probed or observed for the coming step."""
        self.probed, self.found_finite, self._start = False, False, None
        self._probing.forget()


def add_displacement(parameters: list[Tensor], eps: Tensors) -> None:
    """Add eps, in the order of the parameters."""
    if isinstance(eps, ScaledTensors) and isinstance(eps.factor, float):
        steps, factor = list(eps.tensors.values()), eps.factor
        if list(map(DTYPE, steps)) == list(map(DTYPE, parameters)):
            torch._foreach_add_(parameters, steps, alpha=factor)
            return
    pairs = zip(eps.values(), parameters, strict=True)
    torch._foreach_add_(parameters, [e if e.dtype is p.dtype else e.to(p.dtype) for e, p in pairs])


@torch.no_grad()
def fill_with_nan_unless(good: bool | Tensor, gradients: list[Tensor]) -> None:
    """Fill gradients with NaN unless a flag is true, which may be on the device."""
    if isinstance(good, Tensor):
        factor = torch.where(good, 1.0, torch.nan).to(gradients[0].dtype)
        torch._foreach_mul_(gradients, factor)
    elif not good:
        for gradient in gradients:
            gradient.fill_(torch.nan)


def check_scaler(scaler: Any) -> None:
    """Refuse what does not scale losses and tell its scale, as torch's GradScaler does."""
    if scaler is None:
        return
    wrong = isinstance(scaler, type) or not (
        hasattr(scaler, "scale") and hasattr(scaler, "get_scale")
    )
    if wrong:
        raise TypeError(f"scaler: expected a torch.amp.GradScaler or None, got {scaler!r}")
