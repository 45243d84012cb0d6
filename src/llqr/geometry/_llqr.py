"""LLQR: U learned from the layerwise LQR objective, with all its settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._checks import Schedule, check_choice, check_integer, check_number
from ..curvature import (
    Curvature,
    LinearLoss,
    QuadraticModel,
    SaturatedLoss,
    as_curvature,
    check_scale,
    quadratic_model,
)
from ..curvature._graphs import EDGES_KEEP_GRAPHS
from ._base import NormStatistics
from ._metric_settings import SATURATED, Application, Learned, MetricSettings, describe_metric
from ._refresh_progress import RefreshProgress
from ._schedules import EMA, EVERY_GROWING, INNER_LR
from ._structured import StructuredGeometry
from .inner_solve import (
    FlatModel,
    InnerSolver,
    Learner,
    RefreshMemory,
    SolverFactory,
    SolverName,
    SolverOptions,
    basis_capacity,
    find_solver,
)
from .inner_solve._learner import Constraint
from .structures import Structure, StructureOf

__all__ = ["LLQR", "LLQRSettings"]

Bases = Literal["learned", "gradient"]
Scale = Literal["mean", "sum"] | float


@dataclass(frozen=True, kw_only=True)
class LLQRSettings(MetricSettings):
    """The settings of :class:`LLQR`, which says what each of them means."""

    every: Schedule = EVERY_GROWING
    steps: int = 50
    lr: Literal["auto"] | Schedule = "auto"
    momentum: float = 0.9
    clip: float | None = 5.0
    ema: Schedule = 0.95
    damping: float = 0.0
    scale: Scale = "mean"
    bases: Bases = "learned"
    constraint: Constraint = "positive"
    bounds: tuple[float, float] = (1e-3, 1e3)
    tolerance: float = 1e-2
    solver: SolverName | SolverFactory = "momentum"
    renew_every: int = 5
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the argument and the value."""
        super().__post_init__()
        if isinstance(self.lr, str) and self.lr != "auto":
            raise ValueError(
                f"lr: expected 'auto', a number > 0 or a function of the step, got {self.lr!r}"
            )
        if self.lr != "auto":
            INNER_LR.check(self.lr)
        EMA.check(self.ema)
        check_integer("steps", self.steps, low=1)
        check_number("momentum", self.momentum, low=0, high=1)
        if self.clip is not None:
            check_number("clip", self.clip, low=0, open_low=True)
        check_number("damping", self.damping, low=0)
        check_scale(self.scale)
        check_choice("bases", self.bases, Bases)
        check_choice("constraint", self.constraint, Constraint)
        _check_bounds(self.bounds)
        _check_tolerance(self.tolerance)
        find_solver(self.solver)
        check_integer("renew_every", self.renew_every, low=1)
        if self.micro_batch is not None:
            check_integer("micro_batch", self.micro_batch, low=1)

    @property
    def inner_solver(self) -> InnerSolver:
        """The method of the inner solve."""
        return find_solver(self.solver)

    def learner_at(self, step: int) -> Learner:
        """Return how U is learned at an optimizer step."""
        lr = math.nan if self.lr == "auto" else INNER_LR.value_at(self.lr, step)
        options = SolverOptions(self.steps, lr, self.momentum, self.clip)
        return Learner(
            self.inner_solver,
            options,
            damping=self.damping,
            tolerance=self.tolerance,
            constraint=self.constraint,
            bounds=self.bounds,
            ema=EMA.value_at(self.ema, step),
            own_units=self.lr == "auto",
        )


