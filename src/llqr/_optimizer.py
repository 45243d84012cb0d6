"""llqr.Optimizer: two passes and a metric around any torch.optim optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._checkpoint import Checkpoint
from ._checks import check_choice, check_flags
from ._html import html_of_numbers
from ._joined_bases import join_bases
from ._parameters import NamedParameters
from ._passes import Passes, check_scaler
from ._probing import Probing
from ._progress import Progress
from ._refresher import (
    Forward,
    HookHandle,
    Refresher,
    RefreshHook,
    as_forwards,
    call_and_unpack,
)
from ._step_modules import StepModules, refuse_meta
from ._update import Graft, Transport, Update
from ._vectors import former_names
from ._wrapper import (
    OptimizerWrapper,
    call_if_there,
    load_with_hooks,
    save_with_hooks,
    with_step_hooks,
)
from .curvature import normalised_weights, split_loss_and_outputs
from .distributed import Ranks
from .geometry import Geometry, RefreshReport
from .perturbations import Perturbation

__all__ = ["Optimizer"]

BufferPolicy = Literal["clean", "perturbed"]
if TYPE_CHECKING:  # which knows defaults of type variables; Python does since 3.13
    from typing_extensions import TypeVar as TypeVarWithDefault

    #: The type of ``optimizer.geometry``: what it was given.
    G = TypeVarWithDefault("G", bound=Geometry | None, default=Any)
else:
    G = TypeVar("G")


class Optimizer(OptimizerWrapper, Generic[G]):
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
        base: any torch.optim optimizer but LBFGS and SparseAdam, or a list of them, such as Muon
            for the matrices with AdamW for the rest. They may hold fewer parameters than the model,
            none of them twice. A list is one optimizer from then on: ``optimizer.base[0]`` is the
            first of it, and each parameter group has its number under ``"base"``.
        model: the network; its parameters' names, layers, buffers and mode are used.
        geometry: a :class:`llqr.Geometry` such as :class:`llqr.LLQR`, or None for U = I.
        perturbation: a :class:`llqr.SAM` or relative, or None for one pass.
        transport: whether the update goes through U; False keeps U for the probe alone. "bases":
            the base steps on g~ in the bases of U, as Adam does in SOAP, so its second moments
            take the place of U's eigenvalues; its state is in these coordinates, and turns with
            them at a refresh. For Adam and its relatives, with a structure that has bases (e-kfac).
        graft: rescale U g~ to the length of g~, so the base's learning rate keeps its scale. True:
            one global norm, and U moves length between layers; "layer": each parameter to its own
            norm, and U turns gradients but moves no length (layer-wise grafting, N. Agarwal et
            al., 2020).
        buffers: both passes start from the same buffers. "clean": buffers such as BatchNorm
            statistics then stay as the first pass left them; "perturbed": as the second did (the
            paper's choice).
        modules: modules outside the model that a step changes, such as a loss with a running
            centre or a teacher: their buffers are treated as the model's. Those that the forward
            of ``minimize`` or ``refresh``, or the closure, names as variables are found without it;
            ``passes`` and ``perturbed`` have no function to look at.
        replay_rng: give the second pass the random numbers of the first: torch's, Python's and
            numpy's global generators, not those that you hold yourself.
        check_finite: skip a step whose gradients are not finite, in any process, and probe nowhere
            then. False: nobody looks, which saves reads of the device, and a NaN gets into the
            weights unless a GradScaler sees it.
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

        Muon steps matrices only, so another optimizer steps the rest:

        >>> matrices = [p for p in model.parameters() if p.dim() == 2]
        >>> rest = [p for p in model.parameters() if p.dim() != 2]
        >>> bases = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.003)]
        >>> optimizer = llqr.Optimizer(bases, model, perturbation=llqr.SAM(rho=0.05))
        >>> [group["base"] for group in optimizer.param_groups]
        [0, 1]
    """

    def __init__(
        self,
        base: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        model: nn.Module,
        *,
        geometry: G = None,  # type: ignore[assignment]  # left out, G is None
        perturbation: Perturbation | None = None,
        transport: Transport = True,
        graft: Graft = False,
        buffers: BufferPolicy = "clean",
        modules: Iterable[nn.Module] = (),
        replay_rng: bool = True,
        check_finite: bool = True,
        refresh_forward: Forward | None = None,
        refresh_autocast: bool = False,
        sync: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        one_base = join_bases(base)
        check_parts(model, geometry, perturbation)
        check_choice("buffers", buffers, BufferPolicy)
        check_flags(
            replay_rng=replay_rng,
            check_finite=check_finite,
            refresh_autocast=refresh_autocast,
            sync=sync,
        )
        if refresh_forward is not None and not callable(refresh_forward):
            raise TypeError(f"refresh_forward: expected a callable, got {refresh_forward!r}")
        super().__init__(one_base)
        self.model = model
        self._geometry, self._perturbation = geometry, perturbation
        self.ranks = Ranks(model, process_group)
        self._progress = Progress()
        self._parameters = NamedParameters(one_base, model)
        step_modules = self._step_modules = StepModules(model, modules)
        self._probing = Probing(
            self._parameters, geometry, perturbation, self.ranks, self._progress, check_finite
        )
        self._passes = Passes(
            self._parameters,
            self._probing,
            self.ranks,
            self._progress,
            step_modules,
            keep_clean_buffers=buffers == "clean",
            replay_rng=replay_rng,
            sync=sync,
            check_finite=check_finite,
        )
        self._refresher = Refresher(
            geometry,
            self._parameters,
            self.ranks,
            self._progress,
            step_modules,
            default_forward=refresh_forward,
            autocast=refresh_autocast,
        )
        self._update = Update(
            self._parameters,
            geometry,
            perturbation,
            self.ranks,
            self._progress,
            self._passes,
            self._probing,
            self._refresher,
            check_finite,
        )
        self._bind_parts()
        self._update.choose(transport, graft)
        if not sync:
            self._check_local_probes()

    def _check_local_probes(self) -> None:
        geometry, perturbation = self._geometry, self._perturbation
        if self.ranks.sharded or (geometry is not None and geometry.sharded):
            raise ValueError(
                "sync: False (each process probes with its own gradient) needs whole gradients and "
                "U in every process; with fully_shard or LLQR(shard=True), leave sync=True"
            )
        if self._probing.geometry_observes or self._probing.combines:
            part = geometry if self._probing.geometry_observes else perturbation
            raise ValueError(
                f"sync: False (each process probes with its own gradient) does not go with "
                f"{type(part).__name__}, which needs the first gradient of all; leave sync=True"
            )

    @property
    def transport(self) -> Transport:
        """Whether the update goes through U; "bases": the base steps in its bases."""
        return self._update.transport

    @transport.setter
    def transport(self, transport: Transport) -> None:
        self._update.choose(transport, self.graft)

    @property
    def graft(self) -> Graft:
        """Whether, and how, U g~ is rescaled to the length of g~."""
        return self._update.graft

    @graft.setter
    def graft(self, graft: Graft) -> None:
        self._update.choose(self.transport, graft)

    @property
    def geometry(self) -> G:
        """The metric U, or None."""
        return self._geometry

    @property
    def perturbation(self) -> Perturbation | None:
        """Where the loss is probed, or None."""
        return self._perturbation

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped, since their gradients were not finite.

        A step that a GradScaler leaves out never comes here and is not counted.
        """
        return self._progress.skipped_steps

    @property
    def skipped_probes(self) -> int:
        """How many second passes ran unperturbed, since U gave g no positive norm."""
        return int(self._progress.skipped_probes)

    # -- parameters ----------------------------------------------------------------------------

    def _bind_parts(self) -> None:
        """Attach geometry and perturbation to the parameters as they are at first."""
        self._bind_geometry()
        if self._perturbation is not None:
            self._perturbation.bind(self._parameters.named)

    def _bind_geometry(self) -> None:
        if self._geometry is not None:
            self._geometry.ranks = self.ranks
            self._geometry.bind(self.model, self._parameters.named)

    def _read_groups(self) -> None:
        """Take over the parameters as they are now: what is known of a tensor stays with it."""
        before = self._parameters.named
        self._parameters.read_groups()
        try:
            self._bind_geometry()
            if self._perturbation is not None:
                self._perturbation.rebind(self._parameters.named)
        except Exception:
            self._parameters.forget()  # refused again at the next use, not ignored
            raise
        self._warn_of_replaced(before)

    def _warn_of_replaced(self, before: Mapping[str, Tensor]) -> None:
        """Say which parameters are new tensors, if something was learned of the old ones."""
        now = self._parameters.named
        kept = former_names(before, now)
        replaced = [n for n in now if n in before and n not in kept]
        parts = [part for part in (self._geometry, self._perturbation) if part is not None]
        if replaced and any(entry for part in parts for entry in part.state().values()):
            self._progress.warn_once(
                f"parameters were replaced ({', '.join(map(repr, replaced[:3]))}"
                f"{', ...' if len(replaced) > 3 else ''}): what the geometry and the perturbation "
                "learned of them starts anew"
            )

    def _follow_groups(self) -> None:
        """Take over what was changed in the base or in the model itself."""
        if self._parameters.outdated:
            self._read_groups()

    def _prepare_pass(self) -> None:
        """Make sure, before a pass or a refresh, that the parameters are those that run."""
        refuse_meta(self._parameters.named)
        self._follow_groups()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the base; their blocks of U start at the identity.

        If the base is a list, the group's ``"base"`` is the number of the optimizer it joins.
        """
        groups = len(self.base.param_groups)
        self.base.add_param_group(param_group)
        try:
            self._read_groups()
        except (TypeError, ValueError):
            del self.base.param_groups[groups:]
            self._read_groups()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the base's parameters."""
        self._passes.found_finite = False
        super().zero_grad(set_to_none)

    def train(self) -> None:
        """Move the weights to where the base trains them, if it tells the two apart.

        A schedule-free base evaluates an average of the weights it trains: call :meth:`eval` before
        an evaluation or a checkpoint of the model, and this method after it. Frameworks that call
        both of an optimizer (Accelerate, the Hugging Face Trainer) find them. For other bases
        nothing happens, nor within a perturbed pass, whose base trains.
        """
        if not self._passes.displaced:
            call_if_there(self.base, "train")

    def eval(self) -> None:
        """Move the weights to where the base evaluates them; see :meth:`train`.

        Raises:
            RuntimeError: called within a perturbed pass, whose end would bring other weights back.
        """
        self._passes.refuse_if_displaced("eval", "evaluate after the pass has ended")
        call_if_there(self.base, "eval")

    def __repr__(self) -> str:
        lines = [f"geometry: {self.geometry!r}", f"perturbation: {self.perturbation!r}"]
        if self.geometry is not None:
            lines.append(f"transport: {self.transport}, graft: {self.graft}")
        body = "".join(f"\n{line}" for line in [*lines, repr(self.base)])
        return f"{type(self).__name__} ({body}\n)"

    def _repr_html_(self) -> str:
        rows = {
            "geometry": repr(self.geometry),
            "perturbation": repr(self.perturbation),
            "transport, graft": f"{self.transport}, {self.graft}",
            # Options that are off say little.
            "base": "\n".join(
                line
                for line in repr(self.base).splitlines()
                if not line.endswith((": None", ": False"))
            ),
            "steps": f"{self._progress.step:,} ({self.skipped_steps} skipped)",
            "last refresh": self.last_report.headline() if self.last_report else "none yet",
        }
        return html_of_numbers(type(self).__name__, rows)

    # -- the step ------------------------------------------------------------------------------

    @property
    def needs_second_pass(self) -> bool:
        """Whether the next step has a second pass: its turn to be probed, and rho not 0.

        False for a perturbation that looks ahead, such as :class:`llqr.MSAM`: its only pass probes.
        """
        self._follow_groups()
        return self._passes.needed

    @with_step_hooks
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
            self._prepare_pass()
            for _ in self._passes.run_both(None, [closure]):
                with torch.enable_grad():
                    value = closure()
                loss = value if loss is None else loss
        self._update_parameters()
        return loss

    def _update_parameters(self) -> None:
        """Update the parameters from the gradients that are there."""
        self._follow_groups()
        self._update.make()

    def passes(self, scaler: Any = None) -> Iterator[int]:
        """Yield once, or twice when a perturbation is active; run forward and backward in the body.

        Before each pass the gradients are cleared; before the second the weights move to
        theta + eps, and after it they come back bit for bit, also when the body raises or breaks
        out. The second pass sees the buffers and the random numbers that the first started with;
        afterwards the buffers are those that the first left. :func:`llqr.current_pass` tells the
        body which pass it is in.

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
        check_scaler(scaler)
        self._prepare_pass()
        return self._passes.run_both(scaler)

    def perturbed(self, scaler: Any = None) -> AbstractContextManager[None]:
        """Move the weights to theta + eps for the body, from the clean gradients in p.grad.

        Gradients are cleared on entry; on exit the weights are back bit for bit and the buffers as
        on entry. The random state before the clean backward is not known here, nor are the buffers,
        so dropout draws new masks and the body starts from the buffers that the clean backward left
        (a queue of keys holds this batch's own): :meth:`passes` replays both. With a perturbation
        that looks ahead (:class:`llqr.MSAM`) no clean backward goes before: the body is the only
        pass, and the buffers stay as it leaves them.

        Args:
            scaler: the GradScaler that scaled the clean backward; gradients are divided by its
                scale, ``unscale_`` is not called.
        """
        self._prepare_pass()
        return self._passes.run_perturbed(scaler)

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
        forwards = as_forwards(forward)
        parts = normalised_weights(weights, len(forwards))
        check_scaler(scaler)
        if self.refresh_due:
            own = refresh if refresh is not None else (self.refresh_forward or forwards)
            self.refresh(own, weights=weights if own is forwards else None)
        clean: Tensor | None = None
        with torch.enable_grad():
            self._prepare_pass()
            for _ in self._passes.run_both(scaler, forwards):
                loss = self._run_backward(forwards, parts, scaler)
                clean = loss if clean is None else clean
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

    def _run_backward(
        self, forwards: Sequence[Forward], weights: Sequence[float], scaler: Any
    ) -> Tensor:
        """Add up the gradients of the weighted losses in p.grad; return the joined loss."""
        losses = []
        for i, (weight, run) in enumerate(zip(weights, forwards, strict=True), 1):
            # The last backward sends the sum.
            with self.ranks.no_gradient_sync(i < len(forwards)):
                loss, _outputs = split_loss_and_outputs(call_and_unpack(run))
                joined = loss if len(forwards) == 1 else weight * loss
                (joined if scaler is None else scaler.scale(joined)).backward()
            losses.append(joined.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    # -- refreshing ----------------------------------------------------------------------------

    @property
    def refresh_forward(self) -> Forward | None:
        """The forward of a refresh if none is given."""
        return self._refresher.default_forward

    @property
    def refresh_due(self) -> bool:
        """Whether the geometry wants a refresh before the next step."""
        return self._refresher.due

    def refresh(
        self,
        forward: Forward | Sequence[Forward] | None = None,
        *,
        weights: Sequence[float] | None = None,
    ) -> RefreshReport:
        """Refresh the geometry now, due or not.

        The model is in evaluation mode meanwhile (set without calling ``train`` or ``eval``), but
        for norms in training mode if the geometry's ``batch_norm`` is "batch". Afterwards modes,
        buffers, parameters that the forward wrote to, random state and p.grad are as before.

        Args:
            forward: as in :meth:`minimize`; default ``refresh_forward``.
            weights: how much each forward counts.

        Returns:
            The report, also kept as ``last_report`` and passed to the refresh hooks.

        Raises:
            RuntimeError: there is no geometry, or a perturbed pass is open.
            ValueError: there is no forward.
        """
        self._prepare_pass()
        self._passes.refuse_if_displaced(
            "refresh", "refresh before the passes of a step, or after them"
        )
        try:
            report = self._refresher.refresh(forward, weights)
            self._update.follow_bases()
            return report
        finally:  # also when too many refusals in a row raise
            self._refresher.call_hooks(self)

    def refresh_if_due(
        self,
        forward: Forward | Sequence[Forward] | None = None,
        *,
        weights: Sequence[float] | None = None,
    ) -> RefreshReport | None:
        """Refresh the geometry if it is due; return the report or None."""
        return self.refresh(forward, weights=weights) if self.refresh_due else None

    @property
    def last_report(self) -> RefreshReport | None:
        """The report of the last refresh, if there was one."""
        return self._refresher.last_report

    def register_refresh_hook(self, hook: RefreshHook) -> HookHandle:
        """Call ``hook(optimizer, report)`` after every refresh.

        Returns:
            A handle as of torch's own hooks, whose ``remove()`` takes the hook away again; a call
            of the handle does the same.
        """
        return self._refresher.register_hook(hook)

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return one object to checkpoint, in the standard {"state", "param_groups"} form.

        The base's state is in it, and under ``llqr.*`` keys the geometry's, the perturbation's and
        the counters. It loads with ``torch.load(weights_only=True)``.

        Raises:
            RuntimeError: called within a perturbed pass. Nothing of ours is perturbed there, but
                the model's weights are, and a checkpoint of both would hold theta + eps.
        """
        self._passes.refuse_if_displaced("state_dict", "make checkpoints after the pass has ended")
        self._follow_groups()
        self._update.follow_bases()
        return save_with_hooks(self, self._checkpoint.save)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; training goes on bitwise.

        Raises:
            ValueError: the state does not fit this geometry or perturbation; nothing is changed.
            RuntimeError: called within a perturbed pass, whose end would bring old weights back.
        """
        self._passes.refuse_if_displaced("load_state_dict", "load after the pass has ended")
        self._follow_groups()
        load_with_hooks(self, state_dict, self._checkpoint.load)

    @property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            self._parameters,
            self._geometry,
            self._perturbation,
            self.ranks,
            self._progress,
            self._refresher,
            self._update.coordinates,
            local_probes=self._passes.local_probes,
        )


def check_parts(model: Any, geometry: Any, perturbation: Any) -> None:
    """Refuse what is not a module, a geometry, a perturbation."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if geometry is not None and not isinstance(geometry, Geometry):
        raise TypeError(f"geometry: expected a llqr.Geometry or None, got {geometry!r}")
    if perturbation is not None and not isinstance(perturbation, Perturbation):
        raise TypeError(f"perturbation: expected one like llqr.SAM or None, got {perturbation!r}")
