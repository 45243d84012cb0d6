"""The inner solve against a literal loop on explicit matrices, in float64.

The loop here knows no pullback and no product: U and C are matrices, J is written down, and its
gradient in the entries of U comes from automatic differentiation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import llqr
from explicit import F64, block_indices, block_matrix, explicit_U, vector
from nets import Case, trio
from tiny import STRUCTURES, mlp, norm_net, says

STEPS = 50
Leaf = dict[str, Tensor]
Rule = Callable[[], Callable[[Tensor, Tensor], Tensor]]


# -- the literal loop ------------------------------------------------------------------------------


class Literal:
    """The entries of every block of U, from the identity, and 50 steps on them."""

    def __init__(
        self,
        model: torch.nn.Module,
        g: Tensor,
        C: Tensor,
        structure: str,
        block_size: int | None,
        *,
        square: bool = False,
        fixed_bases: bool = False,
    ) -> None:
        self.g, self.C, self.square = g, C, square
        self.blocks = block_indices(model, structure, block_size)
        self.leaves = [start(kind, index) for kind, _, _, index in self.blocks]
        self.constants: list[Leaf] = [{} for _ in self.blocks]
        for own, fixed, (kind, _, _, index) in zip(
            self.leaves, self.constants, self.blocks, strict=True
        ):
            if kind == "e-kfac" and fixed_bases:
                X = g[index]
                fixed.update(QA=_eigenvectors(X.T @ X), QB=_eigenvectors(X @ X.T))
                del own["QA"], own["QB"]

    def matrices(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each block of U, with the indices that it acts on."""
        for (kind, _, _, index), own, fixed in zip(
            self.blocks, self.leaves, self.constants, strict=True
        ):
            entries = {**own, **fixed}
            if self.square and "S" in entries:
                entries["S"] = entries["S"].square() + 1e-12
            yield index.reshape(-1), block_matrix(kind, entries, index.numel())

    @property
    def U(self) -> Tensor:
        whole = torch.zeros_like(self.C)
        for index, block in self.matrices():
            whole[index[:, None], index] = block.detach()
        return whole

    def J(self, damping: float, U: Tensor | None = None) -> Tensor:
        """g'u + u'Cu / 2 + damping |u|^2 / 2 at u = -U g."""
        if U is None:
            u = torch.zeros_like(self.g)
            for index, block in self.matrices():
                u = u.index_put((index,), -block @ self.g[index])
        else:
            u = -U @ self.g
        return self.g @ u + 0.5 * u @ self.C @ u + 0.5 * damping * u @ u

    def run(self, rule: Rule, damping: float, clip: float) -> float:
        """Run the steps; return the largest factor by which a leaf was longer than the clip."""
        excess = 0.0
        steps = [{k: rule() for k in own} for own in self.leaves]
        for _ in range(STEPS if any(self.leaves) else 0):
            flat = [v.requires_grad_() for own in self.leaves for v in own.values()]
            gradients = iter(torch.autograd.grad(self.J(damping), flat))
            for own, step in zip(self.leaves, steps, strict=True):
                for key, value in own.items():
                    gradient = next(gradients)
                    norm = float(gradient.norm())
                    excess = max(excess, norm / clip)
                    own[key] = step[key](value.detach(), gradient * (clip / max(clip, norm)))
        return excess


def start(kind: str, index: Tensor) -> Leaf:
    """The entries at which a block is the identity."""
    if kind == "identity":
        return {}
    if kind == "scalar":
        return {"U": torch.ones((), dtype=F64)}
    if kind in ("diagonal", "dense"):
        return {"U": _one(index.numel()) if kind == "diagonal" else _eye(index.numel())}
    m, n = index.shape
    if kind == "diag-kfac":
        return {"A": _one(n), "B": _one(m)}
    if kind == "kfac":
        return {"A": _eye(n), "B": _eye(m)}
    return {"QA": _eye(n), "QB": _eye(m), "S": torch.ones(m, n, dtype=F64)}


def _one(n: int) -> Tensor:
    return torch.ones(n, dtype=F64)


def _eye(n: int) -> Tensor:
    return torch.eye(n, dtype=F64)


def _eigenvectors(matrix: Tensor) -> Tensor:
    return torch.linalg.eigh(matrix).eigenvectors


def momentum(lr: float, mu: float = 0.9) -> Rule:
    def start() -> Callable[[Tensor, Tensor], Tensor]:
        trace: list[Tensor | float] = [0.0]

        def step(value: Tensor, gradient: Tensor) -> Tensor:
            trace[0] = gradient + mu * trace[0]
            return value - lr * trace[0]

        return step

    return start


