"""NaturalGradient: U in closed form, from the second moments of curvature samples."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .._checks import Schedule, check_choice, check_flags, check_integer, check_number
from .._vectors import Tensors, quadratic_value
from ..curvature import (
    Curvature,
    IndefiniteHessian,
    LinearLoss,
    SaturatedLoss,
    as_curvature,
    curvature_samples,
    quadratic_model,
)
from ._base import NormStatistics
from ._closed_form_geometry import ClosedFormGeometry, ClosedFormSettings
from ._metric_settings import SATURATED, Application, Learned, describe_metric
from ._samples_by_part import are_finite, are_squarable, own_samples, peak_bytes, samples_by_part
from ._schedules import EMA, EVERY_GROWING_SPARSELY
from .inner_solve import FlatModel, pack_mean
from .structures import States, Structure, StructureOf
from .structures.closed_form import Averaging
from .structures.closed_form._units import (
    choose,
)

__all__ = ["NaturalGradient", "NaturalGradientSettings"]

SecondMoment = Literal["samples", "gradients"]
INDEFINITE = (
    "the loss's second derivative in the outputs is not positive semidefinite here (the loss is "
    "not convex in them, or their curvature is lost in rounding: return the logits that the loss "
    "takes the softmax of, scaled as it takes them)"
)


@dataclass(frozen=True, kw_only=True)
class NaturalGradientSettings(ClosedFormSettings):
    """The settings of :class:`NaturalGradient`, which says what each of them means."""

    every: Schedule = EVERY_GROWING_SPARSELY
    samples: int = 8
    ema: Schedule = 0.9
    second_moment: SecondMoment = "samples"
    gradient_ema: float = 0.95
    renew_every: int = 2
    seed: int = 0
    report_J: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the argument and the value."""
        super().__post_init__()
        check_integer("samples", self.samples, low=1)
        EMA.check(self.ema)
        check_choice("second_moment", self.second_moment, SecondMoment)
        check_number("gradient_ema", self.gradient_ema, low=0, high=1)
        check_integer("renew_every", self.renew_every, low=1)
        check_integer("seed", self.seed, low=0)
        check_flags(report_J=self.report_J)


