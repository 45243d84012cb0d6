"""Which way the inner solve takes."""

from __future__ import annotations

from torch import Tensor

from ..layout import Layout
from ..structures import BlockDiagonal, States
from ._buffered import solve_in_buffers
from ._literal import solve_literally
from ._objective import Objective
from ._recycled_product import RecycledProduct
from ._reduced import solve_on_coefficients
from ._solvers import InnerSolver, SolverOptions

__all__ = ["basis_capacity", "runs_on_coefficients", "solve_inner_problem"]

#: Memory that directions and their products may take in a refresh.
BASIS_BYTES = 2**31
#: What a solve in units of its own keeps of them: U g, the way down from there, and one more; in
#: small networks, where memory is nothing, two more that let U move further.
OWN_DIRECTIONS, MORE_OWN, MORE_BYTES = 3, 5, 2**26


def solve_inner_problem(
    objective: Objective,
    old: States,
    start: States,
    solver: InnerSolver,
    options: SolverOptions,
    tolerance: float,
) -> tuple[States, Tensor]:
    """Run the inner solve, literally or with as few products as the tolerance allows.

    Args:
        objective: J.
        old: the present states, at which J is returned.
        start: where the solve starts: ``old``, or the same U in renewed bases.
        solver: the method.
        options: how to solve.
        tolerance: relative error allowed in a residual; 0 computes every product.

    Returns:
        The states that ``start`` led to, and J at ``old``.
    """
    if tolerance == 0:
        states, first = solve_literally(objective, start, solver, options)
        return states, first if start is old else objective.value(old)
    blocks, g = objective.blocks, objective.gradient
    capacity = basis_capacity(blocks.layout, options.steps)
    if runs_on_coefficients(blocks, solver):
        known = None if start is old else objective.control_and_image(old)
        return solve_on_coefficients(objective, start, solver, options, tolerance, capacity, known)
    product = objective.product
    if not isinstance(product, RecycledProduct):  # several solves may share one
        product = RecycledProduct(product, g, tolerance, capacity, blocks.space.dot)
    recycled = Objective(blocks, g, product, objective.damping, objective.is_spent)
    before = None if start is old else recycled.value(old)  # the first product is a real one
    way = solve_in_buffers if runs_in_buffers(blocks, solver) else solve_literally
    states, first = way(recycled, start, solver, options)
    return states, first if before is None else before


def runs_on_coefficients(blocks: BlockDiagonal, solver: InnerSolver) -> bool:
    """Tell whether the loop needs no vectors, if products may be answered from earlier ones.

    U linear in its state and steps linear in the gradients: every iterate is a combination of few
    known vectors, and the loop needs only their coefficients, one per block: so the blocks must
    have one entry each, which is what is clipped.
    """
    return blocks.linear and blocks.single_entries and solver.heavy_ball


def runs_in_buffers(blocks: BlockDiagonal, solver: InnerSolver) -> bool:
    """Tell whether the buffered loop makes the steps, if not on coefficients.

    A block that is cut over processes is clipped by its whole norm: the literal loop knows how.
    """
    return solver.heavy_ball and not blocks.space.sharded


def basis_capacity(layout: Layout, steps: int, own_units: bool = False) -> int:
    """Return how many directions a solve keeps: one a step, within ``BASIS_BYTES``, at least 8.

    In units of its own ``OWN_DIRECTIONS``, or as many as ``MORE_BYTES`` hold up to ``MORE_OWN``.
    """
    pair = 2 * layout.width * layout.dtype.itemsize
    if own_units:
        return max(OWN_DIRECTIONS, min(MORE_OWN, MORE_BYTES // max(pair, 1)))
    return min(steps, max(8, BASIS_BYTES // max(pair, 1)))
