"""What a refresh computes beside its passes through the network: its own code, rehearsed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

import llqr
from llqr.geometry.inner_solve import (
    Objective,
    RecycledProduct,
    in_own_units,
    inner_rates,
    pack_mean,
    runs_on_coefficients,
    solve_inner_problem,
)
from llqr.geometry.structures import EXACT_BELOW, LANCZOS_STEPS, WITH_LAPACK, States

from .work import Work, answered, fused_attention, measure_work
from .workload import Workload

__all__ = ["directions_of", "moments_steps", "natural_refresh", "on_host", "solve_work"]

META = torch.device("meta")
#: Calls of an inner step of the loop on coefficients, all on the host.
HOST_CALLS = 110
#: Rounds of Newton and Schulz that make learned bases orthogonal again.
ORTHOGONAL_ROUNDS = 3
#: What the square root of a cross-entropy asks of the products with H: whether they are finite,
#: three times; whether H is diagonal; whether it is that of a softmax.
OF_CROSS_ENTROPY = (True, True, True, False, True)


@contextmanager
def on_host(applies: bool) -> Iterator[None]:
    """Take tensors without memory for those of a CPU in the body, not of an accelerator."""
    if not applies:
        yield
        return
    WITH_LAPACK.add(META.type)
    try:
        yield
    finally:
        WITH_LAPACK.discard(META.type)


def solve_work(geometry: llqr.LLQR, products: int, steps: int) -> Work:
    """Return the algebra of a refresh of LLQR.

    Args:
        geometry: bound.
        products: with the curvature.
        steps: inner steps that are made before the directions are used up.
    """
    blocks, settings, layout = geometry.blocks, geometry.settings, geometry.layout
    learner, states = settings.learner_at(0), blocks.identity(META)
    g, names = _flat_vector(geometry), list(geometry.parameters)

    def pack() -> None:
        tensors = layout.unpack(g)
        pack_mean([tensors[name] for name in names], layout, names, None)

    def solve(count: int) -> States:
        options = replace(learner.options, steps=count, lr=1.0)
        with torch.no_grad(), answered(1.0):
            solved, _ = solve_inner_problem(
                objective, states, states, learner.solver, options, learner.tolerance
            )
        return solved

    # The gradient, and what each product makes of a vector.
    total = measure_work(pack) * (1 + products)
    directions = directions_of(geometry, products, steps)
    made: list[Objective] = []
    total += measure_work(lambda: made.append(_objective_of(geometry, g, directions)))
    objective = made[0]
    if runs_on_coefficients(blocks, learner.solver) and learner.tolerance:
        # Each direction is one step that needed a product; the others are on the host.
        total += measure_work(lambda: solve(min(steps, directions)))
        total += Work(calls=float(HOST_CALLS * steps))
    else:
        one = measure_work(lambda: solve(1))
        total += one + (measure_work(lambda: solve(2)) + one * -1.0) * (steps - 1)
    total += measure_work(lambda: _judge(geometry, objective, states))
    return total + _spectrum_work(geometry, states)


def directions_of(geometry: llqr.LLQR, products: int, steps: int) -> int:
    """Return how many directions a refresh holds at most, with their products.

    All that there is room for if the solve ends early; else the last product was J at the new U.
    """
    most = geometry._refresh_memory().directions
    return most if steps < geometry.settings.steps else max(1, min(products - 1, most))


def _flat_vector(geometry: llqr.LLQR) -> torch.Tensor:
    layout = geometry.layout
    return torch.empty(layout.numel, dtype=layout.dtype, device=META)


def _objective_of(geometry: llqr.LLQR, g: torch.Tensor, directions: int) -> Objective:
    """Return J as a refresh meets it, with products that cost nothing and so many directions."""
    blocks, learner = geometry.blocks, geometry.settings.learner_at(0)
    objective = Objective(blocks, g, torch.empty_like, learner.damping)
    on_coefficients = runs_on_coefficients(blocks, learner.solver)
    states = blocks.identity(META)
    with torch.no_grad(), answered(1.0):
        if learner.own_units:
            scaled = in_own_units(objective, states, learner.tolerance, directions)
            assert scaled is not None  # no number is zero
            objective = scaled.objective
            inner_rates(objective, states, learner.solver, learner.options)
        elif learner.tolerance and not on_coefficients:
            dot = blocks.space.dot
            product = RecycledProduct(torch.empty_like, g, learner.tolerance, directions, dot)
            objective = Objective(blocks, g, product, learner.damping)
        if isinstance(objective.product, RecycledProduct) and not on_coefficients:
            while not objective.product.full:
                objective.product.remember(torch.empty_like(g), torch.empty_like(g))
            objective.is_spent = lambda: False  # as many steps as are asked for
    return objective


def _judge(geometry: llqr.LLQR, objective: Objective, solved: States) -> None:
    """Project and average U, and find J and what U does to g."""
    blocks, learner = geometry.blocks, geometry.settings.learner_at(0)
    # Nearly orthogonal bases are so at once, and factors are within their bounds.
    with torch.no_grad(), answered(0.0):
        new = learner._constrain_and_average(blocks, blocks.identity(META), solved)
    with torch.no_grad(), answered(1.0):
        objective.value_and_rounding(new)
        ug, g = blocks.apply(new, objective.gradient), objective.gradient
        for v in (g, ug, ug - g):
            float(blocks.space.dot(v, v).sqrt())


def _spectrum_work(geometry: llqr.LLQR, states: States) -> Work:
    """Return what becomes of U's eigenvalues, which the meta device would take minutes to do.

    They are estimated by Lanczos, and learned bases made orthogonal in further rounds.
    """
    work, projects = Work(), geometry.settings.constraint == "positive"
    for part, state in zip(geometry.blocks.parts, states, strict=True):
        for m in (state[name] for name in ("A", "B") if name in state and state[name].dim() == 3):
            if m.shape[-1] > EXACT_BELOW:
                work += _lanczos_work(len(m), m.shape[-1], Work(moved=float(m.nbytes), calls=4))
            else:
                work += Work(factored=4 / 3 * m.numel() * m.shape[-1], calls=6)
        bases = [state[name] for name in ("QA", "QB") if name in state and "L" not in state]
        for q in bases if projects else ():
            # X'X and X X'X of two projections: n^3 multiplications and additions each.
            cubes = float(q.numel() * q.shape[-1])
            work += Work(flops=2 * (ORTHOGONAL_ROUNDS - 1) * 4 * cubes, calls=40)
        if bases and not projects:
            x = torch.empty_like(state["S"])
            applied = measure_work(lambda p=part, s=state, x=x: p.apply(s, x))
            work += _lanczos_work(len(x), x[0].numel(), applied)
    return work


def _lanczos_work(count: int, n: int, applied: Work) -> Work:
    """Return an estimate of the extreme eigenvalues of some matrices with side n.

    Each new vector has inner products with those before it, and is made orthogonal to them twice.
    """
    steps = min(LANCZOS_STEPS, n)
    vector = 4.0 * count * n
    products, orthogonal = steps * (steps + 1) / 2, steps * (steps - 1)
    return applied * steps + Work(
        # x o y and its sum; and beside them, its multiple and a difference.
        moved=(4 * products + 9 * orthogonal) * vector,
        calls=2 * products + 4 * orthogonal + 20 * steps,
    )


def natural_refresh(geometry: llqr.NaturalGradient, workload: Workload) -> Work:
    """Return a refresh of NaturalGradient with its passes: the mean of those after the first.

    The first one decomposes; of the others one in ``renew_every`` turns the bases.

    Args:
        geometry: bound; its counters are those of some refreshes then.
        workload: the network.
    """

    def refresh() -> None:
        with answered(0.0, OF_CROSS_ENTROPY), fused_attention():
            geometry.refresh([workload.forward])

    period = geometry.settings.renew_every
    refresh()
    total = Work()
    if period > 1:
        total = measure_work(refresh) * (1 - 1 / period)
    geometry.load_counters({**geometry.counters(), "refreshes": period, "refused": 0})
    return total + measure_work(refresh) * (1 / period)


@torch.no_grad()
def moments_steps(geometry: llqr.GradientMoments) -> tuple[Work, Work]:
    """Return what GradientMoments is to a usual step, and to one that renews its bases.

    A base in the bases: g and w into them, and the change of w back. New ones turn the base's mean
    of gradients, too. If the structure has no bases, U is applied.

    Args:
        geometry: bound; its counters are those of some steps then.
    """
    named = geometry.parameters
    gradients = {name: torch.empty_like(p) for name, p in named.items()}

    def step(renews: bool) -> None:
        old = geometry.bases_for(named)
        with answered(0.0):
            geometry.observe(gradients)
        new = geometry.bases_for(named)
        if old is None or new is None:
            geometry.apply(gradients)
            return
        if renews:
            new.rotate(old.rotate_back(gradients))
        for vector in (gradients, named):
            new.rotate(vector)
        new.rotate_back(gradients)

    step(True)  # the first one decomposes
    usual = measure_work(lambda: step(False))
    period = geometry.settings.renew_every
    geometry.load_counters({**geometry.counters(), "observed": period})
    return usual, measure_work(lambda: step(True))
