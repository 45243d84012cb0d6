"""Nothing waits for the cyclic garbage collector: neither a model and its optimizer nor a graph."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import llqr
from tables import BASES, GEOMETRIES, LEFT_OUT, MATRICES_ONLY, METRIC_AND_PROBE, PERTURBATIONS
from tiny import F64, mlp, train


@contextmanager
def collector_off():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _first_use_of_torch():
    """The first optimizer of a process imports torch's compiler, which leaves a cycle once."""
    problem = mlp()
    train(optimizer_on(problem, None, None), problem, 1)


def optimizer_on(problem, geometry, perturbation, base=None):
    base = base or torch.optim.SGD(problem.model.parameters(), lr=0.01, momentum=0.9)
    return llqr.Optimizer(base, problem.model, geometry=geometry, perturbation=perturbation)


def take_every_way(optimizer, problem):
    """A closure, the passes."""
    if optimizer.geometry is not None:
        optimizer.refresh_if_due(problem)
    optimizer.step(lambda: (optimizer.zero_grad(), problem.backward())[1])
    if optimizer.geometry is not None:
        optimizer.refresh_if_due(problem)
    for _ in optimizer.passes():
        problem.backward()
    optimizer.step()


@pytest.mark.parametrize("geometry, perturbation", METRIC_AND_PROBE)
def test_a_dropped_optimizer_frees_the_weights(geometry, perturbation):
    with collector_off():
        problem = mlp()
        optimizer = optimizer_on(problem, GEOMETRIES[geometry](), PERTURBATIONS[perturbation]())
        train(optimizer, problem, 3)
        take_every_way(optimizer, problem)
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        del state
        weak = [weakref.ref(p) for p in problem.model.parameters()]
        alive = weakref.ref(optimizer)
        del optimizer, problem
        assert alive() is None
        assert [w() for w in weak] == [None] * len(weak)


@pytest.mark.parametrize("base", sorted(set(BASES) - set(LEFT_OUT) - MATRICES_ONLY))
def test_also_over_every_base(base):
    with collector_off():
        problem = mlp()
        made = BASES[base](problem.model.parameters())
        optimizer = optimizer_on(problem, llqr.LLQR("diagonal"), llqr.SAM(0.05), made)
        train(optimizer, problem, 2)
        weak = [weakref.ref(p) for p in problem.model.parameters()]
        del optimizer, problem, made
        assert [w() for w in weak] == [None] * len(weak)


class Kept(nn.Module):
    """Remember, weakly, the activation that a graph must hold."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        y = x.tanh()
        self.seen.append(weakref.ref(y))
        return y


class Lacking(torch.autograd.Function):
    """No double backward: a forward of it goes by another way."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("curvature", ["fisher", "newton"])
@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("structure", ["diagonal", "kfac", "e-kfac"])
@pytest.mark.filterwarnings("ignore:the forward uses Lacking")
def test_a_refresh_frees_its_graph_when_it_returns(structure, lacking, curvature):
    torch.manual_seed(0)
    spy = Kept()
    model = nn.Sequential(nn.Linear(5, 6), spy, nn.Linear(6, 3)).to(F64)
    x, y = torch.randn(8, 5, dtype=F64), torch.randint(3, (8,))

    def forward():
        z = model(x)
        z = Lacking.apply(z) if lacking else z
        return nn.functional.cross_entropy(z, y), z

    geometry = llqr.LLQR(structure, curvature=curvature, lr=1e-3)
    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, geometry=geometry
    )
    with collector_off():
        for forwards in (forward, [forward, forward]):
            optimizer.refresh(forwards)
            assert spy.seen and not any(w() is not None for w in spy.seen)
            spy.seen.clear()


def test_a_refresh_that_fails_frees_its_graph_too():
    torch.manual_seed(0)
    spy = Kept()
    model = nn.Sequential(nn.Linear(5, 6), spy, nn.Linear(6, 3)).to(F64)
    x = torch.randn(8, 5, dtype=F64)

    def forward():
        z = model(x)
        return z.sum(), z  # linear in its outputs

    optimizer = llqr.Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, geometry=llqr.LLQR("kfac")
    )
    with collector_off():
        with pytest.raises(ValueError, match="linear"):
            optimizer.refresh(forward)
        assert spy.seen and not any(w() is not None for w in spy.seen)
