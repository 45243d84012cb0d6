"""llqr.Optimizer: two passes and a metric around any torch.optim optimizer."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._checkpoint import load_state_dict, state_dict
from ._checks import check_choice, check_flags
from ._module_state import without_autocast
from ._parameters import NamedParameters, rescaled, widened
from ._passes import Passes, check_scaler
from ._perturbations import Perturbation
from ._refreshing import Forward, RefreshHook, Refreshing, as_list
from .curvature import normalised_weights, split_loss_and_outputs
from .distributed import Ranks
from .distributed._sharded import local
from .geometry import Geometry, RefreshReport

__all__ = ["Optimizer"]

log = logging.getLogger("llqr")


class Optimizer(Refreshing):
    r"""Wrap a torch.optim optimizer with a learned metric and a sharpness-aware second pass.

    .. math::
        \begin{aligned}
        &g \leftarrow \nabla L(\theta), \qquad
         \epsilon \leftarrow \text{perturbation}(g; U, \rho), \qquad
         \tilde g \leftarrow \nabla L(\theta + \epsilon) \\
        &\theta \text{ restored}, \qquad \texttt{p.grad} \leftarrow U \tilde g, \qquad
         \texttt{base.step()}
        \end{aligned}

    Without a perturbation there is one pass and ``p.grad`` becomes U g; without a geometry U = I;
    without both this is the base optimizer (paper, algorithm 1). Four ways in: :meth:`minimize`,
    :meth:`step` with a closure, :meth:`passes`, :meth:`perturbed`.

    ``param_groups`` and ``state`` are those of the base, so schedulers, GradScaler and hooks work
    as on any optimizer. After :meth:`step`, ``p.grad`` is what the backward pass computed. A step
    whose gradients are not finite is skipped and counts nowhere.

    Args:
        base: any torch.optim optimizer but LBFGS and SparseAdam. It may hold fewer parameters
            than the model.
        model: the network; its parameters' names, layers, buffers and mode are used.
        geometry: a :class:`llqr.Geometry` such as :class:`llqr.LLQR`, or None for U = I.
        perturbation: a :class:`llqr.SAM` or relative, or None for one pass.
        transport: whether the update goes through U; False keeps U for the probe alone.
        graft: rescale U g~ to the length of g~ (one global norm), so the base's learning rate
            keeps its scale.
        buffers: "clean": buffers such as BatchNorm statistics advance as in the first pass alone;
            "perturbed": as in the second (the paper's choice).
        replay_rng: give the second pass the random numbers of the first.
        refresh_forward: a function that returns (loss, outputs) on a refresh minibatch, used when
            a refresh is due and none was handed over; ``step(closure)`` needs it.
        refresh_autocast: leave autocast as the forward has it during a refresh; by default it is
            off there, with a warning once, since products in bfloat16 are wrong in the third digit.
        sync: with DistributedDataParallel, probe with the gradient of all processes; False: each
            process with its own (m-sharpness), which saves the first pass's communication.
        process_group: the processes that train this model together; default: those of its
            DistributedDataParallel wrapper, else all if torch.distributed is initialised.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a parameter of the base is not in the model, or is sparse or complex; an option
            of the base that is not supported.

    Example:
        >>> import torch, llqr
        >>> nn = torch.nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> optimizer = llqr.Optimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        ...     model,
        ...     geometry=llqr.LLQR("kfac", every=10),
        ...     perturbation=llqr.SAM(rho=0.05),
        ... )
        >>> def forward():
        ...     z = model(x)
        ...     return nn.functional.cross_entropy(z, y), z
        >>> losses = [float(optimizer.minimize(forward)) for _ in range(20)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        model: nn.Module,
        *,
        geometry: Geometry | None = None,
        perturbation: Perturbation | None = None,
        transport: bool = True,
        graft: bool = False,
        buffers: str = "clean",
        replay_rng: bool = True,
        refresh_forward: Forward | None = None,
        refresh_autocast: bool = False,
        sync: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_parts(base, model, geometry, perturbation)
        check_choice("buffers", buffers, ("clean", "perturbed"))
        check_flags(
            transport=transport,
            graft=graft,
            replay_rng=replay_rng,
            refresh_autocast=refresh_autocast,
            sync=sync,
        )
        if refresh_forward is not None and not callable(refresh_forward):
            raise TypeError(f"refresh_forward: expected a callable, got {refresh_forward!r}")
        super().__init__(base)
        self.model = model
        self.geometry, self.perturbation = geometry, perturbation
        self.transport, self.graft = transport, graft
        self.refresh_forward, self.refresh_autocast = refresh_forward, refresh_autocast
        # Lightning and Fabric wrap an optimizer in objects of a class derived from its own, that
        # read its attributes but keep what is assigned: hence no assignment outside of step().
        self._reports: list[RefreshReport] = []
        self.skipped_steps = self.skipped_probes = 0
        self._step = 0
        self._refresh_hooks: OrderedDict[int, RefreshHook] = OrderedDict()
        self._warned: set[str] = set()
        self.ranks, self.sync = Ranks(model, process_group), sync
        self._named = NamedParameters(base, model)
        self._bind()
        if not sync and (self.ranks.sharded or (geometry is not None and geometry.shared)):
            raise ValueError(
                "sync: False (each process probes with its own gradient) needs whole gradients and "
                "U in every process; with fully_shard or LLQR(shard=True), leave sync=True"
            )
        self._passes = Passes(self, buffers, replay_rng)

    @property
    def _parameters(self) -> NamedParameters:
        if self._named.outdated:  # a group was added to the base itself
            self._take_groups()
        return self._named

    def _take_groups(self) -> None:
        self._named.read()
        self._bind()

    def _bind(self) -> None:
        named = self._named.named
        if self.geometry is not None:
            self.geometry.ranks = self.ranks
            self.geometry.bind(self.model, named)
        if self.perturbation is not None:
            self.perturbation.bind(named)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the base; their blocks of U start at the identity."""
        groups = len(self.base.param_groups)
        self.base.add_param_group(param_group)
        try:
            self._take_groups()
        except (TypeError, ValueError):
            del self.base.param_groups[groups:]
            self._take_groups()
            raise

    def __repr__(self) -> str:
        lines = [f"geometry: {self.geometry!r}", f"perturbation: {self.perturbation!r}"]
        if self.geometry is not None:
            lines.append(f"transport: {self.transport}, graft: {self.graft}")
        body = "".join(f"\n{line}" for line in [*lines, repr(self.base)])
        return f"{type(self).__name__} ({body}\n)"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_refresh_hooks": OrderedDict()}

    # -- the step ------------------------------------------------------------------------------

    @property
    def local_probes(self) -> bool:
        """Whether each of several processes probes with its own gradient (``sync=False``)."""
        return not self.sync and self.ranks.size > 1

    @property
    def needs_second_pass(self) -> bool:
        """Whether the next step probes: a perturbation, its start reached, rho not 0."""
        return self._passes.needed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters: p.grad -> U p.grad -> base.step().

        Args:
            closure: clears the gradients, runs a backward pass and returns the loss, as torch
                defines it; run once or, with a perturbation, twice. Without it the gradients are
                taken from ``p.grad``.

        Returns:
            The loss of the first run of the closure, else None.
        """
        loss = None
        if closure is not None:
            if self.refresh_due and self.refresh_forward is not None:
                self.refresh(self.refresh_forward)
            for _ in self._passes.run(None):
                with torch.enable_grad():
                    value = closure()
                loss = value if loss is None else loss
        self._advance()
        return loss

    def _advance(self) -> None:
        """Update the parameters from the gradients that are there."""
        self._passes.close()
        gradients = self._parameters.gradients()
        if not gradients or self._idle(gradients):
            self.base.step()
            return
        if not self.ranks.finite(gradients, equal=True):
            self._skip()
            return
        self._warn_of_omissions()
        if not self._update(gradients):
            self._skip()
            return
        if self.perturbation is not None:
            if not self._passes.observed:  # one pass of the user's own, without passes()
                self.perturbation.observe(widened(gradients))
            self.perturbation.commit()
        self._passes.forget()
        self._step += 1

    def _idle(self, gradients: Mapping[str, Tensor]) -> bool:
        """Tell a step that changes nothing; torch.distributed.checkpoint makes such steps."""
        if any(bool(group.get("lr", 1.0) != 0) for group in self.param_groups):
            return False
        return self.ranks.all(not any(bool(local(g).any()) for g in gradients.values()))

    def _update(self, gradients: dict[str, Tensor]) -> bool:
        """Hand U g to the base, unless it is not finite."""
        if self.geometry is None or not self.transport:
            self.base.step()
            return True
        with without_autocast(self._parameters.device):  # a step may be taken within the caller's
            moved = self.geometry.apply(gradients)
            if self.graft:
                moved = rescaled(moved, gradients)
        coarse = any(g.dtype.itemsize < 4 for g in moved.values())
        if coarse and not self.ranks.finite(moved):  # U may take float16 out of its range
            return False
        named = self._parameters.named
        try:
            for name, value in moved.items():
                named[name].grad = value
            self.base.step()
        finally:
            for name, gradient in gradients.items():
                named[name].grad = gradient
        return True

    def _skip(self) -> None:
        self.skipped_steps += 1
        kept = (
            "weights, buffers and counters are as before it"
            if self._passes.undo()
            else "weights and counters are as before it, buffers as the backward pass left them"
        )
        self._warn_once(
            f"a step was skipped because its gradients are not finite; {kept} "
            "(optimizer.skipped_steps counts)"
        )

    def _warn_of_omissions(self) -> None:
        if self.needs_second_pass and not self._passes.probed:
            self._warn_once(
                "step() ran without a perturbed pass although a perturbation is set: use "
                "minimize, step(closure), passes or perturbed"
            )
        if self.refresh_due:
            self._warn_once(
                "step() ran although a refresh of the geometry is due, so U is not learned: call "
                "optimizer.refresh_if_due(forward) before it, use minimize, or pass "
                "refresh_forward to llqr.Optimizer"
            )

    def passes(self, scaler: Any = None) -> Iterator[int]:
        """Yield once, or twice when a perturbation is active; run forward and backward in the body.

        Before each pass the gradients are cleared; before the second the weights move to
        theta + eps, and after it they come back bit for bit, also when the body raises or breaks
        out. The second pass sees the random numbers of the first and leaves no trace in buffers.

        Args:
            scaler: the GradScaler that the body scales the loss with.

        Example:
            >>> import torch, llqr
            >>> model = torch.nn.Linear(2, 1)
            >>> base = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> optimizer = llqr.Optimizer(base, model, perturbation=llqr.SAM())
            >>> for _ in optimizer.passes():
            ...     model(torch.ones(3, 2)).square().mean().backward()
            >>> optimizer.step()
        """
        return self._passes.run(scaler)

    def perturbed(self, scaler: Any = None) -> AbstractContextManager[None]:
        """Move the weights to theta + eps for the body, from the clean gradients in p.grad.

        Gradients are cleared on entry; on exit the weights are back bit for bit and the buffers as
        on entry. The random state before the clean backward is not known here, so dropout draws
        new masks: :meth:`passes` replays them.

        Args:
            scaler: the GradScaler that scaled the clean backward; gradients are divided by its
                scale, ``unscale_`` is not called.
        """
        return self._passes.perturbed(scaler)

    def minimize(
        self,
        forward: Forward | Sequence[Forward],
        *,
        refresh: Forward | Sequence[Forward] | None = None,
        weights: Sequence[float] | None = None,
        scaler: Any = None,
        before_step: Callable[[], Any] | None = None,
    ) -> Tensor:
        """Do a whole step: refresh when due, two passes, update.

        Args:
            forward: returns the loss, or (loss, outputs); or a list of such functions, one a
                micro-batch, for the step of the joined batch (plain mean of the losses).
            refresh: forwards on their own minibatch for a refresh; default the same as forward.
            weights: how much each micro-batch counts; equal by default.
            scaler: a torch.amp.GradScaler; scaling, unscaling and its update are done here.
            before_step: called when p.grad holds g~ (unscaled), before U: for clipping.

        Returns:
            The clean loss (of the first pass), a detached scalar.
        """
        forwards = as_list(forward)
        shares = normalised_weights(weights, len(forwards))
        check_scaler(scaler)
        if self.refresh_due:
            own = refresh if refresh is not None else (self.refresh_forward or forwards)
            self.refresh(own, weights=weights if own is forwards else None)
        clean: Tensor | None = None
        with torch.enable_grad():
            for _ in self._passes.run(scaler):
                losses = []
                for i, (share, run) in enumerate(zip(shares, forwards, strict=True), 1):
                    with self.ranks.quiet(i < len(forwards)):  # the last backward sends the sum
                        loss, _outputs = split_loss_and_outputs(run())
                        joined = loss if len(forwards) == 1 else share * loss
                        (joined if scaler is None else scaler.scale(joined)).backward()
                    losses.append(joined.detach())
                if clean is None:
                    clean = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        if scaler is None:
            if before_step is not None:
                before_step()
            self.step()
        else:
            scaler.unscale_(self)
            if before_step is not None:
                before_step()
            scaler.step(self)
            scaler.update()
        assert clean is not None
        return clean

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return one object to checkpoint, in the standard {"state", "param_groups"} form.

        The base's state is in it, and under ``llqr.*`` keys the geometry's, the perturbation's and
        the counters. It loads with ``torch.load(weights_only=True)``.

        Raises:
            RuntimeError: called within a perturbed pass. Nothing of ours is perturbed there, but
                the model's weights are, and a checkpoint of both would hold theta + eps.
        """
        self._passes.refuse("state_dict", "make checkpoints after the pass has ended")
        return state_dict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; training goes on bitwise.

        Raises:
            ValueError: the state does not fit this geometry or perturbation; nothing is changed.
            RuntimeError: called within a perturbed pass, whose end would bring old weights back.
        """
        self._passes.refuse("load_state_dict", "load after the pass has ended")
        load_state_dict(self, state_dict)


def check_parts(base: Any, model: Any, geometry: Any, perturbation: Any) -> None:
    """Refuse what is not an optimizer, a module, a geometry, a perturbation."""
    if not isinstance(base, torch.optim.Optimizer) or isinstance(base, Optimizer):
        raise TypeError(f"base: expected a torch.optim optimizer, got {type(base).__name__}")
    if isinstance(base, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        raise TypeError(f"base: {type(base).__name__} is not supported")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if geometry is not None and not isinstance(geometry, Geometry):
        raise TypeError(f"geometry: expected a llqr.Geometry or None, got {geometry!r}")
    if perturbation is not None and not isinstance(perturbation, Perturbation):
        raise TypeError(f"perturbation: expected one like llqr.SAM or None, got {perturbation!r}")
