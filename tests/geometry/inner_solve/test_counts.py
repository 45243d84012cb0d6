"""Costs as counts, since machines are noisy: products used, kernels called, reads, growth."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import llqr
from llqr.geometry.inner_solve import Objective
from llqr.geometry.inner_solve._buffered import solve_in_buffers
from llqr.geometry.inner_solve._reduced import solve_on_coefficients
from solving import method
from tiny import Problem


def tower(layers: int, width: int = 8) -> Problem:
    """Equal layers, so that their number should not show."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.Tanh()]
    model = nn.Sequential(*parts[:-1])
    return Problem(model, torch.randn(16, width), torch.randint(width, (16,)))


def kernels(call: Any) -> Counter[str]:
    """Names and numbers of the operations in a profiler trace."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        call()
    return Counter({e.key: e.count for e in trace.key_averages()})


class Large(TorchDispatchMode):
    """Count the operations that touch a tensor of at least so many entries."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        seen = torch.utils._pytree.tree_leaves((args, kwargs, result))
        self.count += any(isinstance(x, Tensor) and x.numel() >= self.numel for x in seen)
        return result


def objective_of(problem: Problem, structure: str, **settings: Any) -> tuple[Objective, Any]:
    geometry = llqr.LLQR(structure, **settings)
    geometry.bind(problem.model)
    g = torch.randn(geometry.layout.numel) / 10
    scale = torch.linspace(0.1, 3, len(g))
    return Objective(geometry.blocks, g, lambda d: scale * d, 0.0), geometry.states


@pytest.mark.parametrize(
    "structure, settings, most",
    [
        ("diagonal", {}, 2),
        ("scalar", {}, 3),
        ("e-kfac", {"bases": "gradient"}, 2),
        ("diag-kfac", {}, 2),
        ("kfac", {}, 3),
        ("e-kfac", {}, 3),
    ],
)
def test_products_of_a_refresh(structure: str, settings: dict[str, Any], most: int) -> None:
    problem = tower(4)
    for lr, more in ((1e-2, 0), ("auto", 6)):
        geometry = llqr.LLQR(structure, lr=lr, **settings)
        geometry.bind(problem.model)
        assert geometry.refresh([problem]).products <= most + more


@pytest.mark.parametrize("structure", ["diagonal", "e-kfac"])
def test_a_step_on_coefficients_touches_no_vector(structure: str) -> None:
    counts = []
    for steps in (10, 50):
        objective, states = objective_of(tower(3), structure, bases="gradient")
        options = method("momentum", steps, 1e-3, 0.9, 5.0)
        with torch.no_grad(), Large(objective.blocks.layout.numel) as large:
            solve_on_coefficients(objective, states, *options, 0.1, 50)
        counts.append(large.count)
    assert 0 < counts[0] == counts[1] <= 240


@pytest.mark.parametrize("structure, products", [("kfac", 4), ("e-kfac", 11)])
def test_equal_layers_are_one_batch(structure: str, products: int) -> None:
    """Matrix products of an inner step, whatever the number of layers."""
    for layers in (2, 6):
        objective, states = objective_of(tower(layers), structure)
        found = []
        for steps in (1, 3):
            options = method("momentum", steps, 1e-3, 0.9, None)
            with torch.no_grad():
                trace = kernels(lambda o=options, s=states, j=objective: solve_in_buffers(j, s, *o))
            found.append(trace["aten::bmm"] + trace["aten::baddbmm"] + trace["aten::baddbmm_"])
        assert found[1] - found[0] == 2 * products


@pytest.mark.parametrize("structure, products", [("kfac", 2), ("e-kfac", 4), ("diagonal", 0)])
def test_application_is_batched(structure: str, products: int) -> None:
    totals = []
    for layers in (2, 6):
        problem = tower(layers)
        geometry = llqr.LLQR(structure)
        geometry.bind(problem.model)
        gradient = problem.gradient()
        trace = kernels(lambda g=gradient, u=geometry: u.apply(g))
        assert trace["aten::bmm"] == products
        assert trace["aten::_foreach_mul"] + trace["aten::_foreach_mul_"] == 1
        totals.append(trace["aten::empty"] + trace["aten::zeros"])
    assert totals[0] == totals[1] <= 3


def test_a_product_is_two_backward_passes() -> None:
    """No forward again: each linear layer costs its three products in each pass, no more."""
    problem = tower(3)
    model = llqr.quadratic_model(problem, problem.model.parameters())
    calls = problem.calls
    trace = kernels(lambda: model.product(model.gradient))
    assert problem.calls == calls <= 2  # the forward, and its comparison with torch the first time
    # J d: dW x and W dx a layer, but for the first layer's W dx; J'v: as many.
    assert trace["aten::mm"] + trace["aten::addmm"] <= 2 * (2 * 3 - 1)


def test_refreshes_do_not_grow() -> None:
    """No tensor more after the third refresh than after the second."""
    import gc

    problem = tower(3)
    geometry = llqr.LLQR("kfac")
    geometry.bind(problem.model)
    counts = []
    for _ in range(3):
        geometry.refresh([problem])
        gc.collect()
        counts.append(sum(issubclass(type(x), Tensor) for x in gc.get_objects()))
    assert counts[2] <= counts[1]
