"""The solve on coefficients against the literal loop, on the same problem."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import llqr
from llqr.geometry.inner_solve import FlatModel, Objective, basis_capacity
from llqr.geometry.inner_solve._literal import solve_literally
from llqr.geometry.inner_solve._reduced import solve_on_coefficients
from llqr.geometry.structures import States
from solving import method
from tiny import F64, Problem

LINEAR = {
    "diagonal": {"structure": "diagonal"},
    "scalar": {"structure": "scalar"},
    "dense": {"structure": "dense", "block_size": 40},
    "e-kfac": {"structure": "e-kfac", "bases": "gradient"},
    "e-kfac-blocks": {"structure": "e-kfac", "bases": "gradient", "block_size": 5},
    "mixed": {"structure": lambda name, p: MIXED[name.split(".")[0]], "bases": "gradient"},
}
MIXED = {"0": "e-kfac", "2": "diagonal", "4": "scalar", "6": "identity", "8": "dense"}

MIXED_KFAC = {"0": "e-kfac", "2": "kfac", "4": "diagonal", "6": "e-kfac", "8": "diag-kfac"}


def chain(dtype: torch.dtype = F64, seed: int = 0) -> Problem:
    """Five layers of different sizes, a batch far from fitted."""
    torch.manual_seed(seed)
    sizes = [5, 6, 6, 4, 6, 3]
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).to(F64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    x, y = torch.randn(16, 5, dtype=F64), torch.randint(3, (16,))
    return Problem(model.to(dtype), x.to(dtype), y)


class Inner:
    """One inner problem: the objective, the states to start from, and what was solved."""

    def __init__(
        self, settings: dict, curvature: str = "fisher", dtype: torch.dtype = F64, seed: int = 0
    ) -> None:
        problem = chain(dtype, seed)
        geometry = llqr.LLQR(curvature=curvature, **settings)
        geometry.bind(problem.model)
        parameters = list(geometry.parameters.values())
        self.model = llqr.quadratic_model(problem, parameters, curvature)
        with torch.no_grad():
            self.flat = FlatModel(self.model, geometry.layout, list(geometry.parameters))
            self.states = geometry.blocks.renew_bases(
                geometry.states, self.flat.gradient, True, True
            )
        self.objective = Objective(geometry.blocks, self.flat.gradient, self.flat.product, 0.1)
        self.blocks = geometry.blocks

    @torch.no_grad()
    def solve(self, tolerance: float, capacity: int = 50, **options) -> tuple[Tensor, float]:
        """How far the state moved, and J at the start; tolerance 0 is the literal loop."""
        settings = {"solver": "momentum", "steps": 50, "lr": 0.1, "momentum": 0.9, "clip": None}
        chosen = method(**{**settings, **options})
        before = self.model.products
        if tolerance == 0:
            states, first = solve_literally(self.objective, self.states, *chosen)
        else:
            states, first = solve_on_coefficients(
                self.objective, self.states, *chosen, tolerance, capacity
            )
        self.products = self.model.products - before
        return self.moved(states), float(first)

    def moved(self, states: States) -> Tensor:
        triples = zip(self.blocks.parts, states, self.states, strict=True)
        return torch.cat([
            (e[k] - s[k]).double().reshape(-1) for p, e, s in triples for k in p.trainable
        ])  # fmt: skip


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("name", list(LINEAR))
def test_equals_the_literal_loop(name: str, curvature: str) -> None:
    inner = Inner(LINEAR[name], curvature)
    free, _ = inner.solve(0, lr=0.5)
    assert inner.products == 50
    for lr, clip in ((0.01, None), (0.5, None), (0.5, 0.004)):
        plain, first = inner.solve(0, lr=lr, clip=clip)
        if clip is not None:  # the clip must bite for this to say anything
            assert error(free, plain) > 0.05
        for tolerance in (1e-2, 1e-7):
            found, start = inner.solve(tolerance, lr=lr, clip=clip)
            assert error(found, plain) < tolerance
            assert inner.products < 50
            assert start == pytest.approx(first, rel=1e-12)


@pytest.mark.parametrize("name", list(LINEAR))
def test_few_products(name: str) -> None:
    inner = Inner(LINEAR[name])
    inner.solve(1e-2, lr=1e-2)
    assert inner.products <= 3


@pytest.mark.parametrize("solver, momentum", [("sgd", 0.9), ("momentum", 0.5), ("momentum", 0.0)])
def test_solvers(solver: str, momentum: float) -> None:
    inner = Inner(LINEAR["diagonal"])
    plain, _ = inner.solve(0, solver=solver, momentum=momentum, clip=0.05)
    found, _ = inner.solve(1e-7, solver=solver, momentum=momentum, clip=0.05)
    assert error(found, plain) < 1e-6


@pytest.mark.parametrize("name", ["diagonal", "e-kfac", "mixed"])
@pytest.mark.parametrize("capacity", [1, 3])
def test_goes_on_with_an_empty_basis(name: str, capacity: int) -> None:
    inner = Inner(LINEAR[name])
    plain, first = inner.solve(0, lr=0.5, clip=0.05)
    found, start = inner.solve(1e-4, capacity, lr=0.5, clip=0.05)
    assert inner.products > capacity  # it did run out
    assert error(found, plain) < 1e-3
    assert start == pytest.approx(first, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps(steps: int) -> None:
    inner = Inner(LINEAR["diagonal"])
    plain, _ = inner.solve(0, steps=steps)
    found, _ = inner.solve(1e-8, steps=steps)
    assert error(found, plain) < 1e-12


@pytest.mark.parametrize("name", list(LINEAR))
def test_single_precision(name: str) -> None:
    exact, _ = Inner(LINEAR[name]).solve(0, lr=0.5, clip=0.02)
    single = Inner(LINEAR[name], dtype=torch.float32)
    found, _ = single.solve(1e-2, lr=0.5, clip=0.02)
    assert error(found, exact) < 2e-3
    # Bases of e-kfac turned in float32 end at 1e-4, all others at a few roundings.
    found, _ = single.solve(1e-6, lr=0.5, clip=0.02)
    assert error(found, exact) < (2e-4 if name == "e-kfac" else 2e-5)
    assert single.products < 45


@pytest.mark.parametrize("seed", [2000, 6000])
@pytest.mark.parametrize("name", list(LINEAR))
def test_single_precision_misses_no_direction(name: str, seed: int) -> None:
    """Where coefficients cancel, their rounding must not hide what lies outside the basis.

    The solve is as exact as in double precision; at these seeds it was wrong by up to 0.02.
    """
    lr = 1.0 if name == "dense" else 10.0  # where the solve does not diverge
    exact, _ = Inner(LINEAR[name], seed=seed).solve(0, lr=lr)
    double, _ = Inner(LINEAR[name], seed=seed).solve(1e-2, lr=lr)
    single, _ = Inner(LINEAR[name], dtype=torch.float32, seed=seed).solve(1e-2, lr=lr)
    assert error(single, exact) < 1.2 * error(double, exact) + 2e-4


@pytest.mark.parametrize("solver", ["momentum", "sgd"])
@pytest.mark.parametrize("name", ["diagonal", "scalar", "e-kfac"])
def test_a_solve_that_has_converged_goes_on(name: str, solver: str) -> None:
    """One weight: the residual vanishes, and rounding may leave less than nothing of its square."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)
    x, y = torch.randn(256, 1), torch.randn(256, 1)

    def forward() -> tuple[Tensor, Tensor]:
        z = model(x)
        return nn.functional.mse_loss(z, y), z

    geometry = llqr.LLQR(**LINEAR[name], steps=500, lr=1.0, solver=solver)
    geometry.bind(model)
    report = geometry.refresh([forward])
    assert report.accepted and report.J_after < report.J_before


