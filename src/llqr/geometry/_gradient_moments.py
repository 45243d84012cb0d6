"""GradientMoments: U from the second moments of the gradients that training computes anyway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .._checks import check_integer, check_number
from .._vectors import Tensors
from ._closed_form_geometry import ClosedFormGeometry, ClosedFormSettings
from ._metric_settings import describe_call
from ._samples_by_part import own_samples
from .structures import StructureOf
from .structures.closed_form import Averaging
from .structures.closed_form._units import choose

__all__ = ["GradientMoments", "GradientMomentsSettings"]


@dataclass(frozen=True, kw_only=True)
class GradientMomentsSettings(ClosedFormSettings):
    """The settings of :class:`GradientMoments`, which says what each of them means."""

    renew_every: int = 10
    ema: float = 0.95
    power: float = 0.5

    def __post_init__(self) -> None:
        """Refuse values out of range, naming the argument and the value."""
        super().__post_init__()
        check_integer("renew_every", self.renew_every, low=1)
        check_number("ema", self.ema, low=0, high=1)


class GradientMoments(ClosedFormGeometry):
    r"""Precondition with a root of the gradients' second moments: Shampoo's metric, without passes.

    .. math::
        \begin{aligned}
        &\textbf{each step:}\quad L \leftarrow \beta L + (1-\beta)\, G G^\top, \quad
            R \leftarrow \beta R + (1-\beta)\, G^\top G \\
        &\textbf{every tenth:}\quad Q_B, Q_A \text{ eigenvectors of } L, R, \quad
            M = \lambda(L)\, \lambda(R)^\top / \operatorname{tr} R, \\
        &\quad U = Q\, c\,(M + \lambda)^{-1/2}\, Q^\top, \quad
            \lambda = \text{damping} \times \text{mean of } M, \quad
            c \text{ so that the mean of } U \text{ is } 1
        \end{aligned}

    G is the matrix view of a weight's clean gradient. There is nothing to refresh: no forward, no
    outputs, no pass. With ``transport="bases"`` and AdamW the update is SOAP's (N. Vyas et al.,
    ICLR 2025), with ``graft=True`` and SGD nearly Shampoo's (V. Gupta et al., ICML 2018), and in
    both a probe can take the same metric.

    Args:
        structure: "kfac", "e-kfac" (M measured in the bases), "diag-kfac", "diagonal", "dense",
            "scalar", a class or a callable, as in :class:`llqr.NaturalGradient`.
        renew_every: steps between new bases and a new U; the first step gives the first.
        ema: beta, in [0, 1). The first terms of each average weigh more.
        damping: of lambda, relative to the mean of M.
        power: 1/2 for a root.
        block_size: sides of matrices wider than this are cut into blocks; None: whole.
        shard: with several processes, each keeps and applies its shard of U. Always so with
            ``fully_shard``.

    Raises:
        ValueError: a value out of range; a structure without a closed form. The message names
            argument and value.

    Source: for the eigenvalues, D. Morwani et al., A new perspective on Shampoo's preconditioner,
    ICLR 2025.

    Example:
        >>> import torch, llqr
        >>> model = torch.nn.Linear(3, 2)
        >>> base = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> optimizer = llqr.Optimizer(
        ...     base, model, geometry=llqr.GradientMoments(), transport="bases"
        ... )
        >>> for _ in range(3):
        ...     loss = optimizer.minimize(lambda: model(torch.ones(4, 3)).square().mean())
        >>> optimizer.geometry.counters()["observed"]
        3
    """

    settings: GradientMomentsSettings

    def __init__(
        self,
        structure: StructureOf = "kfac",
        *,
        renew_every: int = 10,
        ema: float = 0.95,
        damping: float = 0.03,
        power: float = 0.5,
        block_size: int | None = 512,
        shard: bool = False,
    ) -> None:
        settings = GradientMomentsSettings(
            renew_every=renew_every,
            ema=ema,
            damping=damping,
            power=power,
            block_size=block_size,
            shard=shard,
        )
        super().__init__(structure, settings)
        self.observed = 0  # gradients
        if isinstance(structure, type) or not callable(structure):
            self.find_kind("", torch.empty(0))  # refuse now what has no closed form

    def __repr__(self) -> str:
        return describe_call("GradientMoments", self.structure, self.settings)

    def due(self, step: int) -> bool:
        """Return False: there is nothing to refresh."""
        return False

    def refreshes_in(self, steps: int) -> int:
        """Return 0: there is nothing to refresh."""
        return 0

    @torch.no_grad()
    def observe(self, gradients: Tensors) -> None:
        """Average the second moments of a step's clean gradient; renew U when it is its time."""
        if not gradients:
            return
        self._move_to_device_of(next(iter(gradients.values())))
        flat = self.layout.pack(gradients)
        averaging = self._averaging()
        missing = self.parameters.keys() - gradients.keys()
        turn = self.observed % self.settings.renew_every == 0
        states = []
        for part, state, out in zip(self.parts, self.states, self._left_out(missing), strict=True):
            g = own_samples(part, flat[None])[0]
            if averaging.keep:  # what joined late begins with its first gradient, whole
                g = part.weigh_first(state, g, (1 - averaging.keep) ** -0.5)
            new = part.follow_gradient(state, g, averaging, turn=turn)
            states.append(new if out is None else choose(out, state, new))
        self.observed += 1
        self.states = self._renew_u(states, missing) if turn else states

    def _averaging(self) -> Averaging:
        """Return the weights of the old averages, corrected for their empty start.

        With k gradients seen, the next one counts (1 - beta) / (1 - beta^(k+1)).
        """
        beta, k = self.settings.ema, self.observed
        keep = beta * (1 - beta**k) / (1 - beta ** (k + 1))
        return Averaging(keep, keep, lambda mean: mean)  # a gradient is that of all processes

    # -- checkpoints ---------------------------------------------------------------------------

    def reset(self) -> None:
        """Start anew at the identity, as before the first gradient."""
        super().reset()
        self.observed = 0

    def counters(self) -> dict[str, int]:
        """Return how many gradients were seen, beside the counts of refreshes."""
        return {**super().counters(), "observed": self.observed}

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """Take over what :meth:`counters` returned."""
        super().load_counters(counters)
        self.observed = counters.get("observed", 0)