def adam(lr: float) -> Rule:
    def start() -> Callable[[Tensor, Tensor], Tensor]:
        state = {"m": 0.0, "v": 0.0, "t": 0}

        def step(value: Tensor, gradient: Tensor) -> Tensor:
            state["t"] += 1
            state["m"] = 0.9 * state["m"] + 0.1 * gradient
            state["v"] = 0.999 * state["v"] + 0.001 * gradient.square()
            m = state["m"] / (1 - 0.9 ** state["t"])
            v = state["v"] / (1 - 0.999 ** state["t"])
            return value - lr * m / (v.sqrt() + 1e-8)

        return step

    return start


# -- the problem -----------------------------------------------------------------------------------


@functools.cache
def problem() -> Case:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return trio()


def compare(
    structure: str,
    curvature: str,
    damping: float,
    *,
    block_size: int | None = None,
    solver: str = "momentum",
    lr: float = 0.02,
    clip: float = 5.0,
    scale: float = 1.0,
    **settings,
) -> tuple[Literal, float, llqr.RefreshReport]:
    """Solve both ways; assert that U agrees to 1e-9 and J with it."""
    net = problem()
    bases, square = settings.get("bases", "learned"), settings.get("constraint") == "square"
    literal = Literal(
        net.model,
        net.matrices["g"],
        scale * net.matrices[curvature],
        structure,
        block_size,
        square=square,
        fixed_bases=bases == "gradient",
    )
    rule = {"momentum": momentum(lr), "sgd": momentum(lr, 0.0), "adam": adam(lr)}[solver]
    excess = literal.run(rule, damping, clip)
    geometry = llqr.LLQR(
        structure,
        **{
            "curvature": curvature,
            "damping": damping,
            "scale": scale,
            "steps": STEPS,
            "lr": lr,
            "clip": clip,
            "solver": solver,
            "block_size": block_size,
            "ema": 0.0,
            "tolerance": 0,
            "constraint": "none",
            **settings,
        },
    )
    geometry.bind(net.model)
    report = geometry.refresh([net])
    found = explicit_U(net.model, structure, geometry.state(), block_size, square)
    if structure in ("scalar", "diagonal"):  # the floor that follows the solve
        for own in literal.leaves:
            own["U"] = own["U"].clamp(min=1e-8)
    expected = literal.U
    identity = torch.eye(len(expected), dtype=F64)
    moved = float((expected - identity).abs().max())
    error = float((found - expected).abs().max())
    assert error <= 1e-9 * max(moved, float(expected.abs().max()))
    g = net.matrices["g"]
    for value, U in ((report.J_before, identity), (report.J_after, expected)):
        assert value == pytest.approx(float(literal.J(damping, U)), rel=1e-9)
    ug = expected @ g
    assert report.ratio == pytest.approx(float(ug.norm() / g.norm()), rel=1e-9)
    assert report.change == pytest.approx(float((ug - g).norm() / g.norm()), rel=1e-7)
    assert report.cosine == pytest.approx(float(ug @ g / ug.norm() / g.norm()), rel=1e-9)
    if structure != "identity":
        assert moved > 0.02
        assert not math.isclose(report.J_after, report.J_before, rel_tol=1e-3)
    return literal, excess, report


pytestmark = pytest.mark.filterwarnings("ignore:U has a negative eigenvalue:UserWarning")


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_solve_is_the_literal_loop(structure, curvature, damping):
    compare(structure, curvature, damping)


@pytest.mark.parametrize("block_size", [3, 2])
@pytest.mark.parametrize("structure", ["diag-kfac", "kfac", "e-kfac", "dense"])
def test_split_blocks_are_solved_together(structure, block_size):
    """J couples all blocks through C; each block's tensors are leaves of their own."""
    compare(structure, "fisher", 0.1, block_size=block_size)


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_clip_active(structure, curvature):
    """Some leaves are clipped at some steps, others are not."""
    _, excess, _ = compare(structure, curvature, 0.1, clip=0.02, lr=0.1)
    assert excess > 1.5 or structure == "identity"