def test_directions_exhausted_in_single_precision() -> None:
    """Five numbers span five directions; what rounding leaves must not become a sixth."""
    inner = Inner(LINEAR["scalar"], "newton", torch.float32)
    plain, _ = Inner(LINEAR["scalar"], "newton").solve(0, lr=1.0)
    found, _ = inner.solve(1e-8, lr=1.0)
    assert error(found, plain) < 1e-5
    assert inner.products <= 10


def test_a_krylov_solve_for_all_blocks_at_once_is_wrong_once_a_clip_is_active() -> None:
    """One coefficient per vector, not per block and vector: why the blocks have their own."""
    inner = Inner(LINEAR["diagonal"])
    g, blocks, states = inner.flat.gradient, inner.blocks, inner.states

    def krylov(clip: float | None) -> Tensor:
        """The literal loop with the blocks' gradients scaled by one common factor."""
        state = [{k: v.clone() for k, v in s.items()} for s in states]
        momentum = [{k: torch.zeros_like(v) for k, v in s.items()} for s in states]
        for _ in range(50):
            _, gradient = inner.objective.value_and_gradient(state)
            norm = torch.cat([v.reshape(-1) for e in gradient for v in e.values()]).norm()
            factor = 1.0 if clip is None else float(clip / norm.clamp(min=clip))
            for s, m, e in zip(state, momentum, gradient, strict=True):
                for k in m:
                    m[k].mul_(0.9).add_(e[k], alpha=factor)
                    s[k].sub_(m[k], alpha=0.5)
        return inner.moved(state)

    assert blocks.space.block_count == 5 and bool(g.any())
    with torch.no_grad():
        assert error(krylov(None), inner.solve(0, lr=0.5)[0]) < 1e-12
        assert error(krylov(0.02), inner.solve(0, lr=0.5, clip=0.02)[0]) > 0.1


