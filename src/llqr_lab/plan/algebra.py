"""What a refresh computes beside its passes through the network."""

from __future__ import annotations

from dataclasses import replace

import torch

import llqr
from llqr.geometry.inner_solve import Objective, bytes_of, solve_in_buffers
from llqr.geometry.structures import State

from .work import Work, measure_work

__all__ = ["moments_work", "solve_work"]

META = torch.device("meta")
#: Calls of the loop on coefficients: on the host in each inner step, and for each new direction.
STEP_CALLS, DIRECTION_CALLS = 110, 600
#: Vectors that it reads and writes for each pair of a product and an earlier one, and vectors of a
#: refresh around it, packing and applications of U among them; all counted on two networks.
PAIR_VECTORS, AROUND_COEFFICIENTS, AROUND_OWN_UNITS = 26, 145, 300
#: Calls of a product that is answered from earlier ones.
ANSWER_CALLS = 25
#: Vectors that are read and written for the rate, the average, the judgement and the report.
VECTORS_AROUND = 40
#: Rounds of Newton and Schulz that make learned bases orthogonal again.
ORTHOGONAL_ROUNDS = 3
#: Applications of a matrix in an estimate of its extreme eigenvalues.
LANCZOS_STEPS = 24


def solve_work(geometry: llqr.LLQR, applied: Work, products: int) -> Work:
    """Return the algebra of a refresh of LLQR.

    Args:
        geometry: bound.
        applied: one application of U.
        products: with the curvature.
    """
    layout, settings, blocks = geometry.layout, geometry.settings, geometry.blocks
    vector = float(layout.numel * layout.dtype.itemsize)
    # d as tensors, and their products as one vector.
    packed = Work(moved=4.0 * vector * products, calls=3.0 * products * len(geometry.parameters))
    # U g at the start and at the end, for J and for the report; for the rate, twice more.
    around = applied * (5 if settings.lr == "auto" else 3) + Work(moved=VECTORS_AROUND * vector)
    if blocks.linear and blocks.single_entries and settings.tolerance:
        passes = PAIR_VECTORS * products * (products - 1)
        passes += AROUND_OWN_UNITS if settings.lr == "auto" else AROUND_COEFFICIENTS
        calls = STEP_CALLS * settings.steps + DIRECTION_CALLS * products
        return Work(moved=passes * vector, calls=packed.calls + calls)
    solve = _buffered_work(geometry)
    if settings.tolerance:  # inner steps whose product is a combination of earlier ones
        read = 2 * products + 6
        solve += Work(moved=read * vector, calls=ANSWER_CALLS) * settings.steps
    states = blocks.identity(META)
    for part, state in zip(blocks.parts, states, strict=True):
        solve += _constraint_work(state, settings.constraint == "positive")
        solve += _span_work(part.inner_step(state, part.group.view_of(layout_vector(geometry))).x)
    if settings.constraint != "positive" and any(q in s for s in states for q in ("QA", "QB")):
        around += applied * LANCZOS_STEPS  # the spectrum of a U whose bases are not orthogonal
    return packed + around + solve


def layout_vector(geometry: llqr.LLQR) -> torch.Tensor:
    """Return a flat vector without memory."""
    return torch.empty(geometry.layout.numel, dtype=geometry.layout.dtype, device=META)


def _buffered_work(geometry: llqr.LLQR) -> Work:
    """Return the inner steps: what the first takes, and the others as the second."""
    settings, g = geometry.settings, layout_vector(geometry)
    image = torch.empty_like(g)
    objective = Objective(geometry.blocks, g, lambda u: image, 0.0)
    states = geometry.blocks.identity(META)

    def solve(steps: int) -> Work:
        options = replace(settings.learner_at(0).options, steps=steps, lr=1.0, clip=None)
        return measure_work(
            lambda: solve_in_buffers(objective, states, settings.inner_solver, options)
        )

    with torch.no_grad():
        one, two = solve(1), solve(2)
    later = two + one * -1.0
    if settings.learner_at(0).options.clip is not None:  # it reads norms: one pass, and few calls
        trained = bytes_of(states)
        later += Work(moved=3.0 * trained, calls=6.0 * sum(len(s) for s in states))
    return one + later * (settings.steps - 1)


def _constraint_work(state: State, projects: bool) -> Work:
    """Return two projections and an estimate of the spectrum, of one group of equal blocks."""
    work = Work()
    for name in ("A", "B", "QA", "QB"):
        if name not in state or state[name].dim() != 3:
            continue
        count, n, _ = state[name].shape
        cube, size = float(count * n**3), float(count * n**2 * state[name].element_size())
        if name in ("A", "B"):
            # Two Cholesky factors each tell whether a matrix is within its bounds.
            work += Work(factored=projects * 4 / 3 * cube, moved=LANCZOS_STEPS * size, calls=300)
        else:
            # X'X and X X'X in each round; overlaps; and whether they are orthogonal.
            rounds = projects * 2 * (4 * ORTHOGONAL_ROUNDS + 2) + 2
            work += Work(flops=rounds * cube, moved=3 * rounds * size, calls=60)
    return work


def _span_work(x: torch.Tensor) -> Work:
    """Return what it takes to find the rank of (count, m, n) gradients (Kronecker structures)."""
    if x.dim() != 3:
        return Work()
    count, m, n = x.shape
    m, n = min(m, n), max(m, n)
    # x times random columns, half as many as its rows; Q and R of those.
    return Work(flops=float(count * m * m * n), factored=5 / 6 * count * m**3, calls=12)


def moments_work(geometry: llqr.NaturalGradient, applied: Work) -> Work:
    """Return the algebra of a refresh of NaturalGradient: averages, and bases that follow them.

    Args:
        geometry: bound.
        applied: one application of U.
    """
    samples = geometry.settings.samples
    total = applied * 1.0  # for the report
    for part, state in zip(geometry.parts, geometry.states, strict=True):
        size = float(part.group.numel * part.group.dtype.itemsize)
        held = bytes_of(state)
        # Gathered, squared and added; averages, inverses and their traces.
        total += Work(moved=5 * samples * size + 6.0 * held, calls=8.0 * samples + 60)
        for basis in ("QA", "QB"):
            if basis not in state:
                continue
            side, cube = state[basis].shape[-1], float(part.count * state[basis].shape[-1] ** 3)
            once = 2.0 * samples * part.group.numel * side
            total += Work(flops=once)  # the samples in the bases
            # W W', L Q, the overlaps of the bases; and Q R of L Q.
            renewal = Work(flops=once + 6 * cube, factored=8 / 3 * cube, calls=40)
            total += renewal * (1 / geometry.settings.renew_every)
    return total
