"""NaturalGradient: U in closed form, from the second moments of curvature samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .._checks import Schedule, check_choice, check_integer, check_number
from .._devices import widen
from .._vectors import Tensors
from ..curvature import Curvature, LinearLoss, as_curvature, curvature_samples
from ._base import NormStatistics
from ._metric_settings import Application, Learned, MetricSettings
from ._schedules import EMA, growing
from ._structured import StructuredGeometry
from .structures import States, Structure, StructureOf
from .structures.closed_form import Averaging, ClosedForm, closed_form_of
from .structures.closed_form._elementwise import DiagonalMoments

__all__ = ["NaturalGradient", "NaturalGradientSettings"]

SecondMoment = Literal["samples", "gradients"]
EVERY_GROWING = growing(5, 500)
SATURATED = (
    "the loss has no curvature in its outputs (the network is certain of every answer, or the "
    "loss has become linear in `outputs`)"
)


@dataclass(frozen=True, kw_only=True)
class NaturalGradientSettings(MetricSettings):
    """The settings of :class:`NaturalGradient`, which says what each of them means."""

    samples: int = 8
    damping: float = 0.03
    power: float = 1.0
    ema: Schedule = 0.9
    second_moment: SecondMoment = "samples"
    gradient_ema: float = 0.95
    renew_every: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the argument and the value."""
        super().__post_init__()
        check_integer("samples", self.samples, low=1)
        check_number("damping", self.damping, low=0, open_low=True)
        check_number("power", self.power, low=0, high=2, open_low=True)
        EMA.check(self.ema)
        check_choice("second_moment", self.second_moment, SecondMoment)
        check_number("gradient_ema", self.gradient_ema, low=0, high=1)
        check_integer("renew_every", self.renew_every, low=1)
        check_integer("seed", self.seed, low=0)