def test_one_read_decides_and_one_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two transfers to the host a real product, and none in a step without one.

    But for a direction that is found shorter than it had to be feared, which is one. (In single
    precision a step has to look more often, for one read: rounding may hide that much.)
    """
    inner, reads = Inner(LINEAR["e-kfac"]), Counter()
    for name in ("tolist", "item", "__float__", "__bool__", "cpu", "to"):
        original = getattr(Tensor, name)

        def count(self, *args, _name=name, _original=original, **kwargs):
            moved = _name != "to" or "cpu" in args
            if moved and (_name != "__float__" or self.dtype == torch.float32):
                reads[_name] += 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, count)
    inner.solve(1e-3, lr=0.5)
    monkeypatch.undo()
    assert 3 <= inner.products <= 12
    # The start reads once, and the caller reads J.
    assert inner.products < sum(reads.values()) <= 2 * inner.products + 2 + 1, reads


def test_used_by_a_refresh() -> None:
    """LLQR takes this way by itself, and the literal loop at tolerance 0."""
    results = {}
    for tolerance in (0, 1e-2, 1e-8):
        problem = chain()
        geometry = llqr.LLQR("diagonal", tolerance=tolerance, lr=0.1, ema=0.5)
        geometry.bind(problem.model)
        report = geometry.refresh([problem])
        state = geometry.state()
        results[tolerance] = (report, torch.cat([e["U"].reshape(-1) for e in state.values()]) - 1)
    assert results[0][0].products == 51  # and one more judges the result
    assert results[1e-2][0].products <= 5
    assert error(results[1e-2][1], results[0][1]) < 1e-2
    assert error(results[1e-8][1], results[0][1]) < 1e-7
    for report, _ in results.values():
        assert report.J_before == pytest.approx(results[0][0].J_before, rel=1e-12)


@pytest.mark.parametrize(
    "structure", [lambda name, p: "e-kfac", lambda name, p: MIXED_KFAC[name[0]]]
)
def test_the_old_control_is_the_first_direction(structure) -> None:
    """Bases were renewed: J at the old U needs a product, and the solve goes on from it."""
    reports = {}
    for tolerance in (0, 1e-2):
        problem = chain()
        geometry = llqr.LLQR(
            structure, bases="gradient", renew_every=1, tolerance=tolerance, lr=0.5
        )
        geometry.bind(problem.model)
        for scale in (1.0, 0.7):  # in the second the old U is no multiple of the identity
            with torch.no_grad():
                problem.model[0].weight.mul_(scale)
            reports[tolerance, scale] = geometry.refresh([problem])
    for scale in (1.0, 0.7):
        literal, found = reports[0, scale], reports[1e-2, scale]
        assert literal.products == 52  # the steps, J before and J after
        assert found.products <= 25
        assert found.J_before == pytest.approx(literal.J_before, rel=1e-3)
        assert found.J_after == pytest.approx(literal.J_after, rel=1e-2)
    assert reports[0, 1.0].J_before == pytest.approx(reports[1e-2, 1.0].J_before, rel=1e-12)


def test_capacity_follows_memory() -> None:
    inner = Inner(LINEAR["diagonal"])
    layout = inner.blocks.layout
    assert basis_capacity(layout, 50) == 50
    layout.width = 10**8  # a hundred million parameters in float64: 1.6 GB a pair
    assert basis_capacity(layout, 50) == 8
    layout.width = 10**7
    assert basis_capacity(layout, 50) == 13


def test_the_first_value_survives_cancellation() -> None:
    """J is small beside its two terms; in float32 both ways must lose the same digits."""
    torch.manual_seed(0)
    inner = Inner(LINEAR["diagonal"], dtype=torch.float32)
    blocks, n = inner.blocks, inner.blocks.layout.numel
    g = torch.randn(n) * 100
    curvature = 2 + torch.randn(n) * 1e-3  # J = -g'g + g'Cg / 2 is a thousandth of g'g
    objective = Objective(blocks, g, lambda d: curvature * d, 0.0)
    options = method("momentum", 1, 1e-6, 0.9, None)
    d, exact = g.double(), curvature.double()
    expected = float(-(d @ d) + 0.5 * d @ (exact * d))
    with torch.no_grad():
        _, literal = solve_literally(objective, inner.states, *options)
        _, first = solve_on_coefficients(objective, inner.states, *options, 1e-2, 50)
    assert abs(expected) < 1e-3 * float(d @ d)
    size = abs(float(literal) - expected) + 1e-6 * abs(expected)
    assert float(first) == pytest.approx(expected, abs=20 * size)
