"""The first-order methods of the inner solve, and how a setting becomes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "SOLVERS",
    "InnerSolver",
    "SolverFactory",
    "SolverName",
    "SolverOptions",
    "find_solver",
]

SolverName = Literal["momentum", "sgd", "adam", "lbfgs"]


@dataclass(frozen=True)
class SolverOptions:
    """How the inner problem is solved (see :class:`llqr.LLQR`).

    Attributes:
        steps: T.
        lr: inner learning rate.
        momentum: inner momentum.
        clip: norm that the gradient of each entry of each block is clipped to; None: not clipped.
    """

    steps: int
    lr: float
    momentum: float
    clip: float | None


#: (tensors to change, options) -> an optimizer whose ``step(closure)`` changes them.
SolverFactory = Callable[[list[Tensor], SolverOptions], torch.optim.Optimizer]


@dataclass(frozen=True)
class InnerSolver:
    """A method of the inner solve.

    Attributes:
        make: builds the optimizer of the literal loop.
        keeps_momentum: whether ``options.momentum`` plays a part.
        heavy_ball: whether a step is v <- momentum v + g, s <- s - lr v. Its steps are linear in
            the clipped gradients, so that the solve can run on coefficients and in buffers.
        evaluates_within_step: whether one ``step(closure)`` makes all evaluations.
    """

    make: SolverFactory
    keeps_momentum: bool = False
    heavy_ball: bool = False
    evaluates_within_step: bool = False

    def momentum_of(self, options: SolverOptions) -> float:
        """Return the momentum of a heavy-ball step."""
        return options.momentum if self.keeps_momentum else 0.0


SOLVERS: dict[str, InnerSolver] = {
    # The paper's: SGD with momentum .9, which starts at zero at every refresh.
    "momentum": InnerSolver(
        lambda s, o: torch.optim.SGD(s, lr=o.lr, momentum=o.momentum),
        keeps_momentum=True,
        heavy_ball=True,
    ),
    "sgd": InnerSolver(lambda s, o: torch.optim.SGD(s, lr=o.lr), heavy_ball=True),
    "adam": InnerSolver(lambda s, o: torch.optim.Adam(s, lr=o.lr)),
    # One call makes at most `steps` evaluations; lr plays no part in a line search.
    "lbfgs": InnerSolver(
        lambda s, o: torch.optim.LBFGS(
            s, max_iter=o.steps, max_eval=o.steps, history_size=10, line_search_fn="strong_wolfe"
        ),
        evaluates_within_step=True,
    ),
}
assert set(SOLVERS) == set(get_args(SolverName))


def find_solver(solver: Any) -> InnerSolver:
    """Return the solver of a name, or of a function that builds a torch optimizer.

    Raises:
        ValueError: the name is not known.
    """
    if callable(solver):  # nothing is assumed of it: the literal loop runs it
        return InnerSolver(solver)
    if solver not in SOLVERS:
        raise ValueError(
            f"solver: expected one of {', '.join(SOLVERS)}, or a function (tensors, options) -> "
            f"torch optimizer, got {solver!r}"
        )
    return SOLVERS[solver]