class LLQR(StructuredGeometry):
    r"""Learn a structured inverse preconditioner U from the layerwise LQR objective.

    .. math::
        \begin{aligned}
        &\textbf{refresh, every } n \textbf{ steps, on one minibatch:} \\
        &\quad g \leftarrow \nabla L(\theta), \quad C \leftarrow \text{curvature of } L \\
        &\quad J(U) = g^\top u + \tfrac12 u^\top C u + \tfrac12 \lambda |u|^2, \qquad u = -U g \\
        &\quad U_T \leftarrow T \text{ steps of momentum on } J \text{ from the current } U \\
        &\quad U \leftarrow \beta U + (1 - \beta)\, U_T, \quad
              u_{\min} I \preceq U \preceq u_{\max} I
        \end{aligned}

    U is block diagonal, one block a layer (the parameters one module owns); C is the full
    curvature with all terms across layers. Defaults are for users; :meth:`paper` gives the
    paper's settings (paper, equation 9, algorithm 2 and appendix C).

    Args:
        structure: "diagonal", "kfac", "e-kfac", "diag-kfac", "dense", "scalar", "identity", a
            :class:`llqr.geometry.structures.Structure` class of your own, or a callable
            (name, parameter) -> name. 1-D parameters are elementwise in all Kronecker structures.
        curvature: "fisher" (the paper's NGD; the forward must return outputs), "newton", or a
            :class:`llqr.Curvature`.
        every: optimizer steps between refreshes; a number, :class:`llqr.growing` or a function of
            the step.
        steps: inner steps T.
        lr: inner learning rate; "auto", a number or a function of the step. "auto" learns from J in
            units of its own, so that U is the same for the loss times 1,000, another ``scale`` or
            another batch size, and U = I is the best of all multiples of I; its rate is a fixed
            part of the step that minimises J along its gradient in U, and is lowered until J goes
            down.
        momentum: inner momentum, in [0, 1).
        clip: the inner gradient of each entry of each block (of each factor of kfac) is clipped to
            this norm (with ``lr="auto"``, in J's own units); None: not clipped.
        ema: beta, in [0, 1); a number or a function of the step. It averages the factors, which
            is not the average of the operators.
        damping: lambda, added to C.
        scale: factor on C: "mean" (1), "sum" (the number of output rows), or a number.
        bases: of e-kfac: "learned" with the eigenvalues, or "gradient": eigenvectors of running
            averages of X X' and X'X of the refresh gradients, renewed every ``renew_every``
            refreshes.
        constraint: "positive" keeps U within ``bounds``; "none" is the authors' arithmetic, in
            which U may become indefinite; "square" (only e-kfac) their psd-e-kfac.
        bounds: (u_min, u_max), eigenvalues of U under "positive".
        block_size: sides of matrices wider than this are cut into blocks; None: whole.
        tolerance: reuse earlier products when the estimated relative error in g + C u is below
            this (not below rounding: 32 eps C u); 0 computes every product.
        solver: "momentum", "sgd", "adam", "lbfgs" (then at most ``steps`` evaluations), or a
            function (tensors, options) -> torch optimizer, with ``options.lr`` and ``.momentum``.
        start: first optimizer step before which a refresh is due.
        max_failures: refused refreshes in a row that are tolerated; one more raises. None: any
            number, and each in a row doubles the gap to the next, up to 500 steps (``last`` of a
            growing gap), until one is accepted.
        renew_every: accepted refreshes between new bases (``bases="gradient"``).
        shard: with several processes, each keeps and applies its shard of U, so that memory falls
            by their number and a gather comes with each application. Always so with
            ``fully_shard``.
        micro_batch: of several forwards, how many keep their graph at a time; None: all.
        application: "full", or "bfloat16": a step multiplies by kfac's factors in bfloat16, which
            is faster if the processor has instructions for it. What it rounds is U g - g, to
            some three parts in a thousand, never g itself; the solve and checkpoints stay in full.
            It holds a copy of the factors at half the size. Or "low-rank": a step multiplies by
            I + L R' in place of the factors of kfac and the learned bases of e-kfac, as long as
            they are so near the identity that this is faster and within 1e-3 |U| |g| of U g
            (measured after each refresh). U stays positive definite, and whole in checkpoints.
        batch_norm: the statistics that a refresh sees in a BatchNorm in training mode: "batch",
            those of its minibatch, so that U is learned on the function that is trained; or
            "running", those of evaluation mode (the authors' choice). One that was frozen with
            ``eval()`` uses its running statistics in both cases.

    Raises:
        ValueError: a value out of range; the message names argument and value.

    Example:
        >>> import torch, llqr
        >>> model = torch.nn.Linear(3, 2)
        >>> geometry = llqr.LLQR("kfac", every=100)
        >>> geometry.bind(model)
        >>> geometry.numel()  # 3 x 3, 2 x 2, and the bias
        15
        >>> geometry.spectrum()
        {'': (1.0, 1.0)}
    """

    settings: LLQRSettings

    def __init__(
        self,
        structure: StructureOf = "diagonal",
        *,
        curvature: Literal["fisher", "newton"] | Curvature = "fisher",
        every: Schedule = EVERY_GROWING,
        steps: int = 50,
        lr: Literal["auto"] | Schedule = "auto",
        momentum: float = 0.9,
        clip: float | None = 5.0,
        ema: Schedule = 0.95,
        damping: float = 0.0,
        scale: Scale = "mean",
        bases: Bases = "learned",
        constraint: Constraint = "positive",
        bounds: tuple[float, float] = (1e-3, 1e3),
        block_size: int | None = 512,
        tolerance: float = 1e-2,
        solver: SolverName | SolverFactory = "momentum",
        start: int = 0,
        max_failures: int | None = None,
        renew_every: int = 5,
        shard: bool = False,
        micro_batch: int | None = None,
        application: Application = "full",
        batch_norm: NormStatistics = "batch",
    ) -> None:
        settings = LLQRSettings(
            every=every,
            start=start,
            max_failures=max_failures,
            block_size=block_size,
            shard=shard,
            application=application,
            batch_norm=batch_norm,
            steps=steps,
            lr=lr,
            momentum=momentum,
            clip=clip,
            ema=ema,
            damping=damping,
            scale=scale,
            bases=bases,
            constraint=constraint,
            bounds=tuple(bounds) if isinstance(bounds, list) else bounds,
            tolerance=tolerance,
            solver=solver,
            renew_every=renew_every,
            micro_batch=micro_batch,
        )
        super().__init__(structure, settings)
        self.curvature = as_curvature(curvature)

    @classmethod
    def paper(
        cls,
        structure: StructureOf = "e-kfac",
        curvature: Literal["fisher", "newton"] | Curvature = "fisher",
        **changes: Any,
    ) -> LLQR:
        """Return the paper's settings: lr 1e-3, no bounds, no splitting, all products computed.

        A refresh sees BatchNorm's running statistics, as in the authors' code.
        Fisher is summed over the batch with EMA 0.95; Newton is the Hessian of the mean loss with
        EMA 0.9 (paper, appendix C). ``changes`` replace single settings.
        """
        # The authors' code sums the Fisher over the batch, and takes the mean loss for Newton.
        gauss_newton = as_curvature(curvature).gauss_newton
        settings: dict[str, Any] = {
            "every": 500,
            "lr": 1e-3,
            "ema": 0.95 if gauss_newton else 0.9,
            "scale": "sum" if gauss_newton else "mean",
            "constraint": "none",
            "block_size": None,
            "tolerance": 0,
            "batch_norm": "running",
        }
        return cls(structure, curvature=curvature, **{**settings, **changes})

    def __repr__(self) -> str:
        return describe_metric("LLQR", self.structure, self.curvature, self.settings)

    def bind(self, model: nn.Module, parameters: Any = None) -> None:
        """Lay out the parameters in blocks; new ones start at the identity."""
        super().bind(model, parameters)
        if self.sharded and self.settings.inner_solver.evaluates_within_step:
            raise ValueError(
                f"solver: {self.settings.solver!r} needs all of U in one process, but U is sharded"
            )

    def find_kind(self, name: str, parameter: Tensor) -> type[Structure]:
        """Return the structure of a parameter, in the variant of ``bases`` and ``constraint``."""
        kind = super().find_kind(name, parameter)
        return kind.variant(bases=self.settings.bases, constraint=self.settings.constraint)

    # -- learning ------------------------------------------------------------------------------

    def learn(
        self,
        forwards: Sequence[Callable[[], Any]],
        parameters: list[Tensor],
        *,
        step: int,
        weights: Sequence[float] | None,
    ) -> Learned:
        """Minimise J from the current U, average, and judge J at what would be stored."""
        settings, accepted = self.settings, self.history.accepted
        # Algorithm 2, lines 5 and 6: g and C on one minibatch. If one process fails, all raise.
        with self.ranks.together("refresh"):
            model = self._expand_loss(forwards, parameters, weights)
        if not self.ranks.all(model is not None) or model is None:
            # No setting helps there, so this is not counted towards max_failures.
            return Learned(None, SATURATED, numbers={"products": 0}, is_failure=False)
        if settings.scale == "sum":  # over the joined batch
            model.scale = self.ranks.sum(model.scale)
        # Lines 7 to 11: T inner steps on J, then the average.
        with torch.no_grad():
            progress = RefreshProgress(self.on_progress, settings.steps + 2)
            names = list(self.parameters)
            flat = FlatModel(model, self.layout, names, self.ranks, progress.advance)
            outcome = settings.learner_at(step).learn(
                flat,
                self.blocks,
                self.states,
                first=accepted == 0,
                renew=accepted % settings.renew_every == 0,
            )
        numbers = {
            "J_before": outcome.J_before,
            "J_after": outcome.J_after,
            "products": model.products,
        }
        return Learned(outcome.states, outcome.reason, flat.gradient, numbers)

    def _expand_loss(
        self,
        forwards: Sequence[Callable[[], Any]],
        parameters: list[Tensor],
        weights: Sequence[float] | None,
    ) -> QuadraticModel | None:
        """Return the quadratic model, or None if the loss has lost its curvature."""
        try:
            return quadratic_model(
                forwards,
                parameters,
                self.curvature,
                scale=self.settings.scale,
                weights=weights,
                micro_batch=self.settings.micro_batch,
            )
        except SaturatedLoss:
            return None
        except LinearLoss:
            # A loss that had curvature before is not linear.
            if self.history.accepted:
                return None
            raise

    def advise_on_failures(self, step: int) -> str:
        """Return what helps when refreshes are refused again and again."""
        lr = self.settings.lr
        slower = (
            "Fewer inner steps"
            if lr == "auto"
            else f"A smaller inner lr (now {INNER_LR.value_at(lr, step)})"
        )
        return (
            f"{slower}, a larger refresh batch or more damping helps; "
            "max_failures sets how many are tolerated"
        )

    def advise_on_inaction(self) -> str:
        """Return what lets U act."""
        lr = "" if self.settings.lr == "auto" else "a larger inner lr (or lr='auto'), "
        return f"{lr}a smaller ema or more frequent refreshes (every) let it act"

    def explain_indefinite_U(self) -> str:
        """Return the setting that lets U become indefinite."""
        constraint = self.settings.constraint
        return f" (constraint={constraint!r}; 'positive' keeps U positive definite)"

    # -- memory --------------------------------------------------------------------------------

    def memory(self, products: int | None = None) -> dict[str, int]:
        """Return bytes in this process: of U, of a refresh, of the directions that it keeps.

        "preconditioner" is U. "refresh" is the most that a refresh holds at a time beside U and the
        graph of its forward; "basis" the part of it that grows with the products used, and
        "directions" how many pairs of direction and product it is for. The graph takes more than a
        training step's, as a refresh goes through it twice (``micro_batch`` bounds it).

        It is counted by running the solve where tensors have no memory, so a model on the meta
        device will do, of any size.

        Args:
            products: how many a refresh uses; by default the most it keeps.
        """
        held, counted = super().memory(), self._refresh_memory()
        directions = counted.directions
        if products is not None:  # that of J at the new U comes when those of the solve are gone
            directions = min(max(1, products - 1), directions)
        return {
            **held,
            "refresh": max(counted.peak(directions), self._judgement_bytes()),
            "basis": counted.pairs(directions),
            "directions": directions,
        }

    def _refresh_memory(self) -> RefreshMemory:
        """Return what counts the bytes of a refresh."""
        settings = self.settings
        cut = any(len(self.layout.slices_of(name)) > 1 for name in self.parameters)
        return RefreshMemory(
            blocks=self.blocks,
            solver=settings.inner_solver,
            options=settings.learner_at(0).options,
            tolerance=settings.tolerance,
            own_units=settings.lr == "auto",
            projects=settings.constraint == "positive",
            # C d as tensors and flat, and d as tensors if they are put together.
            product=(2 + cut) * self.layout.numel * self.layout.dtype.itemsize,
            capacity=basis_capacity(self.layout, settings.steps, settings.lr == "auto"),
            graph_keeps=(0 if EDGES_KEEP_GRAPHS else 2) if self.curvature.gauss_newton else 1,
        )


def _check_bounds(bounds: Any) -> None:
    pair = isinstance(bounds, tuple) and len(bounds) == 2
    pair = pair and all(isinstance(b, (int, float)) for b in bounds)
    if not (pair and 0 < bounds[0] <= 1 <= bounds[1] < math.inf and bounds[0] < bounds[1]):
        raise ValueError(
            "bounds: expected (u_min, u_max) with 0 < u_min <= 1 <= u_max (U starts at the "
            f"identity), got {bounds!r}"
        )


def _check_tolerance(tolerance: Any) -> None:
    if not isinstance(tolerance, (int, float)) or not (tolerance == 0 or 1e-8 <= tolerance < 1):
        raise ValueError(
            "tolerance: expected 0 (every product is computed) or a number in [1e-8, 1), "
            f"got {tolerance!r}"
        )
