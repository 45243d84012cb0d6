"""What a refresh of LLQR holds at a time: its own code, run where no tensor has memory.

The parts that read numbers from the device (the loop on coefficients, projections) are counted by
what they keep; all others run on the meta device under :class:`llqr._allocations.Allocations`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..._allocations import bytes_of, peak_bytes_of
from ..structures import BlockDiagonal, State, States, Structure
from ._buffered import solve_in_buffers
from ._literal import solve_literally
from ._objective import Objective
from ._rows import rows_allocated, rows_at_a_time
from ._solve import runs_in_buffers, runs_on_coefficients
from ._solvers import InnerSolver, SolverOptions

__all__ = ["RefreshMemory"]

META = torch.device("meta")
#: What the history of torch's LBFGS holds, in copies of what it solves for.
LBFGS_COPIES = 2 * 10 + 8


@dataclass(frozen=True)
class RefreshMemory:
    """Counts the bytes of a refresh, beside the graph of its forward.

    Attributes:
        blocks: U.
        solver: the method of the inner solve.
        options: its numbers.
        tolerance: 0 if every product is computed.
        own_units: whether J is learned from in units of its own.
        projects: whether the result of the solve is projected into bounds.
        product: bytes that a product takes, its result among them.
        capacity: how many directions a solve keeps.
        graph_keeps: vectors that the graph keeps: g, and where edges do not, the ends of J'u.
    """

    blocks: BlockDiagonal
    solver: InnerSolver
    options: SolverOptions
    tolerance: float
    own_units: bool
    projects: bool
    product: int
    capacity: int
    graph_keeps: int

    @property
    def on_coefficients(self) -> bool:
        """Whether the solve runs on coefficients (see :func:`solve_inner_problem`)."""
        return bool(self.tolerance) and runs_on_coefficients(self.blocks, self.solver)

    @property
    def directions(self) -> int:
        """The most directions that are kept, each with its image."""
        if not self.tolerance:
            return 0
        return min(self.capacity, self.options.steps + self.own_units)

    @property
    def vector(self) -> int:
        """Bytes of a flat vector."""
        layout = self.blocks.layout
        return layout.numel * layout.dtype.itemsize

    def pairs(self, count: int) -> int:
        """Return the bytes of so many directions and their images."""
        count = min(count, self.directions)
        kept = 2 * rows_allocated(count, self.capacity, self.vector) * self.vector
        # In rotated coordinates a solve on coefficients has its own beside those that are shared.
        rotates = any(part.rotates for part in self.blocks.parts)
        return 2 * kept if self.own_units and self.on_coefficients and rotates else kept

    def peak(self, count: int) -> int:
        """Return the most that a refresh with so many directions holds at a time."""
        vector, states = self.vector, self.blocks.identity(META)
        trained = bytes_of([
            [s[k] for k in part.trainable]
            for part, s in zip(self.blocks.parts, states, strict=True)
        ])  # fmt: skip
        pairs = self.pairs(count)
        recycles = bool(self.tolerance) and (self.own_units or not self.on_coefficients)
        kept = (1 + self.graph_keeps) * vector  # g
        renewed = bytes_of(states) if self.blocks.renews_bases else 0
        kept += renewed
        x = self._flat()
        action = peak_bytes_of(lambda: self.blocks.apply(states, x))
        # With what earlier ones leave of d, which becomes a direction as the result its image.
        alone = bool(self.tolerance) and rows_at_a_time(0, 2, vector) == 1
        product = self.product + recycles * vector
        judged = self.pairs(min(count, 1)) if self.own_units else 0
        phases = [
            kept + pairs + self._solve(states, trained, action, product, alone * vector),
            # J at the new U: u, what is left of it, and its image.
            kept + judged + trained + vector + max(action, product),
        ]
        if self.projects:  # projected, averaged, and projected again
            phases.append(kept + judged + 3 * trained + self._projection(states))
        if self.own_units:
            phases.append(kept + self.pairs(1) + self._rates(states, trained, action, product))
        return max(phases)

    def _flat(self) -> Tensor:
        layout = self.blocks.layout
        return torch.empty(layout.numel, dtype=layout.dtype, device=META)

    def _solve(
        self, states: States, trained: int, action: int, product: int, kept_of_product: int
    ) -> int:
        """Return what the solve takes beside directions and g."""
        vector = self.vector
        if self.on_coefficients:
            rotates = any(part.rotates for part in self.blocks.parts)
            # g in the coordinates of the solve, and: both ends of a product; d and what d_0 takes;
            # the result.
            ends = self.product + 2 * rotates * vector - kept_of_product
            return rotates * vector + max(ends, action, 2 * trained, trained + vector, 2 * vector)
        if self.solver.evaluates_within_step:
            return LBFGS_COPIES * trained + 3 * vector
        g = self._flat()

        def image_of(u: Tensor) -> Tensor:
            # What a product takes beyond its result, for as long as it runs.
            if not self.tolerance:
                _ = torch.empty(product - vector, dtype=torch.uint8, device=META)
                return torch.empty_like(u)
            # Two vectors of it stay, among the directions; the memory of answers is free meanwhile.
            left = max(product - 2 * kept_of_product - vector, 0)
            _ = torch.empty(left, dtype=torch.uint8, device=META)
            return recycled

        recycled = self._flat()
        objective = Objective(self.blocks, g, image_of, 0.0)
        buffered = self.tolerance and runs_in_buffers(self.blocks, self.solver)
        way = solve_in_buffers if buffered else solve_literally
        # The second step finds the buffers and the momentum of the first. Clipping reads norms.
        options = replace(self.options, steps=2, lr=1.0, clip=None)
        return peak_bytes_of(lambda: way(objective, states, self.solver, options))

    def _rates(self, states: States, trained: int, action: int, product: int) -> int:
        """Return what it takes to find the inner rate, before there are directions."""
        g, r = self._flat(), self._flat()
        pullback = peak_bytes_of(lambda: self.blocks.pullback(states, g, r))
        # u with its image, and the slope; then the state that moved along it, and v.
        return max(2 * self.vector + max(pullback, 2 * trained + max(action, trained)), product)

    def _projection(self, states: States) -> int:
        """Return what the projection of one group of blocks takes, its result among it."""
        return max(
            (peak_of_projection(p, s) for p, s in zip(self.blocks.parts, states, strict=True)),
            default=0,
        )


def peak_of_projection(part: Structure, state: State) -> int:
    """Return what a projection takes; three copies if it reads numbers, as decompositions do."""
    try:
        return peak_bytes_of(lambda: part.project(state, (0.5, 2.0)))
    except (RuntimeError, NotImplementedError):
        return 3 * bytes_of(state)
