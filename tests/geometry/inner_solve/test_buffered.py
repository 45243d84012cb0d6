"""The solve in buffers and cheaper coordinates against the literal loop, on the same problem."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import llqr
from llqr.geometry.inner_solve import Objective
from llqr.geometry.inner_solve._buffered import solve_in_buffers
from llqr.geometry.inner_solve._literal import solve_literally
from llqr.geometry.inner_solve._solve import solve_inner_problem
from llqr.geometry.structures import BlockDiagonal, States
from llqr.geometry.structures._kfac import Kfac, KfacStep
from nets import Zoo
from solving import method
from tiny import F64

STRUCTURES = {
    "kfac": {"structure": "kfac", "block_size": None},
    "kfac-blocks": {"structure": "kfac", "block_size": 3},
    "e-kfac": {"structure": "e-kfac"},
    "e-kfac-square": {"structure": "e-kfac", "constraint": "square"},
    "e-kfac-gradient": {"structure": "e-kfac", "bases": "gradient"},
    "diag-kfac": {"structure": "diag-kfac"},
    "diagonal": {"structure": "diagonal"},
    "scalar": {"structure": "scalar"},
    "dense": {"structure": "dense", "block_size": 20},
    "identity": {"structure": "identity"},
    "mixed": {"structure": lambda name, p: MIXED.get(name.split(".")[0], "diagonal")},
}
MIXED = {"conv": "kfac", "head": "e-kfac", "table": "diag-kfac", "norm": "scalar"}


def inner_problem(name: str, dtype: torch.dtype = F64) -> tuple[Objective, States]:
    """A random gradient, a random positive curvature, U a little off the identity."""
    torch.manual_seed(0)
    geometry = llqr.LLQR(**STRUCTURES[name])
    geometry.bind(Zoo().to(dtype))
    blocks: BlockDiagonal = geometry.blocks
    n = blocks.layout.numel
    root = torch.randn(n, 30, dtype=dtype) / 5
    states = copy.deepcopy(geometry.states)
    for part, state in zip(blocks.parts, states, strict=True):
        for key in part.trainable:
            state[key].add_(torch.randn_like(state[key]), alpha=0.1)
    g = torch.randn(n, dtype=dtype) / n**0.5
    return Objective(blocks, g, lambda d: root @ (root.mT @ d), 0.1), states


def difference(a: States, b: States, start: States) -> float:
    def joined(x: States, y: States) -> Tensor:
        parts = [(e[k] - f[k]).reshape(-1) for e, f in zip(x, y, strict=True) for k in f]
        return torch.cat([p.double() for p in parts]) if parts else torch.zeros(1)

    return float(joined(a, b).norm() / joined(b, start).norm().clamp(min=1e-30))


@pytest.mark.parametrize("solver, momentum", [("momentum", 0.9), ("sgd", 0.9)])
@pytest.mark.parametrize("clip", [None, 5.0, 0.05])
@pytest.mark.parametrize("name", list(STRUCTURES))
def test_equals_the_literal_loop(name, clip, solver, momentum):
    objective, states = inner_problem(name)
    before = copy.deepcopy(states)
    options = method(solver, 12, 0.1, momentum, clip)
    with torch.no_grad():
        plain, first = solve_literally(objective, states, *options)
        found, start = solve_in_buffers(objective, states, *options)
    assert difference(found, plain, states) < 1e-10
    assert float(start) == pytest.approx(float(first), rel=1e-12)
    for a, b in zip(states, before, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in b)


@pytest.mark.parametrize("name", [n for n in STRUCTURES if n != "identity"])
def test_the_clip_was_active(name):
    """What the test above rests on."""
    objective, states = inner_problem(name)
    with torch.no_grad():
        free, _ = solve_literally(objective, states, *method("momentum", 12, 0.1, 0.9, None))
        bound, _ = solve_literally(objective, states, *method("momentum", 12, 0.1, 0.9, 0.05))
    assert difference(bound, free, states) > 0.05


@pytest.mark.parametrize("name", ["kfac", "e-kfac", "diag-kfac", "mixed", "e-kfac-square"])
def test_recycled_within_the_tolerance(name):
    objective, states = inner_problem(name)
    calls = []
    product = objective.product
    objective.product = lambda d: calls.append(1) or product(d)
    for clip in (None, 0.05):
        options = method("momentum", 50, 0.01, 0.9, clip)
        with torch.no_grad():
            plain, _ = solve_inner_problem(objective, states, states, *options, 0)
            for tolerance in (1e-2, 1e-5):
                calls.clear()
                found, _ = solve_inner_problem(objective, states, states, *options, tolerance)
                assert difference(found, plain, states) < tolerance
                assert len(calls) < 40


@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_other_solvers_take_the_literal_loop(solver):
    objective, states = inner_problem("kfac")
    options = method(solver, 6, 0.01, 0.9, 5.0)
    plain, _ = solve_inner_problem(objective, states, states, *options, 0)
    found, _ = solve_inner_problem(objective, states, states, *options, 1e-8)
    assert difference(found, plain, states) < 1e-4


def test_mixed_precision():
    """Blocks in float32 beside a float64 parameter."""
    net = Zoo().float()
    net.head.double()
    geometry = llqr.LLQR("kfac")
    geometry.bind(net)
    blocks, states = geometry.blocks, geometry.states
    assert len({part.group.dtype for part in blocks.parts}) == 2
    g = torch.randn(blocks.layout.numel, dtype=F64)
    objective = Objective(blocks, g, lambda d: 0.5 * d, 0.0)
    options = method("momentum", 5, 1e-2, 0.9, 1.0)
    with torch.no_grad():
        plain, _ = solve_literally(objective, states, *options)
        found, _ = solve_in_buffers(objective, states, *options)
    assert difference(found, plain, states) < 1e-5


@pytest.mark.parametrize("shape", [(2, 7), (7, 2), (4, 4)])
def test_the_wide_factor_is_never_formed_in_a_step(shape):
    """What moves is of the size of X, and of the narrow side's square."""
    m, n = shape
    geometry = llqr.LLQR("kfac", block_size=None)
    geometry.bind(torch.nn.Linear(n, m, bias=False, dtype=F64))
    (part,), (state,) = geometry.blocks.parts, geometry.states
    inner = part.inner_step(state, torch.randn(1, m, n, dtype=F64))
    assert isinstance(inner, KfacStep)
    out = torch.empty(1, m, n, dtype=F64)
    inner.write_control(out)
    inner.take_step(torch.randn(1, m, n, dtype=F64), 0.1, 0.9, 1e-3)
    held = [*inner.entries.values(), *inner.momenta.values(), *inner.buffers.values()]
    assert max(v.numel() for v in held) <= m * n