class NaturalGradient(StructuredGeometry):
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

    It is the minimiser of the expectation of the paper's equation (9) over directions, where
    :class:`llqr.LLQR` minimises it at one gradient.
    """

    settings: NaturalGradientSettings
    vector_kind = DiagonalMoments

    def __init__(
        self,
        structure: StructureOf = "e-kfac",
        *,
        curvature: Literal["fisher"] | Curvature = "fisher",
        samples: int = 8,
        damping: float = 0.03,
        power: float = 1.0,
        ema: Schedule = 0.9,
        every: Schedule = EVERY_GROWING,
        second_moment: SecondMoment = "samples",
        gradient_ema: float = 0.95,
        renew_every: int = 2,
        block_size: int | None = 512,
        seed: int = 0,
        start: int = 0,
        max_failures: int = 3,
        shard: bool = False,
        application: Application = "full",
        batch_norm: NormStatistics = "batch",
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
        )
        super().__init__(structure, settings)
        self.curvature = as_curvature(curvature)
        if not self.curvature.gauss_newton:
            raise ValueError(
                f"curvature: {self.curvature!r} is no J'HJ, so it has no samples; use 'fisher', "
                "a llqr.Divergence, or llqr.LLQR for the Hessian"
            )

    def find_kind(self, name: str, parameter: Tensor) -> type[Structure]:
        """Return the closed form of a parameter's structure."""
        return closed_form_of(super().find_kind(name, parameter))

    @property
    def parts(self) -> list[ClosedForm]:
        """The blocks of U, group by group."""
        return cast(list[ClosedForm], self.blocks.parts)

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
        settings = self.settings
        with self.ranks.together("refresh"):
            try:
                samples = curvature_samples(forwards, parameters, self.curvature, weights=weights)
                drawn = samples.draw(settings.samples, self._generator())
                gradient = samples.gradient
            except LinearLoss:
                if not self.history.accepted:
                    raise
                drawn, gradient = [], []
        if not self.ranks.all(bool(drawn)):
            return Learned(None, SATURATED, is_failure=False)
        with torch.no_grad():
            w, g = self._pack_samples(drawn), self._pack_mean(gradient)
            del drawn, gradient
            averaging = self._averaging_at(step)
            states = [
                part.update_moments(state, self._samples_of(part, w), averaging)
                for part, state in zip(self.parts, self.states, strict=True)
            ]
            states = self._invert_moments(states)
            finite = all(bool(torch.isfinite(v).all()) for s in states for v in s.values())
        numbers = {"samples": settings.samples * self.ranks.size}
        if not self.ranks.all(finite):
            return Learned(None, "the curvature samples are not finite", g, numbers)
        return Learned(states, None, g, numbers)

    def _averaging_at(self, step: int) -> Averaging:
        """Return the weights of the old averages, corrected for their empty start.

        With k terms seen, the next one counts (1 - beta) / (1 - beta^(k+1)).
        """
        beta, period = EMA.value_at(self.settings.ema, step), self.settings.renew_every
        seen = self.history.accepted
        renewed = -(-seen // period)
        keep, keep_bases = (beta * (1 - beta**k) / (1 - beta ** (k + 1)) for k in (seen, renewed))
        # A shard has the samples of all processes; else each has its own.
        mean = (lambda t: t) if self.sharded else self.ranks.mean_
        return Averaging(keep, None if seen % period else keep_bases, mean)

    def _generator(self) -> torch.Generator:
        """Return the random numbers of this refresh: they depend on seed, count and process."""
        count, rank = self.history.refreshes, self.ranks.rank
        seed = (self.settings.seed << 48) ^ (count << 20) ^ rank
        return torch.Generator().manual_seed(seed % (1 << 63))

    def _pack_samples(self, drawn: Sequence[Tensor]) -> Tensor:
        """Return the samples flat, (m, P): of this process, or of all for its shard."""
        names, rows = list(self.parameters), []
        for i in range(self.settings.samples):
            tensors = {n: w[i] for n, w in zip(names, drawn, strict=True)}
            if self.sharded:
                joined = self.layout.pack_all_shards(tensors)
                rows.append(self.layout.shards_of_all_ranks(joined))
            else:
                rows.append(self.layout.pack(tensors)[None])
        return torch.cat(rows)

    def _pack_mean(self, gradient: Sequence[Tensor]) -> Tensor:
        joined = self.layout.pack_all_shards(dict(zip(self.parameters, gradient, strict=True)))
        return self.layout.shard_of_this_rank(self.ranks.mean_(joined))

    @staticmethod
    def _samples_of(part: ClosedForm, w: Tensor) -> Tensor:
        group = part.group
        own = w[:, group.start : group.start + group.numel].to(group.dtype)
        return own if group.shape is None else own.view(len(w), part.count, *group.shape)

    def _invert_moments(self, states: States) -> States:
        """Return the states with U = c (M + lambda)^-power."""
        settings, parts = self.settings, self.parts
        moments = [p.second_moment(s) for p, s in zip(parts, states, strict=True)]
        count = self._total_trace([torch.ones_like(m) for m in moments])
        lam = settings.damping * self._total_trace(moments) / count
        values = [(m + lam.to(m.dtype)).pow_(-settings.power) for m in moments]
        c = count / self._total_trace(values)  # the mean of U is 1
        return [
            p.set_eigenvalues(s, v.mul_(c.to(v.dtype)))
            for p, s, v in zip(parts, states, values, strict=True)
        ]

    def _total_trace(self, values: Sequence[Tensor]) -> Tensor:
        """Return the trace over all blocks of all processes, a scalar on the device."""
        traces = [widen(p.trace(v)) for p, v in zip(self.parts, values, strict=True)]
        device = self.ranks.device
        return self.layout.space.sum_over_shards(torch.stack([t.to(device) for t in traces]).sum())

    # -- following the gradients ---------------------------------------------------------------

    @property
    def observes(self) -> bool:
        """Whether U wants to see the gradients of each step."""
        return self.settings.second_moment == "gradients"

    @torch.no_grad()
    def observe(self, gradients: Tensors) -> None:
        """Let M follow the clean gradient of a step, in the present bases."""
        if not self.observes or not self.history.accepted:
            return
        flat, beta = self.layout.pack(gradients), self.settings.gradient_ema
        self.states = self._invert_moments(
            [
                part.observe_gradient(state, self._samples_of(part, flat[None])[0], beta)
                for part, state in zip(self.parts, self.states, strict=True)
            ]
        )