class NaturalGradient(ClosedFormGeometry):
    r"""Precondition with the damped inverse of the curvature, in a structure: no inner solve.

    .. math::
        \begin{aligned}
        &\textbf{refresh:}\quad w_k = J^\top H^{1/2} e_k, \quad k = 1 \dots m,
            \quad \mathbb E\, w w^\top = C \\
        &\quad L \leftarrow \beta L + \tfrac{1-\beta}{m} \textstyle\sum_k W_k W_k^\top, \quad
               R \leftarrow \beta R + \tfrac{1-\beta}{m} \sum_k W_k^\top W_k, \quad
               Q_B, Q_A \text{ their eigenvectors} \\
        &\quad M \leftarrow \beta M + \tfrac{1-\beta}{m} \textstyle\sum_k
               (Q_B^\top W_k Q_A)^{\circ 2} \\
        &\quad U = Q\, c\,(M + \lambda)^{-p}\, Q^\top, \quad
               \lambda = \text{damping} \times \text{mean of } M, \quad
               c \text{ so that the mean of } U \text{ is } 1
        \end{aligned}

    w are random vectors with the curvature C as their second moment
    (:func:`llqr.curvature.curvature_samples`), one backward pass each; W is the matrix view of a
    weight's part of w. For random v with :math:`\mathbb E\, v v^\top = I` in the place of the
    gradient in the paper's equation (9), where :class:`llqr.LLQR` has one gradient,

    .. math:: \mathbb E\, J(U) = -\operatorname{tr} U + \tfrac12 \operatorname{tr}(U C U)

    is least over U = Q diag(s) Q' at :math:`s_i = 1 / (Q^\top C Q)_{ii}`, which M estimates. The
    first terms of each average weigh more, so that the first refresh gives the mean of its own
    samples. Parameters that do not require a gradient, or that no sample has reached yet (of a head
    that the loss does not use), keep their U and have no part in lambda and c; those that join
    later start their averages at the next refresh. A refresh is refused, and U
    kept, if the loss has lost its curvature or its convexity, or the samples are not finite.

    The bases are those of K-FAC (J. Martens and R. Grosse, ICML 2015), as averages of samples of
    the whole curvature in place of products of activations and backpropagated derivatives, which is
    TNT's model of a layer (Y. Ren and D. Goldfarb, NeurIPS 2021); eigenvalues measured in them are
    EKFAC's (T. George et al., NeurIPS 2018).

    Args:
        structure: "e-kfac", "kfac", "diag-kfac", "diagonal", "dense", "scalar", "identity", a class
            of your own that derives from :class:`llqr.geometry.structures.ClosedForm`, or a
            callable (name, parameter) -> name. 1-D parameters are elementwise in all Kronecker
            structures. kfac has M = outer(eigenvalues of L, of R) / trace of R, dense averages
            w w', diag-kfac is kfac with identity bases.
        curvature: "fisher" (the forward must return outputs) or a :class:`llqr.Curvature` of the
            form J'HJ.
        samples: m, how many samples a refresh draws in each process; a backward pass each.
        damping: of lambda, relative to the mean of M, so that U does not depend on the scale of the
            loss. Smaller values trust the curvature more.
        power: p, in (0, 2); 1/2 gives a root, as in Adam.
        ema: beta, in [0, 1); a number or a function of the step.
        every: optimizer steps between refreshes; a number, :class:`llqr.growing` or a function of
            the step.
        second_moment: "samples", or "gradients": from the first refresh on, M follows the squares
            of the clean gradients of the steps, in the present bases (as SOAP's does), and
            refreshes renew the bases only. Not for kfac and dense.
        gradient_ema: beta of that average, in [0, 1).
        renew_every: accepted refreshes between new bases. L and R of e-kfac are averaged only then,
            those of kfac, which has its M from them, at every refresh.
        block_size: sides of matrices wider than this are cut into blocks; None: whole.
        seed: of the samples; the global random state is not used. Two refreshes, and two processes,
            draw different ones.
        start: first optimizer step before which a refresh is due.
        max_failures: refused refreshes in a row that are tolerated; one more raises. None: any
            number, and each in a row doubles the gap to the next, until one is accepted.
        shard: with several processes, each keeps and applies its shard of U, learned from the
            samples of all. Always so with ``fully_shard``.
        application: "full"; no closed form applies faster otherwise.
        batch_norm: the statistics that a refresh sees in a BatchNorm in training mode: "batch" or
            "running"; see :class:`llqr.LLQR`.
        report_J: report equation (9) at the gradient of the refresh, at the old and at the new U.
            It takes the quadratic model and two products, some five steps.

    Raises:
        ValueError: a value out of range; a structure without a closed form, or one that cannot
            follow gradients; a curvature without samples. The message names argument and value.

    Example:
        >>> import torch, llqr
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> def forward():
        ...     z = model(x)
        ...     return torch.nn.functional.cross_entropy(z, y), z
        >>> geometry = llqr.NaturalGradient("e-kfac", every=llqr.growing(5, 100))
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = llqr.Optimizer(base, model, geometry=geometry, graft=True)
        >>> _ = optimizer.minimize(forward)
        >>> optimizer.last_report.accepted, optimizer.last_report.samples
        (True, 8)
    """

    settings: NaturalGradientSettings

    def __init__(
        self,
        structure: StructureOf = "e-kfac",
        *,
        curvature: Literal["fisher"] | Curvature = "fisher",
        samples: int = 8,
        damping: float = 0.03,
        power: float = 1.0,
        ema: Schedule = 0.9,
        every: Schedule = EVERY_GROWING_SPARSELY,
        second_moment: SecondMoment = "samples",
        gradient_ema: float = 0.95,
        renew_every: int = 2,
        block_size: int | None = 512,
        seed: int = 0,
        start: int = 0,
        max_failures: int | None = None,
        shard: bool = False,
        application: Application = "full",
        batch_norm: NormStatistics = "batch",
        report_J: bool = False,
    ) -> None:
        settings = NaturalGradientSettings(
            every=every,
            start=start,
            max_failures=max_failures,
            block_size=block_size,
            shard=shard,
            application=application,
            batch_norm=batch_norm,
            samples=samples,
            damping=damping,
            power=power,
            ema=ema,
            second_moment=second_moment,
            gradient_ema=gradient_ema,
            renew_every=renew_every,
            seed=seed,
            report_J=report_J,
        )
        super().__init__(structure, settings)
        self.curvature = as_curvature(curvature)
        if not self.curvature.gauss_newton:
            raise ValueError(
                f"curvature: {self.curvature!r} is no J'HJ, so it has no samples; use 'fisher', "
                "a llqr.Divergence, or llqr.LLQR for the Hessian"
            )

        if isinstance(structure, type) or not callable(structure):
            self.find_kind("", torch.empty(0))  # refuse now what has no closed form

    def __repr__(self) -> str:
        return describe_metric("NaturalGradient", self.structure, self.curvature, self.settings)

    def find_kind(self, name: str, parameter: Tensor) -> type[Structure]:
        """Return the closed form of a parameter's structure."""
        kind = self.closed_form(name, parameter)
        if self.observes and not kind.observes_gradients:
            raise ValueError(
                f"second_moment: structure {kind.name!r} takes M from its averages, so it cannot "
                "follow 'gradients'; use 'samples', or structure 'e-kfac', 'diag-kfac', 'diagonal' "
                "or 'scalar'"
            )
        return kind

    # -- learning ------------------------------------------------------------------------------

    def learn(
        self,
        forwards: Sequence[Callable[[], Any]],
        parameters: list[Tensor],
        *,
        step: int,
        weights: Sequence[float] | None,
    ) -> Learned:
        """Average the second moments of new samples; U follows in closed form."""
        settings, names = self.settings, list(self.parameters)
        drawn, gradient, reason = self._draw_samples(forwards, parameters, weights)
        if not self.ranks.all(bool(drawn)):
            shown = SATURATED if self.ranks.all(reason != INDEFINITE) else INDEFINITE
            return Learned(None, shown, is_failure=False)
        # The random vectors of a network that is certain of every answer are zero.
        if self.ranks.all(not any(bool(w.any()) for w in drawn)):
            return Learned(None, SATURATED, is_failure=False)
        with torch.no_grad():
            g = pack_mean(gradient, self.layout, names, self.ranks)
            del gradient
            numbers: dict[str, Any] = {"samples": settings.samples * self.ranks.size}
            if not self.ranks.all(are_squarable(drawn)):
                return Learned(None, "the curvature samples are not finite", g, numbers)
            frozen = {n for n, p in zip(names, parameters, strict=True) if not p.requires_grad}
            by_name = dict(zip(names, drawn, strict=True))
            del drawn
            states = self._average_samples(by_name, self._averaging_at(step), frozen)
            states = self._renew_u(states, frozen)
            finite = are_finite(v for s in states for v in s.values())
        if not self.ranks.all(finite):
            reason = "the second moments of the curvature samples are not within the dtype of U"
            return Learned(None, reason, g, numbers)
        if settings.report_J:
            numbers |= self._measure_J(forwards, parameters, weights, states)
        return Learned(states, None, g, numbers)

    def _draw_samples(
        self,
        forwards: Sequence[Callable[[], Any]],
        parameters: list[Tensor],
        weights: Sequence[float] | None,
    ) -> tuple[list[Tensor], list[Tensor], str | None]:
        """Return the samples (m, *shape) and the gradient per parameter, or why there are none."""
        with self.ranks.together("refresh"):
            try:
                samples = curvature_samples(forwards, parameters, self.curvature, weights=weights)
                drawn = samples.draw(self.settings.samples, self._generator())
                return drawn, samples.gradient, None
            except (LinearLoss, IndefiniteHessian) as error:
                # A loss that had curvature before is not linear, and may well be convex: training
                # does not end because a network has become certain.
                if not self.history.accepted and not isinstance(error, SaturatedLoss):
                    raise
                return [], [], INDEFINITE if isinstance(error, IndefiniteHessian) else SATURATED

    def _average_samples(
        self, drawn: dict[str, Tensor], averaging: Averaging, frozen: Collection[str]
    ) -> States:
        """Return the states whose averages have seen the samples (which are used up)."""
        states, left_out = [], self._left_out(frozen)
        # Blocks that joined later have nothing to keep.
        fresh: Sequence[Tensor | None] = [None] * len(self.parts)
        if averaging.keep:
            fresh = self._without_samples(self._moments_of(self.states))
        samples = samples_by_part(self.layout, self.parts, drawn)
        for part, old, begins, out, w in zip(
            self.parts, self.states, fresh, left_out, samples, strict=True
        ):
            new = part.update_moments(old, w, averaging)
            if begins is not None and bool(begins.any()):
                new = choose(begins, part.update_moments(old, w, averaging.from_nothing()), new)
            states.append(new if out is None else choose(out, old, new))
        return states

    def _averaging_at(self, step: int) -> Averaging:
        """Return the weights of the old averages, corrected for their empty start.

        With k terms seen, the next one counts (1 - beta) / (1 - beta^(k+1)).
        """
        beta, period = EMA.value_at(self.settings.ema, step), self.settings.renew_every
        seen = self.history.accepted
        renewed = -(-seen // period)
        keep, keep_bases = (beta * (1 - beta**k) / (1 - beta ** (k + 1)) for k in (seen, renewed))
        if self.observes and seen:
            keep = 1.0  # M follows the gradients
        # A shard has the samples of all processes; else each has its own.
        mean = (lambda t: t) if self.sharded else self.ranks.mean_
        return Averaging(keep, None if seen % period else keep_bases, mean)

    def _generator(self) -> torch.Generator:
        """Return the random numbers of this refresh: they depend on seed, count and process."""
        key = self.settings.seed, self.history.refreshes, self.ranks.rank
        # torch takes 32 bits of a seed on the CPU, so all three have to be in them.
        return torch.Generator("cpu").manual_seed(zlib.crc32(repr(key).encode()))

    def _measure_J(
        self,
        forwards: Sequence[Callable[[], Any]],
        parameters: list[Tensor],
        weights: Sequence[float] | None,
        states: States,
    ) -> dict[str, Any]:
        """Return equation (9) at the old and the new U."""
        with self.ranks.together("refresh"):
            model = quadratic_model(forwards, parameters, self.curvature, weights=weights)
        with torch.no_grad():
            flat = FlatModel(model, self.layout, list(self.parameters), self.ranks)
            before, after = (
                float(quadratic_value(u, flat.gradient, flat.product(u), self.layout.space.dot))
                for u in (self.blocks.apply(s, -flat.gradient) for s in (self.states, states))
            )
        return {"J_before": before, "J_after": after, "products": model.products}

    # -- following the gradients ---------------------------------------------------------------

    @property
    def observes(self) -> bool:
        """Whether U wants to see the gradients of each step."""
        return self.settings.second_moment == "gradients"

    @torch.no_grad()
    def observe(self, gradients: Tensors) -> None:
        """Let M follow the clean gradient of a step, in the present bases."""
        if not (self.observes and self.history.accepted and gradients):
            return
        self._move_to_device_of(next(iter(gradients.values())))
        flat, beta = self.layout.pack(gradients), self.settings.gradient_ema
        # M and U of blocks without a gradient, or that no refresh has seen, stay.
        missing = self.parameters.keys() - gradients.keys()
        stays = self._kept_back(self._moments_of(self.states), missing)
        states = []
        for part, state, out in zip(self.parts, self.states, stays, strict=True):
            g = own_samples(part, flat[None])[0]
            new = part.observe_gradient(state, g, beta)
            states.append(new if out is None else choose(out, state, new))
        self.states = self._invert_moments(states, self._moments_of(states), stays)

    # -- memory --------------------------------------------------------------------------------

    def memory(self) -> dict[str, int]:
        """Return bytes in this process: of U, and of a refresh beside the graph of its forward.

        "preconditioner" is U with its averages. "refresh" is the most that a refresh holds at a
        time: ``samples`` vectors of the parameters' size, the gradient, what a part's averages take
        while they are computed, and the new U. The graph is about a training step's. A model on the
        meta device is counted as on an accelerator, where bases are turned in float64.
        """
        refresh = peak_bytes(self.layout, self.parts, self.states, self.settings.samples)
        return {**super().memory(), "refresh": refresh}