@pytest.mark.parametrize("shape", [(70, 130), (130, 70), (64, 64)])
@pytest.mark.parametrize("rank", [3, 60])
@pytest.mark.parametrize("structure", ["kfac", "e-kfac", "e-kfac-square"])
def test_a_gradient_of_low_rank_moves_only_its_span(structure, shape, rank):
    """Two blocks of different rank; 60 columns of 70 are too many to gain."""
    m, n = shape
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *[torch.nn.Linear(*shape[::-1], bias=False, dtype=F64) for _ in range(2)]
    )
    geometry = llqr.LLQR(**{**STRUCTURES[structure], "block_size": 512})
    geometry.bind(model)
    (part,), (state,) = geometry.blocks.parts, geometry.states
    state = {k: v + 0.1 * torch.randn_like(v) for k, v in state.items()}
    x = torch.randn(2, m, rank, dtype=F64) @ torch.randn(2, rank, n, dtype=F64)
    x[1] = torch.randn(m, 1, dtype=F64) @ torch.randn(1, n, dtype=F64)
    inner = part.inner_step(state, x)
    assert (inner.span is not None) == (rank == 3)
    if rank == 3 and structure == "kfac":
        assert max(v.numel() for v in inner.momenta.values()) <= 2 * max(shape) * 12
    root = torch.randn(m * n, 5, dtype=F64) / (m * n) ** 0.5
    g, blocks = x.reshape(-1) / x.norm(), geometry.blocks
    objective = Objective(
        blocks, g, lambda d: (root @ (root.mT @ d.view(2, -1).mT)).mT.reshape(-1), 0.1
    )
    for clip in (None, 1e-3):
        options = method("momentum", 12, 0.1, 0.9, clip)
        with torch.no_grad():
            plain, _ = solve_literally(objective, [state], *options)
            found, _ = solve_in_buffers(objective, [state], *options)
        assert difference(found, plain, [state]) < 1e-9


def test_no_memory_grows_from_step_to_step():
    objective, states = inner_problem("mixed")
    part, state = next(
        (p, s) for p, s in zip(objective.blocks.parts, states, strict=True) if isinstance(p, Kfac)
    )
    inner = part.inner_step(state, torch.randn_like(part.group.view_of(objective.gradient)))
    pointers = []
    for _ in range(3):
        out = torch.empty_like(inner.x)
        inner.write_control(out)
        inner.take_step(torch.randn_like(out), 0.1, 0.9, 1e-3)
        pointers.append(sorted(v.data_ptr() for v in inner.buffers.values()))
    assert pointers[0] == pointers[1] == pointers[2]