@pytest.mark.parametrize("solver, lr", [("sgd", 0.1), ("adam", 0.02)])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_other_solvers(structure, solver, lr):
    compare(structure, "fisher", 0.1, solver=solver, lr=lr)


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_gradient_bases(curvature, damping):
    """e-kfac with fixed bases: only the eigenvalues move."""
    compare("e-kfac", curvature, damping, bases="gradient")
    compare("e-kfac", curvature, damping, bases="gradient", block_size=3, clip=0.02, lr=0.1)


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
def test_squared_eigenvalues(curvature):
    """The authors' psd-e-kfac: raw^2 + 1e-12 in the place of S."""
    compare("e-kfac", curvature, 0.1, constraint="square")


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_scaled_curvature(structure):
    compare(structure, "fisher", 0.0, scale=5.0)


def test_the_positive_constraint_comes_after_the_solve():
    """The inner steps are unconstrained; U is projected once, and once more after the average."""
    net = problem()
    literal, _, _ = compare("diagonal", "newton", 0.0, lr=0.5)
    values = literal.U.diagonal()
    low, high = bounds = (0.5, 1.5)
    assert float(values.min()) < low and float(values.max()) > high
    geometry = llqr.LLQR(
        "diagonal", curvature="newton", lr=0.5, ema=0.3, tolerance=0, bounds=bounds, block_size=None
    )
    geometry.bind(net.model)
    assert geometry.refresh([net]).accepted
    expected = (0.3 + 0.7 * values.clamp(low, high)).clamp(low, high)
    found = vector(entries["U"] for entries in geometry.state().values())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


# -- L-BFGS ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s != "identity"])
def test_lbfgs_minimises_better_in_fewer_products(structure):
    net = problem()
    reports = {}
    for solver, steps in (("momentum", 50), ("lbfgs", 15)):
        geometry = llqr.LLQR(
            structure, solver=solver, steps=steps, lr=0.02, ema=0.0, damping=0.1, tolerance=0,
            constraint="none",
        )  # fmt: skip
        geometry.bind(net.model)
        reports[solver] = geometry.refresh([net])
    assert reports["lbfgs"].J_after < reports["momentum"].J_after
    assert reports["lbfgs"].products < reports["momentum"].products


def test_lbfgs_reaches_the_minimum_of_a_scalar():
    """One layer, one number: J is a parabola, and its minimum is known."""
    case = mlp()
    parameters = list(case.model[0].parameters())
    settings = {"lr": 1e-2, "ema": 0.0, "bounds": (1e-3, 1e6), "clip": None}
    geometry = llqr.LLQR("scalar", solver="lbfgs", **settings)
    geometry.bind(case.model, dict(case.model[0].named_parameters(prefix="0")))
    q = llqr.quadratic_model(case, parameters)
    g = vector(q.gradient)
    best = float(g @ g / (g @ vector(q.product(q.gradient))))
    assert geometry.refresh([case]).accepted
    assert float(geometry.state()["0.weight"]["U.0"]) == pytest.approx(best, rel=1e-5)


# -- what the solver must not do -------------------------------------------------------------------


def test_the_first_step_is_where_it_was():
    """A warm start: the momentum is zero and the first gradient is that of the current U."""
    net = problem()
    settings = {"lr": 0.02, "ema": 0.0, "tolerance": 0, "constraint": "none", "block_size": None}
    twice, once = (llqr.LLQR("kfac", steps=s, momentum=m, **settings)
                   for s, m in ((1, 0.9), (2, 0.0)))  # fmt: skip
    for geometry in (twice, once):
        geometry.bind(net.model)
        geometry.refresh([net])
    twice.refresh([net])
    for name, entries in once.state().items():
        for key, value in entries.items():
            torch.testing.assert_close(twice.state()[name][key], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("solver", ["momentum", "sgd", "adam", "lbfgs"])
def test_solves_repeat_bitwise_and_leave_the_old_state_alone(solver):
    net = norm_net()
    net.model.eval()
    states = []
    for _ in range(2):
        geometry = llqr.LLQR("kfac", solver=solver, lr=1e-3, ema=0.0)
        geometry.bind(net.model)
        before = geometry.state()
        copies = {n: {k: v.clone() for k, v in e.items()} for n, e in before.items()}
        geometry.refresh([net])
        for name, entries in before.items():
            for key, value in entries.items():
                assert torch.equal(value, copies[name][key])
                assert value.grad is None and not value.requires_grad
        states.append(vector(v for e in geometry.state().values() for v in e.values()))
    assert torch.equal(*states)


def test_a_solver_is_chosen_by_name():
    with says(ValueError, "solver", "'newton-cg'", "momentum"):
        llqr.LLQR("kfac", solver="newton-cg")
